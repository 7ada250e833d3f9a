"""What a row of data is, once validated: a prompt and what belongs to it. Later stages see these and no files."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

RecordKind = Literal["sft", "score", "pair", "prompt"]


@dataclass(frozen=True)
class Prompt:
    """What is asked: a question, text that belongs to it, and earlier (question, answer) turns, oldest first."""

    question: str
    context: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SFTRecord:
    """A question and the answer to imitate. `columns` are the row's other columns; `where` is `FILE: SPLIT row N`."""

    prompt: Prompt
    answer: str
    columns: dict[str, Any]
    where: str


@dataclass(frozen=True)
class ScoreRecord:
    """A question, one answer and its score (any finite number, more is better)."""

    prompt: Prompt
    answer: str
    score: float
    columns: dict[str, Any]
    where: str


@dataclass(frozen=True)
class PairRecord:
    """A question, the preferred answer and one or several worse ones; `margin` says by how much it is preferred, where known."""

    prompt: Prompt
    chosen: str
    rejected: tuple[str, ...]
    margin: float | None
    columns: dict[str, Any]
    where: str


@dataclass(frozen=True)
class PromptRecord:
    """A question alone."""

    prompt: Prompt
    columns: dict[str, Any]
    where: str


Record = SFTRecord | ScoreRecord | PairRecord | PromptRecord


def normalise_question(text: str) -> str:
    """The form in which two questions count as the same: compatible characters, case and white space folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_key(prompt: Prompt) -> str:
    """The normalised question with its context and earlier turns: rows with the same key never stand on both sides of a split."""
    parts = [text for turn in prompt.history for text in turn]
    return "\x1f".join(normalise_question(part) for part in (*parts, prompt.question, prompt.context))


def question_digest(prompt: Prompt, seed: int) -> int:
    """Eight bytes that stand for a question (`question_key`); their order is a random one of the questions, drawn by `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{question_key(prompt)}".encode()).digest()[:8], "big")
