"""Scored records -> token ids -> batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from common.models.answers import Answer, collate_answers
from common.models.backbone import Entry, RewardBatch, States, as_reward_input
from common.records import ScoreRecord, question_key
from common.score_transform import ScoreTransform
from common.tokenization import Encoder, encode_answers


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
) -> list[ScoreRow]:
    """Tokenize, and put each score on the scale that the loss sees. Raises UserError with a line for each bad row."""
    encoded = encode_answers(encoder, records, unusable_rows)
    targets = transform.apply([record.score for record in records])
    return [
        ScoreRow(
            (as_reward_input(answer, entry),),
            target,
            record.score,
            question_key(record.prompt),
            record.where,
        )
        for record, target, answer in zip(records, targets, encoded, strict=True)
        if answer is not None
    ]


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
