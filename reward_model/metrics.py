"""Figures about scores: accuracy, correlation, intervals by question, calibration. numpy in, floats out; no torch.

N rows or pairs. A figure that cannot be computed (no rows, no variation) is NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


# --- single figures --------------------------------------------------------------------------------------------------------------


def wins(margins: ArrayLike) -> Floats:
    """1 where the margin is above 0, 0.5 where it is 0, else 0 (also for NaN): (N,)."""
    values = np.asarray(margins, dtype=np.float64)
    return (values > 0) + 0.5 * (values == 0)


def mean(values: ArrayLike) -> float:
    """Arithmetic mean, NaN of nothing."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else float("nan")


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation; NaN where either does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def ranks(x: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation of ranks; NaN where either does not vary."""
    return pearson(ranks(x), ranks(y))


def r2(predicted: ArrayLike, target: ArrayLike, baseline: float) -> float:
    """1 - squared error / squared error of always predicting `baseline` (the mean of the training scores); above 0 is better."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    total = float(((y - baseline) ** 2).sum())
    return 1.0 - float(((y - p) ** 2).sum()) / total if total > 0 else float("nan")


def same_sign(predicted: ArrayLike, target: ArrayLike) -> Floats:
    """1 where both are negative or neither is: (N,). A score of 0 is not negative."""
    return ((np.asarray(predicted) < 0) == (np.asarray(target) < 0)).astype(np.float64)


# --- questions -------------------------------------------------------------------------------------------------------------------


def group_ids(keys: Sequence[Hashable]) -> Ints:
    """A number per row, equal for equal keys, in order of appearance: (N,)."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def pairs_within(groups: Ints, targets: ArrayLike) -> tuple[Ints, Ints]:
    """Row indices (better, worse) of every pair of answers to one question whose target scores differ."""
    values = np.asarray(targets, dtype=np.float64)
    better: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    worse: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for rows in np.split(order, starts[1:]) if len(order) else []:
        i, j = np.nonzero(values[rows][:, None] > values[rows][None, :])
        better.append(rows[i])
        worse.append(rows[j])
    return np.concatenate(better), np.concatenate(worse)


def bootstrap_ratio(numerator: ArrayLike, denominator: ArrayLike, groups: Ints, samples: int, seed: int) -> Interval:
    """Interval of sum(numerator) / sum(denominator) when whole questions are drawn again with replacement.

    Answers to one question are alike; drawing rows instead of questions would promise too much. (N,) each; NaN without samples
    or with fewer than two questions.
    """
    if samples == 0 or len(groups) == 0 or groups.max() < 1:
        return Interval(float("nan"), float("nan"))
    count = int(groups.max()) + 1
    top = np.bincount(groups, np.asarray(numerator, dtype=np.float64), count)
    bottom = np.bincount(groups, np.asarray(denominator, dtype=np.float64), count)
    generator = np.random.default_rng(seed)
    ratios = np.empty(samples)
    for index in range(samples):  # one draw at a time: memory stays that of one sample
        drawn = generator.integers(count, size=count)
        below = bottom[drawn].sum()
        ratios[index] = top[drawn].sum() / below if below else np.nan
    if np.isnan(ratios).all():
        return Interval(float("nan"), float("nan"))
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return Interval(float(low), float(high))


# --- breakdowns ------------------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """Rows whose value lies in [low, high]."""

    low: float
    high: float
    rows: Ints


def quantile_slices(values: ArrayLike, parts: int = 4) -> list[Slice]:
    """Rows in `parts` slices of like size by value; equal values stay together, so slices may be fewer."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return []
    edges = np.unique(np.quantile(array, np.linspace(0, 1, parts + 1)[1:-1]))
    slices = []
    for number in np.unique(np.searchsorted(edges, array, side="left")):
        rows = np.flatnonzero(np.searchsorted(edges, array, side="left") == number)
        slices.append(Slice(float(array[rows].min()), float(array[rows].max()), rows))
    return slices


def value_slices(values: Sequence[str], most: int = 20) -> list[tuple[str, Ints]]:
    """(value, its rows), the commonest first; values beyond the `most` commonest stand together as `(others)`."""
    counts = Counter(values).most_common()
    kept = {value for value, _ in counts[:most]}
    names = np.array([value if value in kept else "(others)" for value in values], dtype=object)
    order = [value for value, _ in counts[:most]] + (["(others)"] if len(counts) > most else [])
    return [(value, np.flatnonzero(names == value)) for value in order]


class CalibrationBin(NamedTuple):
    """What a model expected and what came true among `count` rows."""

    low: float
    high: float
    count: int
    expected: float
    observed: float


def preference_calibration(margins: ArrayLike, bins: int = 5) -> tuple[list[CalibrationBin], float]:
    """How often the answer that the model prefers is the preferred one, by how sure it is; and the expected calibration error.

    margins: chosen - rejected (N,). Sureness is sigmoid(|margin|), between 0.5 and 1, cut into equal bins.
    """
    values = np.asarray(margins, dtype=np.float64)
    if values.size == 0:
        return [], float("nan")
    sureness = 1.0 / (1.0 + np.exp(-np.abs(values)))
    number = np.minimum(((sureness - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    table = []
    for index in range(bins):
        rows = number == index
        if rows.any():
            low, high = 0.5 + 0.5 * index / bins, 0.5 + 0.5 * (index + 1) / bins
            table.append(CalibrationBin(low, high, int(rows.sum()), mean(sureness[rows]), mean(wins(values)[rows])))
    return table, expected_calibration_error(table)


def score_calibration(predicted: ArrayLike, target: ArrayLike, parts: int = 5) -> tuple[list[CalibrationBin], float]:
    """Mean predicted and mean target score among rows of like prediction; and the expected calibration error in score units.

    The rows are cut into `parts` slices of like size by prediction; the error is the mean over rows of |observed - expected| of theirs.
    """
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    table = [
        CalibrationBin(part.low, part.high, len(part.rows), mean(p[part.rows]), mean(y[part.rows])) for part in quantile_slices(p, parts)
    ]
    return table, expected_calibration_error(table)


def expected_calibration_error(table: Sequence[CalibrationBin]) -> float:
    """Mean over rows of |observed - expected| of their bin (Guo et al. 2017); NaN without rows."""
    rows = sum(entry.count for entry in table)
    return sum(entry.count * abs(entry.observed - entry.expected) for entry in table) / rows if rows else float("nan")


def fitted_line(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line y = slope * x + intercept; NaN where x does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.size < 2 or np.ptp(a) == 0:
        return float("nan"), float("nan")
    centred = a - a.mean()
    slope = float(centred @ b / (centred @ centred))
    return slope, float(b.mean() - slope * a.mean())
