"""The formats of rows, told apart by their keys, and what to say about keys that make none.

| format           | keys                                                                    | suits                         |
|------------------|-------------------------------------------------------------------------|-------------------------------|
| qa               | Question, Answer                                                        | SFT                           |
| qa_score         | Question, Answer, Score                                                 | reward_model/regression       |
| qa_pair          | Question, Accepted_Answer, Answer (the rejected one, or several)        | reward_model/classification   |
| instruction      | instruction, [context,] response                                        | SFT                           |
| instruction_pair | instruction, [context,] chosen, rejected                                | reward_model/classification   |
| prompt_pair      | prompt, chosen, rejected                                                | reward_model/classification   |
| hh               | chosen, rejected: whole dialogues that differ in the last answer; text  | reward_model/classification   |
|                  | before the first turn (a system prompt) is the context                  |                               |
| prompt           | prompt (also Question or instruction alone)                             | PPO                           |

Rows that hold more than a stage needs serve it too: each of them can be a prompt, and SFT reads rows with and without a score from one
file. `context` is read beside every question, `margin` (or `Margin`) beside every pair. A question in the transcript form of hh-rlhf
becomes a dialogue of several turns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.json_rows import readable, shown
from common.record_types import RecordKind


@dataclass(frozen=True)
class RowFormat:
    """A set of keys that makes a row: where each part of a record is found."""

    name: str
    kind: RecordKind
    question: str | None
    answer: str | None = None
    score: str | None = None
    chosen: str | None = None
    rejected: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        keys = (self.question, self.chosen, self.answer, self.rejected, self.score)
        return tuple(key for key in keys if key is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        context = (CONTEXT,) if self.question else ()
        return (*context, *MARGIN) if self.kind == "pair" else context


CONTEXT = "context"
MARGIN = ("margin", "Margin")

FORMATS: tuple[RowFormat, ...] = (
    RowFormat("qa", "sft", "Question", answer="Answer"),
    RowFormat("qa_score", "score", "Question", answer="Answer", score="Score"),
    RowFormat("qa_pair", "pair", "Question", chosen="Accepted_Answer", rejected="Answer"),
    RowFormat("instruction", "sft", "instruction", answer="response"),
    RowFormat("instruction_pair", "pair", "instruction", chosen="chosen", rejected="rejected"),
    RowFormat("prompt_pair", "pair", "prompt", chosen="chosen", rejected="rejected"),
    RowFormat("hh", "pair", None, chosen="chosen", rejected="rejected"),
    RowFormat("prompt", "prompt", "prompt"),
    RowFormat("question_only", "prompt", "Question"),
    RowFormat("instruction_only", "prompt", "instruction"),
)
KNOWN_KEYS: tuple[str, ...] = tuple(dict.fromkeys([*(key for form in FORMATS for key in form.required), CONTEXT, *MARGIN]))

SUITS: dict[RecordKind, str] = {
    "sft": "SFT (sft/)",
    "score": "reward_model/regression",
    "pair": "reward_model/classification",
    "prompt": "PPO (rlhf/)",
}
# A score row is also a question with an answer; a pair row is not one, since its `Answer` is the worse of two.
_SERVES: dict[RecordKind, tuple[RecordKind, ...]] = {
    "sft": ("sft", "score"),
    "score": ("score",),
    "pair": ("pair",),
    "prompt": ("prompt", "sft", "score", "pair"),
}


def _fold(key: str) -> str:
    return re.sub(r"[\s_-]", "", key).casefold()


def _meant(key: str, candidates: Sequence[str]) -> str | None:
    """The candidate that is `key` in other letters or with a slip."""
    for candidate in candidates:
        if _fold(candidate) == _fold(key):
            return candidate
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[close[0]] if close else None


def find_format(keys: Sequence[str], kind: RecordKind) -> RowFormat | None:
    """The format whose keys a row holds: the one with most of them, where equal the one that serves `kind`. None: no format fits."""
    fitting = [form for form in FORMATS if all(key in keys for key in form.required)]
    return max(fitting, key=lambda form: (len(form.required), form.kind in _SERVES[kind]), default=None)


def serves(form: RowFormat, kind: RecordKind) -> bool:
    """Whether rows of this format can be read as records of `kind`."""
    return form.kind in _SERVES[kind]


def read_alike(one: RowFormat, other: RowFormat, kind: RecordKind) -> bool:
    """Whether rows of both formats can stand in one file: what a record of `kind` is made of has the same keys in both.

    A score beside the answer is nothing to SFT and to PPO, so that rows with and without one are alike there.
    """
    if kind == "score":
        return one is other
    return all(getattr(one, part) == getattr(other, part) for part in ("question", "answer", "chosen", "rejected"))


def _names(form: RowFormat) -> str:
    return "/".join(form.required)


def explain_keys(keys: Sequence[str], kind: RecordKind) -> list[str]:
    """One `key: got, expected` line for each key that keeps a row from being a record of `kind`."""
    usable = [form for form in FORMATS if serves(form, kind)]
    missing = {form.name: [key for key in form.required if key not in keys] for form in usable}
    free = [key for key in keys if key not in KNOWN_KEYS]
    slips = {name: {key: _meant(key, free) for key in lacking} for name, lacking in missing.items()}

    def closeness(form: RowFormat) -> tuple[bool, float]:
        held = len(form.required) - len(missing[form.name])
        meant = sum(found is not None for found in slips[form.name].values())
        return held + meant == len(form.required), (held + meant) / len(form.required)

    best = max(usable, key=closeness)
    complete, share = closeness(best)
    actual = find_format(keys, kind)
    poorer = actual is not None and actual.kind == "prompt" and share > 0
    if actual is not None and not poorer and not (complete and missing[best.name]):
        return [f"keys: got {_names(actual)}, which suits {SUITS[actual.kind]}; expected {_expected(kind)}{_rename_hint(actual, kind)}"]
    if share == 0:
        listed = ", ".join(shown(key) for key in list(keys)[:8]) or "none"
        return [f"keys: got {listed}, expected {_expected(kind)} (data.columns renames)"]
    suits = f" (the row suits {SUITS[actual.kind]})" if actual is not None else ""
    lines = []
    for key in missing[best.name]:
        found = slips[best.name][key]
        if found:
            lines.append(f"{readable(found)}: got an unknown key, expected {key} (did you mean {key}?)")
        else:
            lines.append(f"{key}: missing, expected it beside {_beside(best, key)}{suits}")
    return lines


def _rename_hint(actual: RowFormat, kind: RecordKind) -> str:
    """How pairs serve SFT after all: by renaming the better answer."""
    if kind != "sft" or actual.kind != "pair" or actual.question is None:
        return ""
    renames = {"Answer": actual.chosen} if actual.question == "Question" else {"response": actual.chosen}
    if actual.question == "prompt":
        renames = {"instruction": "prompt", **renames}
    listed = ", ".join(f"{ours}: {theirs}" for ours, theirs in renames.items())
    return f" (to imitate the better answers: columns: {{{listed}}})"


def _beside(form: RowFormat, key: str) -> str:
    return ", ".join(other for other in form.required if other != key)


def _expected(kind: RecordKind) -> str:
    names = [_names(form) for form in FORMATS if form.kind == kind]
    return " or ".join(names)


def _swap_hint(ours: str, theirs: str, there: Collection[str]) -> str:
    """Where the entry `ours: theirs` of `columns` would make sense the other way round: `there` has the one, and we know the other."""
    return f" (the other way round? columns: {{{theirs}: {ours}}})" if ours in there and theirs in KNOWN_KEYS else ""


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file as records of one kind; `columns` maps our names to the file's."""

    kind: RecordKind
    columns: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        """The row under our names. A column of the file whose name another one takes is kept beside it, as `Answer (file)`, say."""
        if not self.columns:
            return value
        sources = set(self.columns.values())
        row = {ours: value[theirs] for ours, theirs in self.columns.items() if theirs in value}
        for key, item in value.items():
            if key not in sources:
                row[key if key not in row else f"{key} (file)"] = item
        return row

    def check_keys(self, value: dict[str, Any], row: dict[str, Any]) -> tuple[RowFormat | None, list[str]]:
        """The format of a row (`value` under the file's names, `row` under ours), and what is wrong with its keys."""
        may_lack = (CONTEXT, *MARGIN)
        has = ", ".join(shown(key) for key in list(value)[:8]) or "nothing"
        lacking = [
            f"{readable(theirs)}: missing, expected as columns.{ours} says; the row has {has}{_swap_hint(ours, theirs, value)}"
            for ours, theirs in self.columns.items()
            if theirs not in value and ours not in may_lack
        ]
        if lacking:
            return None, lacking
        keys = list(row)
        form = find_format(keys, self.kind)
        if form is None or not serves(form, self.kind):
            return form, explain_keys(keys, self.kind)
        watched = [*form.optional, *(["Accepted_Answer", "chosen", "rejected"] if form.kind != "pair" else [])]
        problems = []
        for key in keys:
            if key in KNOWN_KEYS:
                continue
            slip = next((name for name in watched if _fold(name) == _fold(key) and name not in keys), None)
            if slip:
                problems.append(f"{readable(key)}: unknown key, expected {slip}; keys are read to the letter (did you mean {slip}?)")
        if all(key in row for key in MARGIN) and form.kind == "pair":
            problems.append("Margin: got margin beside it, expected one of the two")
        return form, problems
