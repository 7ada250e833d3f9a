"""Scored answers -> preference pairs: within a question, the better-scored answer is chosen and worse ones are rejected.

`best`: the best answer of a question against each worse one, in one row, so that a question counts once in the loss and what is chosen
is worth imitating. `all`: every answer against each worse one, as Ouyang et al. (2022) compare rankings, a row per chosen answer: more
to learn about middling answers, more noise where votes are few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.record_types import PairRecord, ScoreRecord, question_key


@dataclass(frozen=True)
class Pairing:
    """Which pairs are made. `min_gap`: the least difference of scores (0: any); `margin`: write the difference into each pair's margin,
    which gives each pair a row of its own.
    """

    which: Literal["best", "all"] = "best"
    min_gap: float = 0.0
    margin: bool = False


def pairs_of(records: Sequence[ScoreRecord], pairing: Pairing, dropped: Counter[str], left_out: Counter[str]) -> list[PairRecord]:
    """The pairs of each question, in the order of the questions.

    `dropped` counts what a row of several answers has no place for: columns in which they differ, and their scores. `left_out` counts
    questions without a pair.
    """
    questions: dict[str, list[ScoreRecord]] = {}
    for record in records:
        questions.setdefault(question_key(record.prompt), []).append(record)
    pairs: list[PairRecord] = []
    for answers in questions.values():
        ranked = sorted(answers, key=lambda answer: -answer.score)  # stable: of equal scores the first in the file is chosen
        common = {key: value for key, value in ranked[0].columns.items() if all(_has(answer, key, value) for answer in answers)}
        made = [pair for chosen in (ranked if pairing.which == "all" else ranked[:1]) for pair in _pairs(chosen, ranked, common, pairing)]
        pairs += made
        if made:
            dropped.update(["score", *{key for answer in answers for key in answer.columns if key not in common}])
        else:
            left_out["one answer only" if len(answers) == 1 else "no two answers far enough apart in their scores"] += 1
    return pairs


def _has(answer: ScoreRecord, key: str, value: object) -> bool:
    return key in answer.columns and answer.columns[key] == value


def _pairs(chosen: ScoreRecord, ranked: Sequence[ScoreRecord], columns: dict[str, object], pairing: Pairing) -> list[PairRecord]:
    """`chosen` against every answer that is worse by enough: one record, or one per pair where each has its margin."""
    worse = [
        (answer.answer, chosen.score - answer.score)
        for answer in ranked
        if _apart(chosen.score - answer.score, pairing.min_gap) and answer.answer.strip() != chosen.answer.strip()
    ]
    if pairing.margin:
        return [PairRecord(chosen.prompt, chosen.answer, (text,), float(f"{gap:.9g}"), columns, chosen.where) for text, gap in worse]
    rejected = tuple(dict.fromkeys(text for text, _ in worse))
    return [PairRecord(chosen.prompt, chosen.answer, rejected, None, columns, chosen.where)] if rejected else []


def _apart(difference: float, min_gap: float) -> bool:
    return difference > 0 and difference >= min_gap * (1 - 1e-9)  # 0.3 - 0.2 is a little less than 0.1
