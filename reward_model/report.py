"""Reports of an evaluation: figures with intervals and baselines, breakdowns, and whether the model can be trusted.

Text for the terminal and plain values for a JSON file come from the same objects. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reward_model.metrics import CalibrationBin, Floats, Interval

# Above this, scores that should be equal are not: float32 rounding through a few layers stays well below.
INVARIANCE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Figure:
    """One number. `baseline`: what a rule without any model reaches; `baseline_name` says which."""

    name: str
    value: float
    interval: Interval | None = None
    baseline: float | None = None
    baseline_name: str = ""

    def json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"value": number(self.value)}
        if self.interval is not None:
            entry["interval_95"] = [number(self.interval.low), number(self.interval.high)]
        if self.baseline is not None:
            entry |= {"baseline": number(self.baseline), "baseline_name": self.baseline_name}
        return entry


@dataclass(frozen=True)
class Breakdown:
    """A figure in slices of the rows."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def json(self) -> list[dict[str, Any]]:
        return [{name: number(value) for name, value in zip(self.columns, row, strict=True)} for row in self.rows]


@dataclass(frozen=True)
class Check:
    """One reason to trust the model or not."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Report:
    """Everything a test script has to say."""

    title: str
    figures: list[Figure]
    breakdowns: list[Breakdown]
    checks: list[Check]
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        return {
            **self.facts,
            "figures": {figure.name: figure.json() for figure in self.figures},
            "breakdowns": {breakdown.name: breakdown.json() for breakdown in self.breakdowns},
            "checks": [{"passed": check.passed, "text": check.text} for check in self.checks],
            "trustworthy": all(check.passed for check in self.checks),
        }

    def __str__(self) -> str:
        rows = []
        for figure in self.figures:
            interval = figure.interval and f"{shown(figure.interval.low)} to {shown(figure.interval.high)}"
            baseline = "" if figure.baseline is None else f"{shown(figure.baseline)}  {figure.baseline_name}"
            rows.append((figure.name, figure.value, interval or "", baseline))
        parts = [self.title, table(("figure", "value", "95 % by question", "baseline"), rows)]
        parts += [f"{breakdown.name}\n{table(breakdown.columns, breakdown.rows)}" for breakdown in self.breakdowns if breakdown.rows]
        parts.append("can it be trusted?\n" + "\n".join(f"  {'ok ' if check.passed else 'NO '} {check.text}" for check in self.checks))
        return "\n\n".join(parts)


def calibration_breakdown(name: str, bins: Sequence[CalibrationBin]) -> Breakdown:
    return Breakdown(name, ("from", "to", "rows", "expected", "observed"), [tuple(entry) for entry in bins])


def invariance_check(differences: dict[str, float]) -> Check:
    """Whether one and the same answer gets one and the same score, whatever else is scored with it."""
    worst = max(differences.values(), default=0.0)
    listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return Check(worst <= INVARIANCE_TOLERANCE, f"scores do not depend on padding or batch order (largest difference: {listed})")


def column(rows: Sequence[Any], name: str) -> Floats:
    """One attribute of every row, (N,)."""
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)


def edges(low: float, high: float) -> tuple[float, float]:
    """The ends of a slice, as whole numbers where both are (lengths are)."""
    return (int(low), int(high)) if low.is_integer() and high.is_integer() else (low, high)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest cell: the first and text to the left, numbers to the right."""
    cells = [[shown(value) for value in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[index], (int, float)) for row in rows) for index in range(len(columns))]
    widths = [max(len(line[index]) for line in [list(columns), *cells]) for index in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in zip(line, widths, right, strict=True))
        for line in [list(columns), *cells]
    ]
    return "\n".join("  " + line.rstrip() for line in lines)


def shown(value: Any) -> str:
    """A value for the eye: floats with four significant digits, NaN as a dash."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def number(value: Any) -> Any:
    """A value for JSON, which has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
