"""Preference records -> token ids -> batches in which chosen and rejected answers are rows of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.models.backbone import RewardBatch, RewardInput, collate_rewards
from common.records import PairRecord
from reward_model.rows import RowEncoder


@dataclass(frozen=True)
class PairRow:
    """One question: its chosen answer first, then the K rejected ones, each with the question in front."""

    answers: tuple[RewardInput, ...]
    margin: float
    weight = 1.0
    """What the row counts in the loss: a question counts once, however many of its answers were rejected."""

    @property
    def length(self) -> int:
        """Tokens of its longest answer with the question: what padding depends on."""
        return max(answer.length for answer in self.answers)


class PairBatch(NamedTuple):
    """N questions, P pairs, R rows (answers).

    inputs: R rows. chosen, rejected: index of the row, (P,). weight (P,): 1 / K for the K pairs of a question. margin (P,).
    index (N,): the question of the data set; question (P,): which of the N. denominator: what the summed loss is divided by.
    """

    inputs: RewardBatch
    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    margin: Tensor
    question: Tensor
    index: Tensor
    denominator: float


def encode_pairs(records: Sequence[PairRecord], encoder: RowEncoder) -> list[PairRow]:
    """Tokenize. A rejected answer that is cut to the same tokens as the chosen one teaches nothing and is unusable."""
    rows = []
    for record in records:
        with encoder.unusable_rows():
            chosen = encoder.encode(record.prompt, record.chosen, record.where)
            rejected = [encoder.encode(record.prompt, answer, record.where) for answer in record.rejected]
            if chosen in rejected:
                raise UserError(f"{record.where}: chosen and rejected answer have the same tokens (equal, or cut to be so by max_length)")
            rows.append(PairRow((chosen, *rejected), record.margin or 0.0))
    return rows


def collate_pairs(
    rows: Sequence[PairRow], indices: Sequence[int], pad_id: int, denominator: float, pad_to: int | None = None, counted: bool = True
) -> PairBatch:
    """Lay the answers of all questions under one another. `counted`: False for rows that only fill up a rank's batch."""
    chosen, rejected, weight, margin, question = [], [], [], [], []
    answers: list[RewardInput] = []
    for number, row in enumerate(rows):
        first, count = len(answers), len(row.answers) - 1
        answers += row.answers
        chosen += [first] * count
        rejected += range(first + 1, first + 1 + count)
        weight += [float(counted) / count] * count
        margin += [row.margin] * count
        question += [number] * count
    return PairBatch(
        inputs=collate_rewards(answers, pad_id, pad_to),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        weight=torch.tensor(weight),
        margin=torch.tensor(margin),
        question=torch.tensor(question),
        index=torch.tensor(list(indices)),
        denominator=denominator,
    )
