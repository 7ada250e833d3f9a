"""Decay groups, optimizers and learning-rate schedules, against hand arithmetic and transformers' schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.optim import build_optimizer, decay_groups, lr_lambda, make_optimizer, warmup_steps
from common.schema import ModelParams, OptimizerName, ScheduleName, ScheduleSettings
from common.training_state import read_training_state, write_training_state
from sft.config import SFTConfig


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


def test_first_step_of_adamw_by_hand() -> None:
    """Bias-corrected moments make the first step lr * sign(g); decay shrinks the matrix by 1 - lr * weight_decay, not the vector."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.5)
    model.weight.grad = torch.tensor([[3.0]])
    model.bias.grad = torch.tensor([-3.0])
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(2.0 + 0.1, abs=1e-6)


def one_step(name: OptimizerName, **settings: Any) -> tuple[float, float]:
    """Weight and bias, 2 each, after a step with gradients of 3 and -3."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = make_optimizer(model, name, learning_rate=0.1, **settings)
    model.weight.grad = torch.tensor([[3.0]])
    model.bias.grad = torch.tensor([-3.0])
    optimizer.step()
    return model.weight.item(), model.bias.item()


def test_first_step_of_adam_by_hand() -> None:
    """Its decay is part of the gradient, 3 + 0.5 * 2, whose size bias-corrected moments divide out again."""
    assert one_step("Adam", eps=1e-12, weight_decay=0.5) == pytest.approx((2.0 - 0.1, 2.0 + 0.1), abs=1e-6)


def test_first_step_of_sgd_by_hand() -> None:
    assert one_step("SGD", weight_decay=0.5) == pytest.approx((2.0 - 0.1 * (3.0 + 0.5 * 2.0), 2.0 + 0.1 * 3.0), abs=1e-6)


def test_momentum_adds_up_over_steps() -> None:
    """The second step of the same gradient is 1 + momentum times the first."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(model, "SGD", learning_rate=0.1, momentum=0.5)
    start = model.weight.item()
    for expected in (0.1 * 3.0, 0.1 * 3.0 * 2.5):
        model.weight.grad = torch.tensor([[3.0]])
        optimizer.step()
        assert start - model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_first_step_of_adafactor_by_hand() -> None:
    """The first average of squares is g^2 (a decay of 1 - 1^-0.8 = 0), so the step is the rate times g's sign; decay as AdamW's."""
    weight, bias = one_step("Adafactor", weight_decay=0.5)
    assert (weight, bias) == pytest.approx((2.0 * (1 - 0.1 * 0.5) - 0.1, 2.0 + 0.1), abs=1e-6)


def test_adafactor_keeps_rows_and_columns_of_squares_alone() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = make_optimizer(model, "Adafactor", learning_rate=0.1)
    model.weight.grad = torch.ones(3, 4)
    optimizer.step()
    sizes = {name: tuple(value.shape) for name, value in optimizer.state[model.weight].items() if torch.is_tensor(value) and value.ndim}
    assert sizes == {"exp_avg_sq_row": (3,), "exp_avg_sq_col": (4,)}


def test_build_optimizer_reads_the_section() -> None:
    params = ModelParams(learning_rate=3e-4, adam_betas=(0.8, 0.9), adam_eps=1e-6, weight_decay=0.02, lr_scheduler="linear")
    made = build_optimizer(tiny_model(), params, total_steps=101)
    group = made["optimizer"].param_groups[0]
    assert (group["initial_lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-6, 0.02)
    assert group["lr"] == 1.5e-4  # a warm-up of two steps
    sgd = build_optimizer(tiny_model(), ModelParams(optimizer="SGD", momentum=0.9), total_steps=1)["optimizer"]
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.9
    for name in get_args(OptimizerName):
        optimizer = build_optimizer(tiny_model(), ModelParams(optimizer=name), total_steps=1)["optimizer"]
        assert type(optimizer).__name__ == name


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_state_of_every_optimizer_comes_back_from_files_with_all_its_bits(name: OptimizerName, tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.arange(5)).mul(torch.arange(3.0) + step).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = tiny_model()
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = make_optimizer(model, name, learning_rate=1e-3, weight_decay=0.1, **momentum)
    train(model, optimizer, range(3))
    write_training_state(tmp_path, {"optimizer": optimizer.state_dict(), "weights": model.state_dict()})
    train(model, optimizer, range(3, 6))

    resumed = tiny_model()
    again = make_optimizer(resumed, name, learning_rate=1e-3, weight_decay=0.1, **momentum)
    state = read_training_state(tmp_path)
    resumed.load_state_dict(state["weights"])
    again.load_state_dict(state["optimizer"])
    train(resumed, again, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


def test_adafactor_refuses_weights_that_are_spread_over_processes() -> None:
    with pytest.raises(ValueError, match=r"Adafactor, which needs whole weights, but trainer\.params\.strategy is fsdp"):
        SFTConfig.model_validate(
            {
                "model_name": "m",
                "data": {"data_dir": "a"},
                "model_params": {"optimizer": "Adafactor"},
                "trainer": {"params": {"strategy": "fsdp"}},
            }
        )

    class Spread(nn.Linear):
        """Its weight looks like a DTensor."""

        def __init__(self) -> None:
            super().__init__(2, 2)
            self.weight.placements = ()  # type: ignore[attr-defined]

    with pytest.raises(UserError, match="optimizer: got Adafactor, which needs whole weights"):
        make_optimizer(Spread(), "Adafactor", learning_rate=1.0)
    assert not make_optimizer(Spread(), "SGD", learning_rate=1.0).defaults["fused"]  # torch has no such kernel for spread weights
    assert make_optimizer(tiny_model(), "SGD", learning_rate=1.0).defaults["fused"]


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_optimizers_let_lightning_clip_under_mixed_precision(name: OptimizerName) -> None:
    from pytorch_lightning.plugins.precision.amp import _optimizer_handles_unscaling

    assert not _optimizer_handles_unscaling(make_optimizer(tiny_model(), name, learning_rate=1.0))


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


TRANSFORMERS: dict[str, tuple[str, ScheduleSettings, dict[str, float]]] = {
    "linear": ("linear", ScheduleSettings(), {}),
    "cosine": ("cosine", ScheduleSettings(), {}),
    "one cycle": ("cosine_with_restarts", ScheduleSettings(), {}),
    "three cycles": ("cosine_with_restarts", ScheduleSettings(num_cycles=3), {"num_cycles": 3}),
    "line to 1e-7": ("polynomial", ScheduleSettings(), {}),
    "parabola": ("polynomial", ScheduleSettings(power=2.0, lr_end=1e-3), {"power": 2.0, "lr_end": 1e-3}),
    "floor": ("cosine_with_min_lr", ScheduleSettings(min_lr_rate=0.25), {"min_lr_rate": 0.25}),
    "constant": ("constant", ScheduleSettings(), {}),
    "constant_with_warmup": ("constant_with_warmup", ScheduleSettings(), {}),
    "root": ("inverse_sqrt", ScheduleSettings(), {}),
    "slow root": ("inverse_sqrt", ScheduleSettings(timescale=50), {"timescale": 50}),
    "late decay": ("warmup_stable_decay", ScheduleSettings(num_decay_steps=4), {"num_decay_steps": 4}),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_after_the_warmup_schedules_are_transformers_own(case: str) -> None:
    from transformers import get_scheduler

    name, settings, arguments = TRANSFORMERS[case]
    assert name in get_args(ScheduleName)
    peak, warmup, total = 2e-2, 0 if name == "constant" else 3, 20  # theirs of that name has no warm-up
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs: Any = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=arguments)
    ours = lr_lambda(name, warmup, total, settings, peak=peak)  # type: ignore[arg-type]
    for step in range(total + 1):
        if step >= warmup:
            assert peak * ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_every_schedule_warms_up_and_ends() -> None:
    for name in get_args(ScheduleName):
        factor = lr_lambda(name, 2, 10)
        assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0], name
        assert 0.0 <= factor(1000) <= factor(10) <= 1.0, name


def test_settings_of_another_optimizer_or_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum: got 0\.9, which belongs to SGD, but optimizer is AdamW"):
        ModelParams(momentum=0.9)
    with pytest.raises(ValueError, match=r"adam_eps: got 1e-06, which belongs to AdamW and Adam, but optimizer is SGD"):
        ModelParams(optimizer="SGD", adam_eps=1e-6)
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs.power: got 2, which belongs to polynomial, but lr_scheduler is cosine"):
        ModelParams(lr_scheduler="cosine", lr_scheduler_kwargs=ScheduleSettings(power=2.0))
    assert ModelParams(lr_scheduler="polynomial", lr_scheduler_kwargs=ScheduleSettings(power=2.0)).lr_scheduler_kwargs.power == 2.0
