"""What the loss makes of a row's `margin`, by how much its chosen answer is better. No torch: rows are checked before it is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from common.problem_lines import RowFault, fault_lines, raise_problems
from common.records import PairRecord, Splits
from reward_model.config import ClassificationParams


class Margin(NamedTuple):
    """`subtracted` from chosen - rejected (Touvron et al. 2023, eq. 2); `importance`: factor of the pair's loss (Wang et al. 2024)."""

    subtracted: float = 0.0
    importance: float = 1.0


def pair_margin(margin: float | None, params: ClassificationParams) -> Margin:
    """How a pair of this margin enters the loss; without one, as any pair does."""
    if margin is None or params.margin_use == "ignore":
        return Margin()
    scaled = params.margin_scale * margin
    return Margin(subtracted=scaled) if params.margin_use == "subtract" else Margin(importance=scaled)


def check_margins(splits: Splits[PairRecord], params: ClassificationParams) -> list[str]:
    """Notes on margins that change nothing. Raises UserError, a line per row, where a margin cannot weigh its pair."""
    if params.margin_use == "weigh":
        problem = f"margin: got {{}}, expected a number >= 0, since model_params.margin_use is {params.margin_use}"
        bad = [rows[place] for rows in (splits.train, splits.val) for place, margin in enumerate(_margins(rows)) if margin < 0]
        raise_problems(fault_lines([RowFault.at(row.where, problem.format(f"{row.margin:g}")) for row in bad]))
    given, rows = sum(not math.isnan(margin) for margin in _margins(splits.train)), len(splits.train)
    settings = [f"model_params.{name}" for name in ("margin_use", "margin_scale") if name in params.model_fields_set]
    if not given and settings:
        return [f"{' and '.join(settings)}: no effect, since no row of train has a margin"]
    if 0 < given < rows and params.margin_use != "ignore":
        return [f"{given:,} of {rows:,} rows of train have a margin; the others are read as pairs without one"]
    return []


def _margins(rows: Sequence[PairRecord]) -> Sequence[float]:
    """The rows' margins, NaN where there is none."""
    if isinstance(rows, list):
        return [math.nan if row.margin is None else row.margin for row in rows]
    return rows.values  # type: ignore[attr-defined, no-any-return]  # those of a large file
