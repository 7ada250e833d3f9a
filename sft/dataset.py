"""Encoded rows, and the tensors of a planned batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.batching import Batch
from common.collate import IGNORED, packed_batch, sft_batch
from common.tokenization import Encoded


@dataclass(frozen=True)
class SFTRows:
    """Rows of prompt and answer ids; called with a planned batch, gives its tensors.

    `pad_to`: pad every row to this length (static shapes). `capacity`: pack rows end to end in lines of so many tokens.
    """

    rows: Sequence[Encoded]
    pad_id: int
    pad_to: int | None = None
    capacity: int | None = None
    is_encoder_decoder: bool = False

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """`input_ids`, masks and `labels` (B, S); `denominator`: what the summed loss is divided by; `tokens`: how many are no padding."""
        rows = [self.rows[index] for index in batch.indices]
        if self.capacity is not None:
            tensors = packed_batch(rows, self.pad_id, self.capacity, self.pad_to)
        else:
            tensors = sft_batch(rows, self.pad_id, self.pad_to, self.is_encoder_decoder)
        if batch.filler:
            tensors["labels"].fill_(IGNORED)
        tokens = sum(row.length for row in rows)
        return {**tensors, "denominator": batch.denominator, "tokens": tokens, "rows": batch.indices}
