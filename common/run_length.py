"""What the number of rows says about a training's length before torch is imported: batches without their rows, intervals beyond the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.config import Invocation
from common.errors import UserError
from common.schema import TrainingSettings


def check_training_length(invocation: Invocation[TrainingSettings], rows: int, batch_size: int) -> list[str]:
    """Notes on a training of Lightning's on `rows` in batches. Raises UserError like `check_save_interval`."""
    trainer = invocation.config.trainer
    notes = []
    if batch_size > rows:
        notes.append(f"data.batch_size {batch_size} exceeds the number of training rows, {rows}: a batch holds all of them")
    if not trainer.params.get("fast_dev_run"):
        notes += check_save_interval(
            invocation,
            "trainer.checkpoint.every_n_train_steps",
            trainer.checkpoint.every_n_train_steps,
            _steps_at_most(trainer.params, rows, batch_size),
            instead="lower it (null: at each validation)",
            length=("trainer.params", "data"),
        )
    return notes


def check_save_interval(
    invocation: Invocation[Any], setting: str, interval: int | None, steps: float, *, instead: str, length: tuple[str, ...]
) -> list[str]:
    """Raise UserError where `interval` exceeds the `steps` of the run, so that nothing would be saved in between; `instead`: what to do.

    A note instead where the command line changes one of the settings (or sections) `length`, and so makes the run shorter than the one
    that the file gives an interval for: to try a config for some steps is no mistake.
    """
    if interval is None or interval <= steps:
        return []
    problem = f"{setting}: got {interval}, but the run has {steps:,} steps: nothing would be saved before its end"
    if invocation.overrides(*length) and not invocation.overrides(setting):
        return [problem]
    raise UserError(f"{problem}; {instead}")


def _steps_at_most(params: Mapping[str, Any], rows: int, batch_size: int) -> float:
    """Optimizer steps under `trainer.params`, the most that `rows` can give."""
    epochs, steps = params.get("max_epochs"), params.get("max_steps")
    by_steps = math.inf if steps in (None, -1) else steps
    if epochs is None:
        epochs = 1 if by_steps == math.inf else -1
    batches = math.ceil(rows / batch_size)
    for name in ("limit_train_batches", "overfit_batches"):
        if type(limit := params.get(name)) is int and limit > 0:
            batches = min(batches, limit)
    by_epochs = math.inf if epochs == -1 else epochs * math.ceil(batches / params.get("accumulate_grad_batches", 1))
    return min(by_epochs, by_steps)
