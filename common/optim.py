"""AdamW with decay groups, and learning-rate schedules. Free functions, so that Lightning stages and PPO share them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


class OptimizerSettings(Protocol):
    """The part of a config section that the optimizer needs."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def adam_eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class ScheduledSettings(OptimizerSettings, Protocol):
    """The same with the learning rate's way over the training."""

    @property
    def lr_scheduler(self) -> Schedule: ...
    @property
    def warmup_steps_per_cent(self) -> float: ...


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with `weight_decay`, vectors (norms, biases) without; empty groups left out."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in one fused kernel where torch has one for their device and type."""
    groups = decay_groups(model, weight_decay)
    assert groups, "no parameter is trainable"
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in {"cpu", "cuda"} and parameter.is_floating_point() for parameter in parameters)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    # A fused optimizer announces that it unscales gradients itself, on which Lightning refuses to clip them under mixed precision.
    # Without the announcement the scaler unscales before clipping, as for any other optimizer.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def build_adamw(model: nn.Module, params: OptimizerSettings) -> torch.optim.AdamW:
    """`adamw` with the values of a config section."""
    return adamw(model, learning_rate=params.learning_rate, betas=params.adam_betas, eps=params.adam_eps, weight_decay=params.weight_decay)


def build_optimizer(model: nn.Module, params: ScheduledSettings, total_steps: int) -> dict[str, Any]:
    """AdamW and a schedule that moves with every optimizer step, in the form that `configure_optimizers` of Lightning returns."""
    optimizer = build_adamw(model, params)
    schedule = lr_lambda(params.lr_scheduler, warmup_steps(params.warmup_steps_per_cent, total_steps), total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_steps(share: float, total_steps: int) -> int:
    """Optimizer steps of warm-up: `share` (0-1) of all, rounded up."""
    return math.ceil(share * total_steps - 1e-9)  # 0.07 * 100 is 7.000000000000001


def lr_lambda(name: Schedule, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate as a function of optimizer steps done, for `LambdaLR`.

    Step s (from 0) of the warm-up has (s + 1) / warmup: no step is wasted on a rate of 0. After it, with p = (s - warmup) /
    (total_steps - warmup): constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2. Beyond total_steps: as at its end.
    """
    assert name in ("constant", "linear", "cosine"), name

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
