"""Optimizers with decay groups, and learning-rate schedules. Free functions, so that Lightning stages and PPO share them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, get_args

import torch
from torch import nn

from common.errors import UserError
from common.schema import OptimizerName, ScheduleName, ScheduleSettings


class OptimizerSettings(Protocol):
    """The part of a config section that the optimizer needs."""

    @property
    def optimizer(self) -> OptimizerName: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def adam_eps(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class ScheduledSettings(OptimizerSettings, Protocol):
    """The same with the learning rate's way over the training."""

    @property
    def lr_scheduler(self) -> ScheduleName: ...
    @property
    def lr_scheduler_kwargs(self) -> ScheduleSettings: ...
    @property
    def warmup_steps_per_cent(self) -> float: ...


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with `weight_decay`, vectors (norms, biases) without; empty groups left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module,
    name: OptimizerName = "AdamW",
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimizer of that name over the trainable parameters, in one fused kernel where torch has one for their device and type.

    AdamW and Adam read `betas` and `eps`, SGD `momentum`. Adafactor is transformers' with an absolute learning rate, as its trainer has
    it: no scale of the parameters, no step size of its own, updates clipped to a root mean square of 1. It keeps sums over rows and
    columns of whole matrices: weights that are spread over processes are a UserError.
    """
    groups = decay_groups(model, weight_decay)
    assert groups, "no parameter is trainable"
    parameters = [parameter for group in groups for parameter in group["params"]]
    spread = any(hasattr(parameter, "placements") for parameter in parameters)  # torch's DTensor
    if name == "Adafactor":
        from transformers import Adafactor

        if spread:
            raise UserError("optimizer: got Adafactor, which needs whole weights, and these are spread over processes; use AdamW or SGD")
        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    fused = all(parameter.device.type in {"cpu", "cuda"} and parameter.is_floating_point() for parameter in parameters)
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=fused and not spread)
    else:
        make = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[name]
        optimizer = make(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    # A fused optimizer announces that it unscales gradients itself, on which Lightning refuses to clip them under mixed precision.
    # Without the announcement the scaler unscales before clipping, as for any other optimizer.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def build_optimizer(model: nn.Module, params: ScheduledSettings, total_steps: int) -> dict[str, Any]:
    """Optimizer and a schedule that moves with its every step, in the form that `configure_optimizers` of Lightning returns."""
    optimizer = make_optimizer(
        model,
        params.optimizer,
        learning_rate=params.learning_rate,
        betas=params.adam_betas,
        eps=params.adam_eps,
        momentum=params.momentum,
        weight_decay=params.weight_decay,
    )
    warmup = warmup_steps(params.warmup_steps_per_cent, total_steps)
    schedule = lr_lambda(params.lr_scheduler, warmup, total_steps, params.lr_scheduler_kwargs, peak=params.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_steps(share: float, total_steps: int) -> int:
    """Optimizer steps of warm-up: `share` (0-1) of all, rounded up."""
    return math.ceil(share * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001


def lr_lambda(
    name: ScheduleName, warmup: int, total_steps: int, settings: ScheduleSettings | None = None, *, peak: float = 1.0
) -> Callable[[int], float]:
    """Factor on the peak learning rate (`peak`) as a function of optimizer steps done, for `LambdaLR`.

    Step s (from 0) of the warm-up has (s + 1) / warmup: no step is wasted on a rate of 0. What follows is transformers' schedule of that
    name. With p = (s - warmup) / (total_steps - warmup): constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2, and so on; beyond
    total_steps as at its end, but for inverse_sqrt, which knows no end.
    """
    assert name in get_args(ScheduleName), name
    own = settings or ScheduleSettings()
    cycles = own.num_cycles or 1
    floor = 0.1 if own.min_lr_rate is None else own.min_lr_rate
    end = (1e-7 if own.lr_end is None else own.lr_end) / peak
    timescale = own.timescale or warmup or 10_000
    decay = own.num_decay_steps or math.ceil(0.1 * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        match name:
            case "linear":
                return 1.0 - done
            case "cosine":
                return half_cosine(done)
            case "cosine_with_restarts":
                return half_cosine(cycles * done % 1.0) if done < 1 else 0.0
            case "cosine_with_min_lr":
                return floor + (1.0 - floor) * half_cosine(done)
            case "polynomial":
                return end + (1.0 - end) * float((1.0 - done) ** (own.power or 1.0))
            case "inverse_sqrt":
                return math.sqrt(timescale / (step - warmup + timescale))
            case "warmup_stable_decay":
                return half_cosine(min(1.0, max(0.0, (step - max(warmup, total_steps - decay)) / decay)))
            case _:
                return 1.0

    return factor


def half_cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
