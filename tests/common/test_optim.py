"""Decay groups, AdamW and learning-rate schedules, against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common.optim import adamw, build_adamw, decay_groups, lr_lambda, warmup_steps
from common.schema import ModelParams


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = tiny_model()
    matrices, vectors = decay_groups(model, 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(5, 4), (3, 4)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny_model()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    (group,) = decay_groups(model, 0.1)
    assert len(group["params"]) == 1 and group["params"][0] is model[1].weight


def test_first_adamw_step_by_hand() -> None:
    """Bias-corrected moments make the first step lr * sign(g); decay shrinks the matrix by 1 - lr * weight_decay, not the vector."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = adamw(model, learning_rate=0.1, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.5)
    model.weight.grad = torch.tensor([[3.0]])
    model.bias.grad = torch.tensor([-3.0])
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(2.0 + 0.1, abs=1e-6)


def test_build_adamw_reads_the_section() -> None:
    params = ModelParams(learning_rate=3e-4, adam_betas=(0.8, 0.9), adam_eps=1e-6, weight_decay=0.02)
    group = build_adamw(tiny_model(), params).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-6, 0.02)


def test_optimizer_lets_lightning_clip_under_mixed_precision() -> None:
    from pytorch_lightning.plugins.precision.amp import _optimizer_handles_unscaling

    assert not _optimizer_handles_unscaling(adamw(tiny_model(), learning_rate=1.0))


@pytest.mark.parametrize(
    ("share", "total", "expected"), [(0.01, 100, 1), (0.01, 101, 2), (0.0, 100, 0), (0.07, 100, 7), (1.0, 3, 3), (0.5, 0, 0)]
)
def test_warmup_steps_round_up(share: float, total: int, expected: int) -> None:
    assert warmup_steps(share, total) == expected


def test_schedules_by_hand() -> None:
    """Two warm-up steps of six: 1/2, 1, then p = 0, 1/4, 1/2, 3/4."""
    steps = range(7)
    assert [lr_lambda("constant", 2, 6)(s) for s in steps] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [lr_lambda("linear", 2, 6)(s) for s in steps] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    half = math.sqrt(0.5)
    expected = [0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0]
    assert [lr_lambda("cosine", 2, 6)(s) for s in steps] == pytest.approx(expected, abs=1e-12)


def test_schedule_without_warmup_starts_at_the_peak_and_never_goes_below_zero() -> None:
    for name in ("constant", "linear", "cosine"):
        factor = lr_lambda(name, 0, 4)
        assert factor(0) == 1.0
        assert factor(100) == (1.0 if name == "constant" else 0.0)
    assert lr_lambda("linear", 4, 4)(4) == 1.0  # nothing but warm-up
