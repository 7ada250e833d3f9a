"""Results of validation over exactly the rows there are, however many processes made them."""

from __future__ import annotations

from typing import Any

from torch import distributed


class Gathered:
    """Results of validation rows by their index. Rows that several processes saw (to have batches alike) count once."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def add(self, index: int, result: Any) -> None:
        self._rows[index] = result

    def by_index(self) -> dict[int, Any]:
        """Everything that all processes added, in the order of the data. Every process must call this."""
        rows = self._rows
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, rows)
            rows = {index: result for part in parts for index, result in part.items()}
        return dict(sorted(rows.items()))

    def rows(self) -> list[Any]:
        return list(self.by_index().values())
