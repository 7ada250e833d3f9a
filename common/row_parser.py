"""One row whose format is known -> its record, or everything that is wrong with its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from common.json_rows import readable, shown
from common.record_types import PairRecord, Prompt, PromptRecord, Record, RecordKind, ScoreRecord, SFTRecord
from common.row_formats import CONTEXT, MARGIN, RowFormat
from common.transcripts import HUMAN, before_transcript, is_transcript, prompt_of_turns, transcript_prompt, transcript_turns

MAX_NESTING = 64
_UNFIT = re.compile("[\x00\ud800-\udfff]")
REPLACEMENT = "\ufffd"
UNFIT = "NUL characters and halves of surrogate pairs"


@dataclass
class RowProblems:
    """What is wrong with a row: `errors` always end the reading; `unusable` reasons let the row be dropped where that is asked for.

    `mended`: keys of texts in which a character that no text should hold was replaced by U+FFFD.
    """

    errors: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.errors or self.unusable)


def _kind_of(value: Any) -> str:
    for types, name in ((bool, "true or false"), (type(None), "null"), (int | float, "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, types):
            return name
    return "text"


def got(value: Any) -> str:
    """A value as a message shows it: `"1" (text)`."""
    if value is None or isinstance(value, bool):
        return shown(value)
    return f"{shown(value)} ({_kind_of(value)})"


def _mended_text(text: str) -> str:
    if text.isascii() and "\0" not in text:  # quicker by far than the search
        return text
    return _UNFIT.sub(REPLACEMENT, text)


def _mended(value: Any) -> Any:
    """A column's value with every unfit character in its texts and keys replaced."""
    if isinstance(value, dict):
        return {_mended_text(key): _mended(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return _mended_text(value) if isinstance(value, str) else value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested too deeply to be stored; walks without recursion."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [part for parts in inner for part in parts]
    return bool(level)


def read_row(form: RowFormat, kind: RecordKind, row: dict[str, Any], where: str) -> tuple[Record | None, RowProblems]:
    """The record of a row whose keys fit `form`, or what is wrong with it."""
    return _RowParser(form, row, where).record(kind)


class _RowParser:
    def __init__(self, form: RowFormat, row: dict[str, Any], where: str) -> None:
        self.form, self.row, self.where = form, row, where
        self.problems = RowProblems()

    def record(self, kind: RecordKind) -> tuple[Record | None, RowProblems]:
        make: dict[RecordKind, Callable[[], Record | None]] = {
            "sft": self._sft,
            "score": self._score,
            "pair": self._pair,
            "prompt": self._prompt_only,
        }
        used = _used_keys(self.form, kind)
        self.columns = self._columns({key: value for key, value in self.row.items() if key not in used})
        made = make[kind]()
        return (None if self.problems else made), self.problems

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _columns(self, given: dict[str, Any]) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for key, value in given.items():
            if _is_deep(value):
                self.problems.errors.append(f"{readable(key)}: got nesting deeper than {MAX_NESTING}, expected plain values")
                continue
            name, mended = _mended_text(key), _mended(value)
            if name in columns:
                self.problems.errors.append(f"{readable(key)}: got a key that is another one's, once {UNFIT} are replaced")
            if (name, mended) != (key, value):
                self.problems.mended.append(name)
            columns[name] = mended
        return columns

    def _text(self, key: str, value: Any, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            self.problems.errors.append(f"{key}: got {got(value)}, expected text")
            return ""
        text = _mended_text(value)
        if text != value:
            self.problems.mended.append(key)
        if not may_be_empty and not text.strip():
            self.problems.unusable.append(f"{key}: got empty text, expected some")
        return text

    def _prompt(self) -> Prompt:
        assert self.form.question is not None
        key = self.form.question
        before = len(self.problems.errors) + len(self.problems.unusable)
        text = self._text(key, self.row[key])
        context = self.row.get(CONTEXT)
        context = "" if context is None else self._text(CONTEXT, context, may_be_empty=True)
        if not is_transcript(text) or len(self.problems.errors) + len(self.problems.unusable) > before:
            return Prompt(text, context if context.strip() else "")
        try:
            prompt = transcript_prompt(text)
        except ValueError as error:
            self.problems.unusable.append(f"{key}: {error}")
            return Prompt(text)
        if not prompt.question.strip():
            self.problems.unusable.append(f"{key}: got a dialogue whose last question is empty, expected some text")
        return Prompt(prompt.question, context if context.strip() else "", prompt.history)

    def _answer_text(self, key: str, value: Any) -> str:
        """An answer; after a transcript the space that separates it from `Assistant:` is not part of it."""
        text = self._text(key, value)
        asked = self.row[self.form.question] if self.form.question else ""
        return text.removeprefix(" ") if isinstance(asked, str) and is_transcript(asked) else text

    def _number(self, key: str) -> float:
        value = self.row[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.errors.append(f"{key}: got {got(value)}, expected a number")
            return 0.0
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.problems.errors.append(f"{key}: got {shown(value)}, expected a finite number")
        return number

    def _margin(self) -> float | None:
        key = next((key for key in MARGIN if self.row.get(key) is not None), None)
        return None if key is None else self._number(key)

    # --- kinds -------------------------------------------------------------------------------------------------------------------

    def _sft(self) -> SFTRecord:
        assert self.form.answer is not None
        return SFTRecord(self._prompt(), self._answer_text(self.form.answer, self.row[self.form.answer]), self.columns, self.where)

    def _score(self) -> ScoreRecord:
        assert self.form.answer is not None and self.form.score is not None
        answer = self._answer_text(self.form.answer, self.row[self.form.answer])
        return ScoreRecord(self._prompt(), answer, self._number(self.form.score), self.columns, self.where)

    def _pair(self) -> PairRecord | None:
        chosen_key, rejected_key = self.form.chosen, self.form.rejected
        assert chosen_key is not None and rejected_key is not None
        if self.form.question is None:
            return self._dialogues()
        prompt = self._prompt()
        chosen = self._answer_text(chosen_key, self.row[chosen_key])
        value = self.row[rejected_key]
        if isinstance(value, list) and not value:
            self.problems.errors.append(f"{rejected_key}: got an empty list, expected an answer or several")
        rejected = tuple(self._answer_text(rejected_key, item) for item in (value if isinstance(value, list) else [value]))
        return self._checked_pair(prompt, chosen, rejected)

    def _dialogue(self, key: str) -> tuple[str, list[tuple[str, str]]] | None:
        """Of a column that holds a whole dialogue: the text before it, and its turns, Assistant's last."""
        text = self._text(key, self.row[key])
        if self.problems:
            return None
        before = before_transcript(text)
        if before is None:
            expected = f"a dialogue that begins with {shown(HUMAN)} (or a prompt beside chosen and rejected)"
            self.problems.unusable.append(f"{key}: got {shown(text)}, expected {expected}")
            return None
        try:
            turns = transcript_turns(text)
        except ValueError as error:
            self.problems.unusable.append(f"{key}: {error}")
            return None
        if turns[-1][0] != "Assistant":
            self.problems.unusable.append(f"{key}: got a dialogue that ends in Human's turn, expected Assistant's answer last")
            return None
        if not turns[-2][1].strip():
            self.problems.unusable.append(f"{key}: got a dialogue whose last question is empty, expected some text")
        return before, turns

    def _dialogues(self) -> PairRecord | None:
        """hh-rlhf: two dialogues that are the same up to their last answers."""
        first, second = self._dialogue("chosen"), self._dialogue("rejected")
        if first is None or second is None:
            return None
        (before, chosen), (before_rejected, rejected) = first, second
        if before != before_rejected:
            self.problems.unusable.append("rejected: differs from chosen before the first turn, expected the same text there")
            return None
        if chosen[:-1] != rejected[:-1]:
            at = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
            inside = "" if len(chosen) == len(rejected) else f"; {shown(HUMAN)} inside an answer begins a turn"
            self.problems.unusable.append(
                f"rejected: differs from chosen in turn {at + 1} already ({len(rejected)} and {len(chosen)} turns{inside}), "
                "expected dialogues that differ in the last answer only"
            )
            return None
        prompt = prompt_of_turns(chosen[:-1], before)
        for key, turns in (("chosen", chosen), ("rejected", rejected)):
            if not turns[-1][1].strip():
                self.problems.unusable.append(f"{key}: got a dialogue whose last answer is empty, expected some text")
        return self._checked_pair(prompt, chosen[-1][1], (rejected[-1][1],))

    def _checked_pair(self, prompt: Prompt, chosen: str, rejected: tuple[str, ...]) -> PairRecord:
        if not self.problems and any(answer.strip() == chosen.strip() for answer in rejected):
            self.problems.unusable.append(f"{self.form.rejected}: got the same text as {self.form.chosen}, expected a different answer")
        return PairRecord(prompt, chosen, rejected, self._margin(), self.columns, self.where)

    def _prompt_only(self) -> PromptRecord | None:
        if self.form.question is not None:
            return PromptRecord(self._prompt(), self.columns, self.where)
        read = self._dialogue("chosen")
        return None if read is None else PromptRecord(prompt_of_turns(read[1][:-1], read[0]), self.columns, self.where)


@cache
def _used_keys(form: RowFormat, kind: RecordKind) -> set[str | None]:
    """The keys that a record of `kind` takes its parts from; all others are its columns."""
    question = {form.question, CONTEXT} if form.question is not None else set[str | None]()
    return (
        question
        | {
            "sft": {form.answer},
            "score": {form.answer, form.score},
            "pair": {form.chosen, form.rejected, *MARGIN},
            "prompt": set[str | None](),
        }[kind]
    )
