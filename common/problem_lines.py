"""What is wrong with rows, as lines that can be read: the same fault of many rows is one line, and there are never more than twenty."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import UserError
from common.json_rows import SPLITS

MAX_LINES = 20
SHOWN_ROWS = 3
# `got "1" (text), expected a number`: the value differs from row to row, the fault does not.
_VALUE = re.compile(r"got (?P<value>.*) \((?P<type>text|a number|a list|an object)\), expected", re.DOTALL)


@dataclass(frozen=True)
class RowFault:
    """A fault of one row. `place`: file and split; `row` counts from 1 within it, `line` within the file, where that is known."""

    place: str
    row: int
    problem: str
    line: int | None = None

    @classmethod
    def at(cls, where: str, problem: str) -> RowFault:
        """The fault of a record, whose `where` is `FILE: SPLIT row N`."""
        place, _, row = where.rpartition(" row ")
        return cls(place, int(row), problem)


def fault_lines(faults: Iterable[RowFault]) -> list[str]:
    """A line per fault, in the order of their first rows: `FILE: train rows 3, 7, 9 and 17 more, val row 2: Answer: got empty text, …`."""
    groups: dict[tuple[str, str], list[RowFault]] = {}
    for fault in faults:
        file, _, split = fault.place.rpartition(": ")
        where = file if split in SPLITS else fault.place
        groups.setdefault((where, _VALUE.sub(r"got \g<type>, expected", fault.problem)), []).append(fault)
    return [_line(group) for group in groups.values()]


def _line(group: Sequence[RowFault]) -> str:
    first = group[0]
    problem = first.problem
    if any(fault.problem != problem for fault in group):
        problem = _VALUE.sub(rf"got \g<type> (\g<value> in row {first.row}), expected", problem)
    places: dict[str, list[RowFault]] = {}
    for fault in group:
        places.setdefault(fault.place, []).append(fault)
    others = [f"{place.rpartition(': ')[2]} {_rows(own)}" for place, own in places.items() if place != first.place]
    return f"{', '.join([f'{first.place} {_rows(places[first.place])}', *others])}: {problem}"


def _rows(group: Sequence[RowFault]) -> str:
    """`rows 3, 7, 9 and 17 more`, of one place."""
    first = group[0]
    rows = list(dict.fromkeys(fault.row for fault in group))
    if len(rows) == 1:
        return f"row {rows[0]}" + (f" (line {first.line})" if first.line is not None else "")
    shown = [str(row) for row in rows[:SHOWN_ROWS]]
    last = shown.pop() if len(rows) == len(shown) else f"{len(rows) - len(shown)} more"
    at = f" (from line {first.line} on)" if first.line not in (None, first.row) else ""
    return f"rows {', '.join(shown)} and {last}{at}"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise UserError where there are any: the first twenty, and how many more there are."""
    if problems:
        more = len(problems) - MAX_LINES
        rest = [f"... and {more} more {'problem' if more == 1 else 'problems'}"] if more > 0 else []
        raise UserError(*problems[:MAX_LINES], *rest)
