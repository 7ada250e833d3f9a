"""Pairwise losses against hand arithmetic and their invariants."""

from __future__ import annotations

import math

import pytest
import torch

from reward_model.classification.losses import bradley_terry_loss, centring_penalty, pair_loss

F64 = torch.float64


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def test_bradley_terry_by_hand() -> None:
    # sigmoid(log 3) = 3/4; equal scores give probability 1/2
    loss = bradley_terry_loss(t(math.log(3.0), 5.0, 0.0), t(0.0, 5.0, math.log(3.0)))
    torch.testing.assert_close(loss, t(math.log(4 / 3), math.log(2.0), math.log(4.0)), rtol=0, atol=1e-12)


def test_margin_shifts_the_difference() -> None:
    torch.testing.assert_close(bradley_terry_loss(t(3.0), t(1.0), t(2.0)), t(math.log(2.0)), rtol=0, atol=1e-12)


def test_label_smoothing_is_the_expectation_over_a_flipped_label() -> None:
    chosen, rejected = t(math.log(3.0)), t(0.0)
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4.0)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, label_smoothing=0.1), t(expected), rtol=0, atol=1e-12)


def test_smoothed_loss_is_least_where_the_probability_is_one_minus_epsilon() -> None:
    difference = t(math.log(9.0)).requires_grad_()  # sigmoid = 0.9
    bradley_terry_loss(difference, t(0.0), label_smoothing=0.1).sum().backward()
    assert abs(difference.grad.item()) < 1e-12


def test_gradient_is_minus_the_probability_of_the_wrong_order() -> None:
    chosen, rejected = t(math.log(3.0)).requires_grad_(), t(0.0).requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, t(-0.25), rtol=0, atol=1e-12)
    torch.testing.assert_close(rejected.grad, t(0.25), rtol=0, atol=1e-12)


def test_large_differences_stay_finite() -> None:
    loss = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.zeros(2), label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.tensor([1e3, 9e3]))


def test_the_preference_loss_does_not_see_a_common_shift_but_centring_does() -> None:
    chosen, rejected = t(1.0, -2.0), t(0.5, 3.0)
    shifted = bradley_terry_loss(chosen + 7.0, rejected + 7.0)
    torch.testing.assert_close(shifted, bradley_terry_loss(chosen, rejected), rtol=0, atol=1e-12)
    torch.testing.assert_close(centring_penalty(t(3.0, 1.0), t(1.0, -1.0)), t(4.0, 0.0), rtol=0, atol=0)


def test_pair_loss_adds_both_terms_with_their_weights() -> None:
    loss = pair_loss(t(2.0, 0.0), t(2.0, 0.0), t(1.0, 0.5), t(0.0, 0.0), centring_coef=0.1)
    assert loss.item() == pytest.approx(1.5 * math.log(2.0) + 0.1 * 4.0, abs=1e-12)


def test_a_question_counts_once_however_many_answers_were_rejected() -> None:
    """The same answer rejected three times, each with weight 1/3, is the answer rejected once."""
    once = pair_loss(t(1.0), t(0.2), t(1.0), t(0.0), label_smoothing=0.1, centring_coef=0.3)
    thrice = pair_loss(t(1.0, 1.0, 1.0), t(0.2, 0.2, 0.2), t(1 / 3, 1 / 3, 1 / 3), t(0.0, 0.0, 0.0), label_smoothing=0.1, centring_coef=0.3)
    torch.testing.assert_close(once, thrice, rtol=0, atol=1e-12)
