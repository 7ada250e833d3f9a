"""The three splits of a data set: how validation is taken from train, what overlaps, and the fingerprint of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from common.json_rows import SPLITS, SplitName
from common.record_types import PairRecord, PromptRecord, Record, ScoreRecord, SFTRecord, question_key

R = TypeVar("R", SFTRecord, ScoreRecord, PairRecord, PromptRecord)


@dataclass(frozen=True)
class Splits(Generic[R]):
    """Validated rows by split. `fingerprint` is a SHA-256 over all of them; `notes` are lines a user should see."""

    train: list[R]
    val: list[R]
    test: list[R]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def split(self, name: SplitName) -> list[R]:
        """The rows of a split by its name."""
        rows: dict[str, list[R]] = {"train": self.train, "val": self.val, "test": self.test}
        return rows[name]


def hold_out(rows: list[Any], percentage: float, seed: int, path: str) -> tuple[list[Any], list[Any], list[str]]:
    """Move a share of the questions from train to val; which ones depends on the seed and on the questions, not on their order."""

    def rank(key: str) -> str:
        return hashlib.sha256(f"{seed}\x1f{key}".encode()).hexdigest()

    keys = [question_key(row.prompt) for row in rows]
    questions = sorted(set(keys), key=rank)
    if len(questions) < 2:
        return rows, [], [f"{path}: too few questions ({len(questions)}) to hold any out for validation"] if rows else []
    count = min(max(1, round(len(questions) * percentage / 100)), len(questions) - 1)
    held = set(questions[:count])
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    val = [row for row, key in zip(rows, keys, strict=True) if key in held]
    note = f"{path}: no val split: {count} of {len(questions)} train questions ({len(val)} of {len(rows)} rows) held out for validation"
    return train, val, [note]


def overlap_notes(path: str, rows: Mapping[SplitName, list[Any]]) -> Iterator[str]:
    train = {question_key(row.prompt) for row in rows["train"]}
    for split in SPLITS[1:]:
        questions = {question_key(row.prompt) for row in rows[split]}
        shared = len(questions & train)
        if shared:
            yield f"{path}: {shared} of {len(questions)} {split} questions occur in train too: figures on them flatter the model"


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


def fingerprint(rows: Mapping[SplitName, list[Any]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(rows[split])}\n".encode())
        for record in rows[split]:
            # columns of a hub data set may hold values that are no JSON (dates, images): their text stands for them
            digest.update(json.dumps(record_to_json(record), sort_keys=True, default=str).encode())
    return digest.hexdigest()
