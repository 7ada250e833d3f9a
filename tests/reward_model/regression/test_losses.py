"""Score losses against hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from reward_model.regression.losses import LossName, score_loss


@pytest.mark.parametrize(
    ("name", "expected"),
    # errors 0.5, -3, 0 with delta 2: huber 0.125; 2 * (3 - 1) = 4; 0
    [("mse", [0.25, 9.0, 0.0]), ("mae", [0.5, 3.0, 0.0]), ("huber", [0.125, 4.0, 0.0])],
)
def test_score_loss_by_hand(name: LossName, expected: list[float]) -> None:
    loss = score_loss(torch.tensor([1.5, -2.0, 4.0]), torch.tensor([1.0, 1.0, 4.0]), name, huber_delta=2.0)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("delta", [0.3, 1.0, 5.0])
def test_huber_equals_torchs_in_value_and_gradient(delta: float) -> None:
    predicted = torch.linspace(-4, 4, 33, dtype=torch.float64)
    target = torch.full_like(predicted, 0.25)
    ours, theirs = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    score_loss(ours, target, "huber", delta).sum().backward()
    expected = torch.nn.functional.huber_loss(theirs, target, reduction="none", delta=delta)
    expected.sum().backward()
    torch.testing.assert_close(score_loss(predicted, target, "huber", delta), expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
