"""The three splits of a data set: how validation is taken from train, what overlaps, and the fingerprint of it all.

Records are in a list or, those of a large file, a `FileRecords`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from common.json_rows import SPLITS, SplitName
from common.record_types import PairRecord, PromptRecord, Record, ScoreRecord, SFTRecord, question_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

R = TypeVar("R", SFTRecord, ScoreRecord, PairRecord, PromptRecord)


@dataclass(frozen=True)
class Splits(Generic[R]):
    """Validated rows by split, in memory or in their file. `fingerprint`: a SHA-256 over them; `notes`: lines a user should see."""

    train: Sequence[R]
    val: Sequence[R]
    test: Sequence[R]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def split(self, name: SplitName) -> Sequence[R]:
        """The rows of a split by its name."""
        rows: dict[str, Sequence[R]] = {"train": self.train, "val": self.val, "test": self.test}
        return rows[name]

    @property
    def counts(self) -> str:
        """`19 train, 6 val, 0 test`."""
        return ", ".join(f"{len(self.split(name)):,} {name}" for name in SPLITS)


def hold_out(rows: Sequence[Any], percentage: float, seed: int, path: str) -> tuple[Sequence[Any], Sequence[Any], list[str]]:
    """Move a share of the questions from train to val; which ones depends on the seed and on the questions, not on their order."""
    questions = _questions(rows, seed)
    if len(questions) < 2:
        return rows, [], [f"{path}: too few questions ({len(questions)}) to hold any out for validation"] if len(rows) else []
    count = min(max(1, round(len(questions) * percentage / 100)), len(questions) - 1)
    last = questions[count - 1]
    if isinstance(rows, list):
        held = [question_digest(row.prompt, seed) <= last for row in rows]
        train, val = ([row for row, is_held in zip(rows, held, strict=True) if is_held is part] for part in (False, True))
    else:
        streamed: Any = rows
        train, val = streamed.where_question(lambda asked: asked > last), streamed.where_question(lambda asked: asked <= last)
    note = f"{path}: no val split: {count} of {len(questions)} train questions ({len(val)} of {len(rows)} rows) held out for validation"
    return train, val, [note]


def overlap_notes(path: str, rows: Mapping[SplitName, Sequence[Any]], seed: int) -> Iterator[str]:
    train = _questions(rows["train"], seed)
    for split in SPLITS[1:]:
        questions = _questions(rows[split], seed)
        shared = _shared(questions, train)
        if shared:
            yield f"{path}: {shared} of {len(questions)} {split} questions occur in train too: figures on them flatter the model"


def _questions(rows: Sequence[Any], seed: int) -> Sequence[int] | NDArray[Any]:
    """Digests of the questions of a split, each once, in rising order."""
    if isinstance(rows, list):
        return sorted({question_digest(row.prompt, seed) for row in rows})
    from common.file_records import distinct_questions

    return distinct_questions(rows)


def _shared(one: Any, other: Any) -> int:
    """How many of two splits' questions are the same."""
    if isinstance(one, list) and isinstance(other, list):
        return len(set(one) & set(other))
    from common.file_records import shared_questions

    return shared_questions(one, other)


def record_to_json(record: Record) -> dict[str, Any]:
    """A record's content as plain JSON values, without its place in a file."""
    prompt = {
        "question": record.prompt.question,
        "context": record.prompt.context,
        "history": [list(turn) for turn in record.prompt.history],
    }
    parts: dict[str, Any] = {"prompt": prompt, "columns": record.columns}
    if isinstance(record, SFTRecord | ScoreRecord):
        parts["answer"] = record.answer
    if isinstance(record, ScoreRecord):
        parts["score"] = record.score
    if isinstance(record, PairRecord):
        parts |= {"chosen": record.chosen, "rejected": list(record.rejected), "margin": record.margin}
    return parts


def fingerprint(rows: Mapping[SplitName, Sequence[Any]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(rows[split])}\n".encode())
        if isinstance(rows[split], list):
            for record in rows[split]:
                digest.update(_canonical([record]))
            continue
        from common.parallel import in_stretches

        streamed: Any = rows[split]
        for stretch in in_stretches(_canonical, streamed, sizes=streamed.sizes):
            digest.update(stretch)
    return digest.hexdigest()


def _canonical(records: Sequence[Any]) -> bytes:
    # columns of a hub data set may hold values that are no JSON (dates, images): their text stands for them
    return b"".join(json.dumps(record_to_json(record), sort_keys=True, default=str).encode() for record in records)
