"""The first and the last words of a training: what it is about to do, and what came of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.plots import plot_curves
from common.progress import duration, format_figure
from common.runs import SUMMARY_FILE, publish_latest
from common.tracking import METRICS_CSV, Tracker, best_values, read_metrics

if TYPE_CHECKING:
    from torch import Tensor

BEST = "best"
SHOWN_BESIDE = 3  # figures beside the best one; summary.json has all


@dataclass(frozen=True)
class RunResult:
    """What a training ended with, and what it cost.

    model: the best checkpoint by the monitored metric, or the last one where there is no best. best_value: None where the metric was
    never finite. validated: whether any validation ran. start_value: the metric before training, more being better; None where unknown.
    started_from: the model that has it.
    """

    model: Path
    monitor: str
    best_value: float | None
    best_metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    peak_memory_gib: float = 0.0
    validated: bool = True
    start_value: float | None = None
    started_from: str | None = None


def opening_lines(
    run_dir: Path | None,
    *,
    parameters: Iterable[Tensor],
    rows: Mapping[str, int],
    steps: int,
    batch: str = "",
    device: str = "",
    step_name: str = "optimizer",
) -> list[str]:
    """What starts now: how many parameters there are and train, rows per split, steps, and where the results go (None: nowhere)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    splits = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    where = f" on {device}" if device else ""
    return [
        f"model: {total:,} parameters, {trainable:,} of them train{where}",
        f"data: {splits} rows; {steps:,} {step_name} steps{f' of {batch}' if batch else ''}",
        *([f"output: {run_dir}"] if run_dir is not None else []),
    ]


def summary_of(run_dir: Path, stage: str, result: RunResult, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `summary.json`."""
    return {
        "stage": stage,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "peak_memory_gib": round(result.peak_memory_gib, 3),
        "monitor": result.monitor,
        "best_value": result.best_value,
        "best_metrics": result.best_metrics,
        "best_of_each": best_values(read_metrics(run_dir)),
        "model": str(result.model),
        **(extra or {}),
    }


def cost_line(steps: int, seconds: float, peak_memory_gib: float) -> str:
    """What a training took."""
    return f"done: {steps:,} steps in {duration(seconds)}, peak memory {peak_memory_gib:.2f} GiB"


def closing_lines(run_dir: Path, result: RunResult, *, latest: Path | None, curves: Path | None) -> list[str]:
    """A few lines: the best figure, what it took, and the paths."""
    if not result.validated:
        best = "no validation ran, so no checkpoint is known to be the best; the last one stands in for it"
    elif result.best_value is None:
        best = f"{result.monitor} was never a finite number; the last checkpoint stands in for the best"
    elif result.start_value is not None and result.best_value <= result.start_value:
        best = (
            f"no checkpoint is better than the start: {result.monitor} {format_figure(result.start_value)} at the start, at most "
            f"{format_figure(result.best_value)} after it (see the README's table from symptom to setting)"
        )
    else:
        beside = [f"{name} {format_figure(value)}" for name, value in result.best_metrics.items() if name != result.monitor]
        others = ", ".join(beside[:SHOWN_BESIDE])
        best = f"best {result.monitor} {format_figure(result.best_value)}{f' ({others})' if others else ''}"
    lines = [
        cost_line(result.steps, result.seconds, result.peak_memory_gib),
        f"{best}, {result.model.name}",
        f"model:   {latest or run_dir / BEST}{f' -> {result.model}' if latest else ''}{_not_above_the_start(result)}",
        f"metrics: {run_dir / METRICS_CSV}, {SUMMARY_FILE}",
    ]
    return [*lines, *([f"curves:  {curves}"] if curves else [])]


def _not_above_the_start(result: RunResult) -> str:
    if result.best_value is None or result.start_value is None or result.best_value > result.start_value:
        return ""
    words = "worse than the start" if result.best_value < result.start_value else "no better than the start"
    figures = f"{result.monitor} {format_figure(result.best_value)}, it was {format_figure(result.start_value)}"
    model = f"; the model it started from is {result.started_from}" if result.started_from else ""
    return f" ({words}: {figures}{model})"


def finish_run(
    tracker: Tracker, result: RunResult, *, runs_root: Path | None, extra: Mapping[str, Any] | None = None, log_model: bool = False
) -> dict[str, Any]:
    """Publish the best model as `runs_root/latest`, draw the curves, write `summary.json`, close the tracker, print the closing lines.

    `runs_root` None publishes nothing. `extra` goes into the summary, which is returned.
    """
    run_dir = tracker.run_dir
    summary = summary_of(run_dir, tracker.stage, result, extra)
    if not tracker.is_main:
        return summary
    latest = publish_latest(runs_root, run_dir / BEST) if runs_root is not None else None
    if log_model:
        tracker.artifact(result.model)
    tracker.finish(summary)
    curves = None
    try:
        curves = plot_curves(run_dir)
    except Exception as error:  # a picture is not worth a failed run
        print(f"warning: no curves were drawn: {error}", file=sys.stderr)
    for line in closing_lines(run_dir, result, latest=latest, curves=curves):
        print(line)
    return summary
