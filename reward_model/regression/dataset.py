"""Scored records -> token ids -> batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.models.backbone import RewardBatch, RewardInput, collate_rewards
from common.records import ScoreRecord
from common.score_transform import ScoreTransform
from reward_model.inputs import question_key
from reward_model.rows import RowEncoder


@dataclass(frozen=True)
class ScoreRow:
    """One question with one answer. `target`: its score on the transformed scale; `score`: as it stands in the data."""

    answers: tuple[RewardInput]
    target: float
    score: float
    question: Hashable
    weight = 1.0

    @property
    def length(self) -> int:
        return self.answers[0].length


class ScoreBatch(NamedTuple):
    """B rows. target (B,) on the transformed scale; weight (B,): 1, or 0 for rows that only fill up; index (B,): row of the data set."""

    inputs: RewardBatch
    target: Tensor
    weight: Tensor
    index: Tensor
    denominator: float


def encode_scores(records: Sequence[ScoreRecord], encoder: RowEncoder, transform: ScoreTransform) -> list[ScoreRow]:
    """Tokenize, and put each score on the scale that the loss sees."""
    targets = transform.apply([record.score for record in records])
    rows = []
    for record, target in zip(records, targets, strict=True):
        with encoder.unusable_rows():
            answer = encoder.encode(record.prompt, record.answer, record.where)
            rows.append(ScoreRow((answer,), target, record.score, question_key(record.prompt)))
    return rows


def collate_scores(
    rows: Sequence[ScoreRow], indices: Sequence[int], pad_id: int, denominator: float, pad_to: int | None = None, counted: bool = True
) -> ScoreBatch:
    """Pad to the longest row, or to `pad_to`. `counted`: False for rows that only fill up a rank's batch."""
    return ScoreBatch(
        inputs=collate_rewards([row.answers[0] for row in rows], pad_id, pad_to),
        target=torch.tensor([row.target for row in rows]),
        weight=torch.full((len(rows),), float(counted)),
        index=torch.tensor(list(indices)),
        denominator=denominator,
    )
