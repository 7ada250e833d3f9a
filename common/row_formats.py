"""Raw rows -> validated records: the formats, told apart by their keys, and every check on a single row.

| format           | keys                                                                    | suits                         |
|------------------|-------------------------------------------------------------------------|-------------------------------|
| qa               | Question, Answer                                                        | SFT                           |
| qa_score         | Question, Answer, Score                                                 | reward_model/regression       |
| qa_pair          | Question, Accepted_Answer, Answer (the rejected one, or several)        | reward_model/classification   |
| instruction      | instruction, [context,] response                                        | SFT                           |
| instruction_pair | instruction, [context,] chosen, rejected                                | reward_model/classification   |
| prompt_pair      | prompt, chosen, rejected                                                | reward_model/classification   |
| hh               | chosen, rejected: whole dialogues that differ in the last answer        | reward_model/classification   |
| prompt           | prompt (also Question or instruction alone)                             | PPO                           |

Rows that hold more than a stage needs serve it too: each of them can be a prompt. `context` is read beside every question, `margin`
(or `Margin`) beside every pair. A question in the transcript form of hh-rlhf becomes a dialogue of several turns.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common.json_rows import readable, shown

RecordKind = Literal["sft", "score", "pair", "prompt"]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MAX_NESTING = 64
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def normalise_question(text: str) -> str:
    """The form in which two questions count as the same: compatible characters, case and white space folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_key(prompt: Prompt) -> str:
    """The normalised question with its context and earlier turns: rows with the same key never stand on both sides of a split."""
    parts = [text for turn in prompt.history for text in turn]
    return "\x1f".join(normalise_question(part) for part in (*parts, prompt.question, prompt.context))


# --- dialogues ---------------------------------------------------------------------------------------------------------------------


def is_transcript(text: str) -> bool:
    """Whether a text is written as hh-rlhf's dialogues are."""
    return text.startswith(HUMAN)


def transcript_turns(text: str) -> list[tuple[str, str]]:
    """The (speaker, text) turns of a transcript, without the one space after each colon.

    Raises ValueError where Human and Assistant do not take turns.
    """
    parts = _TURN.split(text)
    turns = [(speaker, said.removeprefix(" ")) for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]
    for number, (speaker, _) in enumerate(turns):
        expected = ("Human", "Assistant")[number % 2]
        if speaker != expected:
            raise ValueError(f"turn {number + 1} is {speaker}'s, expected Human and Assistant in turn")
    return turns


def transcript_prompt(text: str) -> Prompt:
    """The prompt that a transcript ends in: with Human's turn, or with an empty turn of Assistant."""
    turns = transcript_turns(text)
    if turns[-1][0] == "Assistant":
        if turns[-1][1].strip():
            raise ValueError("the dialogue ends with an answer, expected it to end in Human's turn or in 'Assistant:'")
        turns.pop()
    return _prompt_of_turns(turns)


def _prompt_of_turns(turns: Sequence[tuple[str, str]]) -> Prompt:
    said = [text for _, text in turns]
    return Prompt(said[-1], history=tuple(zip(said[:-1:2], said[1:-1:2], strict=True)))


def render_transcript(prompt: Prompt, answer: str = "") -> str:
    """The prompt as hh-rlhf writes dialogues, `Assistant:` and the answer last."""
    turns = "".join(f"{HUMAN} {question}{ASSISTANT} {reply}" for question, reply in prompt.history)
    return f"{turns}{HUMAN} {prompt.question}{ASSISTANT}" + (f" {answer}" if answer else "")


# --- problems ----------------------------------------------------------------------------------------------------------------------


@dataclass
class RowProblems:
    """What is wrong with a row: `errors` always end the reading; `unusable` reasons let the row be dropped where that is asked for."""

    errors: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.errors or self.unusable)


def _kind_of(value: Any) -> str:
    for types, name in ((bool, "true or false"), (type(None), "null"), (int | float, "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, types):
            return name
    return "text"


def _got(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return shown(value)
    return f"{shown(value)} ({_kind_of(value)})"


def _bad_characters(text: str) -> str | None:
    if "\x00" in text:
        return f"a NUL character at position {text.index(chr(0))}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        match = _SURROGATE.search(text)
        assert match is not None
        return f"half of a surrogate pair (\\u{ord(match[0]):04x}) at position {match.start()}"
    return None


def _bad_column(value: Any) -> str | None:
    """What makes the value of an unused column unfit to be stored; walks without recursion."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_NESTING:
            return f"nesting deeper than {MAX_NESTING}"
        if isinstance(item, str):
            bad = _bad_characters(item)
            if bad:
                return bad
        elif isinstance(item, dict):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)
    return None


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


# --- rows --------------------------------------------------------------------------------------------------------------------------


def find_format(keys: Sequence[str], kind: RecordKind) -> RowFormat | None:
    """The format whose keys a row holds: the one with most of them, where equal the one that serves `kind`. None: no format fits."""
    fitting = [form for form in FORMATS if all(key in keys for key in form.required)]
    return max(fitting, key=lambda form: (len(form.required), form.kind in _SERVES[kind]), default=None)


def serves(form: RowFormat, kind: RecordKind) -> bool:
    """Whether rows of this format can be read as records of `kind`."""
    return form.kind in _SERVES[kind]


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
        lacking = [
            f"{readable(theirs)}: missing, expected as columns.{ours} says"
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
        columns = {key: value for key, value in self.row.items() if key not in used}
        for key, value in columns.items():
            bad = _bad_characters(key) or _bad_column(value)
            if bad:
                self.problems.errors.append(f"{readable(key)}: got {bad}, expected plain text")
        self.columns = columns
        made = make[kind]()
        return (None if self.problems else made), self.problems

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _text(self, key: str, value: Any, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            self.problems.errors.append(f"{key}: got {_got(value)}, expected text")
            return ""
        bad = _bad_characters(value)
        if bad:
            self.problems.errors.append(f"{key}: got {bad}, expected plain text")
            return ""
        if not may_be_empty and not value.strip():
            self.problems.unusable.append(f"{key}: got empty text, expected some")
        return value

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
            self.problems.errors.append(f"{key}: got {_got(value)}, expected a number")
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

    def _dialogue(self, key: str) -> list[tuple[str, str]] | None:
        """The turns of a column that holds a whole dialogue, Assistant's last."""
        text = self._text(key, self.row[key])
        if self.problems:
            return None
        if not is_transcript(text):
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
        return turns

    def _dialogues(self) -> PairRecord | None:
        """hh-rlhf: two dialogues that are the same up to their last answers."""
        chosen, rejected = self._dialogue("chosen"), self._dialogue("rejected")
        if chosen is None or rejected is None:
            return None
        if chosen[:-1] != rejected[:-1]:
            at = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
            self.problems.unusable.append(
                f"rejected: differs from chosen in turn {at + 1} already ({len(rejected)} and {len(chosen)} turns), "
                "expected dialogues that differ in the last answer only"
            )
            return None
        prompt = _prompt_of_turns(chosen[:-1])
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
        turns = self._dialogue("chosen")
        return None if turns is None else PromptRecord(_prompt_of_turns(turns[:-1]), self.columns, self.where)


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
