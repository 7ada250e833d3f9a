"""Preference records -> token ids -> batches in which chosen and rejected answers are rows of one forward pass."""

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
from common.records import PairRecord, question_key
from common.token_rows import TokenCache, TokenIds, stored_rows
from common.tokenization import Encoded, Encoder, encode_preferences
from reward_model.classification.margins import Margin, pair_margin
from reward_model.config import ClassificationParams


@dataclass(frozen=True)
class PairRow:
    """One question: its chosen answer first, then the K rejected ones, each with the question in front."""

    answers: tuple[Answer, ...]
    margin: Margin
    question: str
    """The normalised question: rows with the same one belong together."""
    where: str = ""
    weight = 1.0
    """What the row counts in the loss: a question counts once, however many of its answers were rejected."""

    @property
    def length(self) -> int:
        """Tokens of its longest answer with the question: what padding depends on."""
        return max(answer.length for answer in self.answers)


class PairBatch(TypedDict):
    """N questions, P pairs, R rows (answers)."""

    inputs: RewardBatch | States
    """R rows of ids and masks, or of states that were computed before."""
    chosen: Tensor
    """(P,): the pair's chosen row of R."""
    rejected: Tensor
    """(P,): the pair's rejected row of R."""
    weight: Tensor
    """(P,): 1 / K for the K pairs of a question, 0 for questions that only fill up a process's batch."""
    margin: Tensor
    """(P,): what is subtracted from chosen - rejected, since the chosen answer is known to be that much better."""
    importance: Tensor
    """(P,): what the pair's loss is multiplied by."""
    question: Tensor
    """(P,): which of the N questions."""
    index: Tensor
    """(N,): their places in the data set."""
    denominator: float
    """What the summed loss is divided by."""
    tokens: int
    """Tokens of the R rows without padding."""
    where: list[str]
    """The N places in the data file, for error messages."""


def encode_pairs(
    records: Sequence[PairRecord],
    encoder: Encoder,
    entry: Entry,
    params: ClassificationParams,
    unusable_rows: Literal["error", "drop"] = "error",
    cache: TokenCache | None = None,
    split: str = "",
) -> Sequence[PairRow]:
    """Tokenize; all answers to a question follow the same, equally cut prompt. Raises UserError with a line for each bad row.

    cache: for the ids of records that stay in their file, of this split; without one all rows are in memory.
    """
    make = partial(_pair_row, entry=entry, params=params)
    if cache is not None and isinstance(records, FileRecords):
        return stored_rows(partial(_stored_row, make), encoder, records, cache, split, unusable_rows)
    encoded = encode_preferences(encoder, records, unusable_rows)
    return [make(record, answers) for record, answers in zip(records, encoded, strict=True) if answers is not None]


def _pair_row(record: PairRecord, answers: Sequence[Encoded], *, entry: Entry, params: ClassificationParams) -> PairRow:
    inputs = tuple(as_reward_input(answer, entry) for answer in answers)
    return PairRow(inputs, pair_margin(record.margin, params), question_key(record.prompt), record.where)


def _stored_row(make: Callable[..., PairRow], ids: TokenIds, records: Sequence[PairRecord], row: int) -> PairRow:
    return make(records[row], ids.answers(row))


def collate_pairs(
    rows: Sequence[PairRow], indices: Sequence[int], pad_id: int, denominator: float, pad_to: int | None = None, counted: bool = True
) -> PairBatch:
    """Lay the answers of all questions under one another. `counted`: False for rows that only fill up a rank's batch."""
    chosen, rejected, weight, margin, importance, question = [], [], [], [], [], []
    answers: list[Answer] = []
    for number, row in enumerate(rows):
        first, count = len(answers), len(row.answers) - 1
        answers += row.answers
        chosen += [first] * count
        rejected += range(first + 1, first + 1 + count)
        weight += [float(counted) / count] * count
        margin += [row.margin.subtracted] * count
        importance += [row.margin.importance] * count
        question += [number] * count
    return PairBatch(
        inputs=collate_answers(answers, pad_id, pad_to),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        weight=torch.tensor(weight),
        margin=torch.tensor(margin),
        importance=torch.tensor(importance),
        question=torch.tensor(question),
        index=torch.tensor(list(indices)),
        denominator=denominator,
        tokens=sum(answer.length for answer in answers),
        where=[row.where for row in rows],
    )
