"""Work shared out among processes, and its results over exactly the things there are, however many processes made them."""

from __future__ import annotations

from typing import Any

from torch import distributed


def own_share(count: int) -> range:
    """Which of `count` things are this process's: every n-th where n processes have met, all of them in one that is alone."""
    return range(distributed.get_rank(), count, distributed.get_world_size()) if _met() else range(count)


class Gathered:
    """Results by the index of what they are of, each of one process."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def add(self, index: int, result: Any) -> None:
        self._rows[index] = result

    def by_index(self) -> dict[int, Any]:
        """Everything that all processes added, in the order of the data. Every process must call this."""
        rows = self._rows
        if _met():
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, rows)
            rows = {index: result for part in parts for index, result in part.items()}
        return dict(sorted(rows.items()))

    def rows(self) -> list[Any]:
        return list(self.by_index().values())


def _met() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
