"""The SFT loss: by hand, and the same however many logits are there at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sft.losses import answer_figures, answer_loss


def test_loss_and_figures_by_hand() -> None:
    # A vocabulary of 2; logits (0, ln 3) give probabilities 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)
    targets = torch.tensor([1, 0])
    expected = -math.log(0.75) - math.log(0.25)
    assert answer_loss(logits, targets, nn.Identity(), 2).item() == pytest.approx(expected)
    assert answer_figures(logits, targets, nn.Identity(), 2) == (pytest.approx(expected), 2, 1)


def test_no_answer_token_gives_zero_and_not_nan() -> None:
    states = torch.randn(0, 5, requires_grad=True)
    loss = answer_loss(states, torch.empty(0, dtype=torch.long), nn.Identity(), 5)
    loss.backward()
    assert loss.item() == 0.0 and states.grad is not None
    assert answer_figures(states, torch.empty(0, dtype=torch.long), nn.Identity(), 5) == (0.0, 0, 0)


def test_parts_of_the_logits_add_up_and_are_never_there_together() -> None:
    torch.manual_seed(0)
    head, states, targets = nn.Linear(6, 9), torch.randn(11, 6, requires_grad=True), torch.randint(0, 9, (11,))
    sizes: list[int] = []

    def watched(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return head(rows)

    def loss_and_gradients(most_logits: int) -> list[torch.Tensor]:
        head.zero_grad()
        states.grad = None
        loss = answer_loss(states, targets, watched, 9, most_logits)
        loss.backward()
        assert states.grad is not None and head.weight.grad is not None and head.bias.grad is not None
        return [loss.detach(), states.grad, head.weight.grad.clone(), head.bias.grad.clone()]

    whole = loss_and_gradients(10_000)
    assert sizes == [11]
    sizes.clear()
    torch.testing.assert_close(loss_and_gradients(4 * 9), whole, rtol=1e-5, atol=1e-6)
    assert sorted(sizes) == sorted([4, 4, 3] * 2)  # once forward, once in backward
    assert answer_figures(states, targets, watched, 9, 4 * 9)[0] == pytest.approx(whole[0].item(), rel=1e-6)
