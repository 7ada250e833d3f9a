"""The rows that an evaluation answers: questions, with the answers that the data gives to them where it gives any."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from common.evaluation.config import EvaluationData
from common.records import PairRecord, Prompt, PromptRecord, SFTRecord, read_rows, source_kind


@dataclass(frozen=True)
class EvaluationRow:
    """A question and the data's answer to it, "" where there is none; `where` names the row in messages."""

    prompt: Prompt
    answer: str
    where: str


@dataclass(frozen=True)
class EvaluationRows:
    """The rows of a split in file order, and what reading them had to say."""

    rows: list[EvaluationRow]
    notes: tuple[str, ...]

    @property
    def has_answers(self) -> bool:
        return any(row.answer for row in self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of questions and answers."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.prompt.question, row.prompt.context, row.prompt.history, row.answer]).encode())
        return digest.hexdigest()


def evaluation_rows(data: EvaluationData, seed: int) -> EvaluationRows:
    """The split that `data` names, from files of answers, of pairs (the preferred answer counts) or of questions alone.

    Raises UserError with the problems of the data.
    """
    kind = source_kind(data.data_dir, data.columns, setting="data.data_dir")
    splits = read_rows(data.data_dir, "sft" if kind == "score" else kind, data, seed=seed, require=(data.split,))
    records = splits.split(data.split)[: data.max_rows]
    return EvaluationRows([EvaluationRow(record.prompt, _answer(record), record.where) for record in records], splits.notes)


def _answer(record: SFTRecord | PairRecord | PromptRecord) -> str:
    if isinstance(record, SFTRecord):
        return record.answer
    return record.chosen if isinstance(record, PairRecord) else ""
