"""Scored records -> token ids -> batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypedDict

import torch
from torch import Tensor

from common.file_records import FileRecords
from common.models.answers import Answer, collate_answers
from common.models.backbone import Entry, RewardBatch, States, as_reward_input
from common.records import ScoreRecord, question_key
from common.score_transform import ScoreTransform
from common.token_rows import TokenCache, TokenIds, stored_rows
from common.tokenization import Encoded, Encoder, encode_answers


@dataclass(frozen=True)
class ScoreRow:
    """One question with one answer. `target`: its score on the transformed scale; `score`: as it stands in the data.

    Rows with the same (normalised) `question` belong together.
    """

    answers: tuple[Answer]
    target: float
    score: float
    question: str
    where: str = ""
    weight = 1.0

    @property
    def length(self) -> int:
        return self.answers[0].length


class ScoreBatch(TypedDict):
    """B rows."""

    inputs: RewardBatch | States
    """Ids and masks, or states that were computed before."""
    target: Tensor
    """(B,): scores on the transformed scale."""
    weight: Tensor
    """(B,): 1, or 0 for rows that only fill up a process's batch."""
    index: Tensor
    """(B,): places in the data set."""
    denominator: float
    """What the summed loss is divided by."""
    tokens: int
    """Tokens without padding."""
    where: list[str]
    """Places in the data file, for error messages."""


def encode_scores(
    records: Sequence[ScoreRecord],
    encoder: Encoder,
    entry: Entry,
    transform: ScoreTransform,
    unusable_rows: Literal["error", "drop"] = "error",
    cache: TokenCache | None = None,
    split: str = "",
) -> Sequence[ScoreRow]:
    """Tokenize, and put each score on the scale that the loss sees. Raises UserError with a line for each bad row.

    cache: for the ids of records that stay in their file, of this split; without one all rows are in memory.
    """
    make = partial(_score_row, entry=entry, transform=transform)
    if cache is not None and isinstance(records, FileRecords):
        return stored_rows(partial(_stored_row, make), encoder, records, cache, split, unusable_rows)
    encoded = encode_answers(encoder, records, unusable_rows)
    return [make(record, answer) for record, answer in zip(records, encoded, strict=True) if answer is not None]


def _score_row(record: ScoreRecord, answer: Encoded, *, entry: Entry, transform: ScoreTransform) -> ScoreRow:
    [target] = transform.apply([record.score])
    return ScoreRow((as_reward_input(answer, entry),), target, record.score, question_key(record.prompt), record.where)


def _stored_row(make: Callable[..., ScoreRow], ids: TokenIds, records: Sequence[ScoreRecord], row: int) -> ScoreRow:
    return make(records[row], ids.answers(row)[0])


def collate_scores(
    rows: Sequence[ScoreRow], indices: Sequence[int], pad_id: int, denominator: float, pad_to: int | None = None, counted: bool = True
) -> ScoreBatch:
    """Pad to the longest row, or to `pad_to`. `counted`: False for rows that only fill up a rank's batch."""
    return ScoreBatch(
        inputs=collate_answers([row.answers[0] for row in rows], pad_id, pad_to),
        target=torch.tensor([row.target for row in rows]),
        weight=torch.full((len(rows),), float(counted)),
        index=torch.tensor(list(indices)),
        denominator=denominator,
        tokens=sum(row.length for row in rows),
        where=[row.where for row in rows],
    )
