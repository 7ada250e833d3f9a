"""Encoded rows, and the tensors of a planned batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.batching import Batch
from common.collate import IGNORED, in_lines, packed_batch, sft_batch
from common.models.answers import StartedAnswer, entering_states
from common.tokenization import Encoded


@dataclass(frozen=True)
class SFTRows:
    """Rows of prompt and answer ids; called with a planned batch, gives its tensors.

    `pad_to`: pad every row to this length (static shapes). `capacity`: pack rows end to end in lines of so many tokens. `started`: the
    rows with the states that enter the lowest layer that trains, where these are known.
    """

    rows: Sequence[Encoded]
    pad_id: int
    pad_to: int | None = None
    capacity: int | None = None
    is_encoder_decoder: bool = False
    started: Sequence[StartedAnswer] | None = None

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """`input_ids`, masks and `labels` (B, S); `denominator`: what the summed loss is divided by; `tokens`: how many are no padding.

        `entering` (B, S, D): states that enter the lowest layer that trains, where they are known.
        """
        rows = [self.rows[index] for index in batch.indices]
        if self.capacity is not None:
            tensors = packed_batch(rows, self.pad_id, self.capacity, self.pad_to)
        else:
            tensors = sft_batch(rows, self.pad_id, self.pad_to, self.is_encoder_decoder)
        if self.started is not None:
            tensors["entering"] = self._entering([self.started[index] for index in batch.indices], rows)
        if batch.filler:
            tensors["labels"].fill_(IGNORED)
        tokens = sum(row.length for row in rows)
        return {**tensors, "denominator": batch.denominator, "tokens": tokens, "rows": batch.indices}

    def _entering(self, started: Sequence[StartedAnswer], rows: Sequence[Encoded]) -> Tensor:
        lines = [[row] for row in rows] if self.capacity is None else in_lines(rows, self.capacity)
        return entering_states(started, [sum(row.length for row in line) for line in lines], self.pad_to)
