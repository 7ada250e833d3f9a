"""Prompts and answers -> token ids that fit: the one place where text becomes ids and where a text is cut.

Prompt and answer are tokenized apart and joined as ids, in every stage. Whatever a text holds is read as plain text: a special token
written out in a question never becomes that token.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from common.errors import UserError
from common.problem_lines import RowFault, fault_lines, raise_problems
from common.prompts import PromptFormat, answer_text, render_prompt
from common.record_types import PairRecord, Prompt, ScoreRecord, SFTRecord

# Threads of the tokenizer and forked data workers do not go together; batches are fast without them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class UnusableRow(UserError):
    """A row that nothing can be learnt from once it is tokenized; `unusable_rows: drop` leaves it out."""


@dataclass(frozen=True)
class Encoded:
    """Ids of a prompt (with BOS where the tokenizer adds one) and of its answer (with EOS unless it was cut), and the tokens cut off."""

    prompt_ids: list[int]
    answer_ids: list[int]
    cut_prompt: int = 0
    cut_answer: int = 0

    @property
    def input_ids(self) -> list[int]:
        """Prompt and answer as one sequence."""
        return self.prompt_ids + self.answer_ids

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass
class TextLengths:
    """Tokens of each text of a kind as it was read, EOS not among them, and how many texts and tokens were cut to fit."""

    tokens: Any = field(default_factory=lambda: array("i"))
    cut: int = 0
    cut_tokens: int = 0


class Counts(NamedTuple):
    """What an Encoder counts: rows and tokens cut, texts seen, and for each kind of text the tokens of each as it was read."""

    counts: Counter[str]
    seen: Counter[str]
    lengths: dict[str, Any]


class Encoder:
    """Turns prompts and answers into ids within a budget of tokens.

    A prompt that does not fit loses its oldest turns, then the end of its context, then the end of its question; what frames them
    (`Question:`, `Answer:`, a chat template) stays. The prompt gives way to the answer: an answer that fits beside the frame keeps all
    its tokens and its EOS. One that does not is cut at its end and loses EOS; the prompt then keeps up to half of `max_length`.

    `max_length`: tokens of prompt + answer + EOS; for encoder-decoders of each of the two. `max_prompt_length`: prompt tokens at most.
    `truncate_prompt` false: a prompt that would have to be cut raises UserError. `counts` adds up what was cut, `seen` what was read;
    `lengths` has for each split the tokens of its texts (`prompt`, `answer`), once its notes were taken.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_format: PromptFormat = "qa",
        max_length: int,
        max_prompt_length: int | None = None,
        truncate_prompt: bool = True,
        is_encoder_decoder: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so no answer could ever end")
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncate_prompt = truncate_prompt
        self.is_encoder_decoder = is_encoder_decoder
        self.counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.lengths: dict[str, dict[str, TextLengths]] = {}
        self._lengths = _no_lengths()
        self._special = _special_pattern(tokenizer)
        self._before, self._after = _added_ids(tokenizer) if prompt_format == "qa" else ([], [])
        if not is_encoder_decoder:
            self._after = []
        self._answer_prefix = self._measured_prefix()
        # The least a prompt takes: its frame without any text of the user's.
        self._frame = len(self._prompt_ids([Prompt("")])[0])
        for name, limit, least in (("max_length", max_length, self._frame + 1), ("max_prompt_length", max_prompt_length, self._frame)):
            if limit is not None and limit < least and not (is_encoder_decoder and name == "max_length" and limit >= self._frame):
                raise UserError(f"{name}: got {limit}, expected at least {least}: the prompt format alone takes {self._frame} tokens")

    def take_notes(self, split: str, *, remedy: str) -> list[str]:
        """What was cut or left out since the last call, a line each; `remedy` says what would keep it: `raise data.max_length`."""
        counts, seen = self.counts, self.seen
        self.counts, self.seen = Counter(), Counter()
        self.lengths[split], self._lengths = self._lengths, _no_lengths()
        lines = []
        for name, lengths in self.lengths[split].items():
            lengths.cut, lengths.cut_tokens = counts[f"{name}s cut"], counts[f"{name} tokens cut"]
            if cut := counts[f"{name}s cut"]:
                lines.append(f"{cut:,} of {seen[f'{name}s']:,} {name}s cut ({lengths.cut_tokens:,} tokens); {remedy} to keep them")
        if turns := counts["dialogue turns dropped"]:
            lines.append(f"{turns:,} turns of dialogues dropped, the oldest of prompts that were cut")
        if rows := counts["rows dropped"]:
            lines.append(f"{rows:,} of {seen['rows']:,} rows dropped as unusable")
        if special := counts["texts with special tokens"]:
            lines.append(f"{special:,} texts hold special tokens, which are read as plain text")
        return [f"{split}: {line}" for line in lines]

    # --- single rows -------------------------------------------------------------------------------------------------------------

    def prompt(self, prompt: Prompt, where: str = "") -> list[int]:
        """Ids of a prompt alone, at most `max_prompt_length` (or `max_length`) of them."""
        return self.prompts([prompt], [where])[0]

    def pair(self, prompt: Prompt, answer: str, where: str = "") -> Encoded:
        """Ids of a prompt and its answer. Raises UnusableRow where the answer has no token."""
        return self.answers(prompt, [answer], where)[0]

    def answers(self, prompt: Prompt, answers: Sequence[str], where: str = "") -> list[Encoded]:
        """Ids of a prompt with each of several answers; all of them follow the same, equally cut prompt."""
        self._count([prompt], answers)
        return self._fit_answers(prompt, self._prompt_ids([prompt])[0], self._answer_ids(answers), where)

    # --- many rows ---------------------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Sequence[Prompt], wheres: Sequence[str] | None = None) -> list[list[int]]:
        """`prompt` of many rows, tokenized together. Raises UserError with a line for each row that does not fit."""
        fitted, problems = self.try_prompts(prompts, wheres)
        raise_problems(problems)
        return fitted

    def try_prompts(self, prompts: Sequence[Prompt], wheres: Sequence[str] | None = None) -> tuple[list[list[int]], list[str]]:
        """The rows that fit, and a line for each other one."""
        limit = self.max_length if self.max_prompt_length is None else min(self.max_prompt_length, self.max_length)
        self._count(prompts)
        problems: list[str] = []
        fitted = []
        for prompt, ids, where in zip(prompts, self._prompt_ids(prompts), wheres or [""] * len(prompts), strict=True):
            self._lengths["prompt"].tokens.append(len(ids))
            try:
                fitted.append(self._fit_prompt(prompt, ids, limit, where)[0])
            except UserError as error:
                problems.extend(error.problems)
        return fitted, problems

    def pairs(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        wheres: Sequence[str] | None = None,
        unusable_rows: Literal["error", "drop"] = "error",
    ) -> list[Encoded | None]:
        """`pair` of many rows, tokenized together; a dropped row is None and counted. Raises UserError with a line for each bad row."""
        groups = self.groups(prompts, [[answer] for answer in answers], wheres, unusable_rows)
        return [None if group is None else group[0] for group in groups]

    def groups(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        wheres: Sequence[str] | None = None,
        unusable_rows: Literal["error", "drop"] = "error",
        *,
        first_differs: bool = False,
    ) -> list[list[Encoded] | None]:
        """`answers` of many rows, tokenized together. `first_differs`: a row whose first answer equals another of its own, as ids
        after cutting, is unusable (chosen and rejected).
        """
        out, problems, unusable = self.try_groups(prompts, answers, wheres, unusable_rows, first_differs=first_differs)
        raise_problems([*problems, *fault_lines(unusable)])
        return out

    def try_groups(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        wheres: Sequence[str] | None,
        unusable_rows: Literal["error", "drop"],
        *,
        first_differs: bool,
    ) -> tuple[list[list[Encoded] | None], list[str], list[RowFault]]:
        """`groups`, with lines for rows that do not fit and faults of those that nothing can be learnt from."""
        prompt_ids = self._prompt_ids(prompts)
        texts = [answer for group in answers for answer in group]
        self._count(prompts, texts)
        self.seen["rows"] += len(prompts)
        flat = iter(self._answer_ids(texts))
        problems: list[str] = []
        unusable: list[RowFault] = []
        out: list[list[Encoded] | None] = []
        for row, (prompt, ids, group) in enumerate(zip(prompts, prompt_ids, answers, strict=True)):
            where = wheres[row] if wheres else ""
            answer_ids = [next(flat) for _ in group]
            self._lengths["prompt"].tokens.append(len(ids))
            self._lengths["answer"].tokens.extend(map(len, answer_ids))
            try:
                encoded = self._fit_answers(prompt, ids, answer_ids, where)
                if first_differs and any(other.answer_ids == encoded[0].answer_ids for other in encoded[1:]):
                    raise UnusableRow(_at(where, f"chosen and rejected are the same after cutting to max_length {self.max_length}"))
                out.append(encoded)
            except UnusableRow as error:
                if unusable_rows == "error":
                    told = [f"{problem} (unusable_rows: drop leaves such rows out)" for problem in error.problems]
                    if where:
                        unusable.extend(RowFault.at(where, problem.removeprefix(f"{where}: ")) for problem in told)
                    else:
                        problems.extend(told)
                self.counts["rows dropped"] += 1
                out.append(None)
            except UserError as error:
                problems.extend(error.problems)
        return out, problems, unusable

    def take_counts(self) -> Counts:
        """What was counted since the last call, or since notes were taken."""
        taken = Counts(self.counts, self.seen, {name: lengths.tokens for name, lengths in self._lengths.items()})
        self.counts, self.seen, self._lengths = Counter(), Counter(), _no_lengths()
        return taken

    def add_counts(self, counts: Counts) -> None:
        """Count what another one has counted, too; its lengths take the place of the own ones."""
        self.counts.update(counts.counts)
        self.seen.update(counts.seen)
        for name, tokens in counts.lengths.items():
            self._lengths[name].tokens = tokens

    # --- ids -----------------------------------------------------------------------------------------------------------------------

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which nothing is special."""
        return _call(self.tokenizer, texts, split_special_tokens=True)

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if self.prompt_format == "qa":
            texts = [render_prompt(prompt) for prompt in prompts]
            return [[*self._before, *ids, *self._after] for ids in self._plain_ids(texts)]
        # A template's own special tokens must become ids, those in its messages must not.
        plain = [row for row, prompt in enumerate(prompts) if not self._holds_special(prompt)]
        texts = [render_prompt(prompts[row], "chat", self.tokenizer) for row in plain]
        together = dict(zip(plain, _call(self.tokenizer, texts, split_special_tokens=False), strict=True))
        return [together[row] if row in together else self._guarded_chat_ids(prompt) for row, prompt in enumerate(prompts)]

    def _holds_special(self, prompt: Prompt) -> bool:
        return self._special is not None and any(self._special.search(text) for text in _texts(prompt))

    def _guarded_chat_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a chat whose messages hold special tokens: these are marked before the template is applied and read as text after."""
        assert self._special is not None
        found: list[str] = []

        def mark(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"\ue000{len(found) - 1}\ue001"

        pattern = self._special
        marked = _map_texts(prompt, lambda text: pattern.sub(mark, text))
        ids: list[int] = []
        for number, piece in enumerate(re.split("\ue000([0-9]+)\ue001", render_prompt(marked, "chat", self.tokenizer))):
            is_mark = number % 2 == 1 and int(piece) < len(found)
            if piece:
                ids += _call(self.tokenizer, [found[int(piece)] if is_mark else piece], split_special_tokens=is_mark)[0]
        return ids

    def _answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers without EOS."""
        return self._plain_ids([self._answer_prefix + answer for answer in answers])

    def _count(self, prompts: Sequence[Prompt], answers: Sequence[str] = ()) -> None:
        self.seen.update(prompts=len(prompts), answers=len(answers))
        if self._special is not None:
            texts = [*answers, *(text for prompt in prompts for text in _texts(prompt))]
            held = sum(self._special.search(text) is not None for text in texts)
            if held:
                self.counts["texts with special tokens"] += held

    def _measured_prefix(self) -> str:
        """What goes before an answer so that prompt and answer, joined as ids, decode to the text of the format.

        Tokenizers of SentencePiece's kind put a space before every text by themselves; the others need it written. An
        encoder-decoder's answer begins a sequence of its own.
        """
        prefix = answer_text("", self.prompt_format)
        if not prefix or self.is_encoder_decoder:
            return ""
        for candidate in (prefix, ""):
            prompt, answer = self._plain_ids(["Answer:", candidate + "a"])
            if self.tokenizer.decode([*prompt, *answer]) == f"Answer:{prefix}a":
                return candidate
        return prefix

    # --- cutting -------------------------------------------------------------------------------------------------------------------

    def _fit_answers(self, prompt: Prompt, prompt_ids: list[int], answers: Sequence[list[int]], where: str) -> list[Encoded]:
        if not all(answers):
            raise UnusableRow(_at(where, "answer: no token is left of it, expected at least one"))
        ended = [[*ids, self.tokenizer.eos_token_id] for ids in answers]
        limit = self.max_length if self.max_prompt_length is None else min(self.max_prompt_length, self.max_length)
        if not self.is_encoder_decoder:
            limit = min(limit, self._room_for_prompt([len(ids) for ids in ended], len(prompt_ids), where))
        fitted, cut = self._fit_prompt(prompt, prompt_ids, limit, where)
        room = self.max_length if self.is_encoder_decoder else self.max_length - len(fitted)
        out = []
        for ids in ended:
            over = max(0, len(ids) - room)
            if over:
                self.counts["answers cut"] += 1
                self.counts["answer tokens cut"] += over
            out.append(Encoded(fitted, ids[:room], cut, over))
        return out

    def _room_for_prompt(self, answer_lengths: Sequence[int], prompt_length: int, where: str) -> int:
        """Prompt tokens that leave every answer its place, as far as it fits at all."""
        longest = max(answer_lengths)
        if not self.truncate_prompt and prompt_length + longest > self.max_length:
            got = f"prompt and answer of {prompt_length} + {longest} tokens"
            raise UserError(_at(where, f"got {got}, expected at most max_length {self.max_length} (truncate_prompt is false)"))
        beside_frame = self.max_length - self._frame
        fitting = [length for length in answer_lengths if length <= beside_frame]
        room = self.max_length - max(fitting, default=0)
        return room if longest <= beside_frame else min(room, max(self._frame, self.max_length // 2))

    def _fit_prompt(self, prompt: Prompt, ids: list[int], limit: int, where: str) -> tuple[list[int], int]:
        """The prompt's ids within `limit`, and how many were cut."""
        if len(ids) <= limit:
            return ids, 0
        if not self.truncate_prompt:
            raise UserError(_at(where, f"prompt: got {len(ids)} tokens, expected at most {limit} (truncate_prompt is false)"))
        fitted = self._shortened(prompt, limit)
        self.counts["prompts cut"] += 1
        self.counts["prompt tokens cut"] += len(ids) - len(fitted)
        return fitted, len(ids) - len(fitted)

    def _shortened(self, prompt: Prompt, limit: int) -> list[int]:
        while prompt.history:
            prompt = replace(prompt, history=prompt.history[1:])
            self.counts["dialogue turns dropped"] += 1
            ids = self._prompt_ids([prompt])[0]
            if len(ids) <= limit:
                return ids
        if prompt.context:
            shorter = self._cut(lambda text: replace(prompt, context=text), prompt.context, limit)
            if shorter is not None:
                return shorter
        shorter = self._cut(lambda text: Prompt(text), prompt.question, limit)
        assert shorter is not None, "the frame alone fits any limit"
        return shorter

    def _cut(self, make: Callable[[str], Prompt], text: str, limit: int) -> list[int] | None:
        """Ids of the prompt made of the longest beginning of `text` that fits; None where not even an empty one does."""
        least = len(self._prompt_ids([make("")])[0])
        if least > limit:
            return None
        ends = self._token_ends(text)
        # Tokens merge differently at the seams, so start a little too long and take away what is measured to be over.
        keep = min(len(ends), limit - least + 2)
        while True:
            ids = self._prompt_ids([make(text[: ends[keep - 1]].rstrip() if keep else "")])[0]
            if len(ids) <= limit:
                return ids
            keep = max(0, keep - (len(ids) - limit))

    def _token_ends(self, text: str) -> list[int]:
        """For each token of a text, the character at which it ends (by proportion, where a tokenizer does not tell)."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
            return [end for _, end in offsets]
        count = len(self._plain_ids([text])[0])
        return [len(text) * (number + 1) // count for number in range(count)]


def answers_of(record: SFTRecord | ScoreRecord | PairRecord) -> list[str]:
    """The answers of a record, the chosen one first."""
    return [record.chosen, *record.rejected] if isinstance(record, PairRecord) else [record.answer]


def encode_answers(
    encoder: Encoder, records: Sequence[SFTRecord | ScoreRecord], unusable_rows: Literal["error", "drop"] = "error"
) -> list[Encoded | None]:
    """Rows with one answer; None for dropped ones."""
    wheres = [record.where for record in records]
    return encoder.pairs([record.prompt for record in records], [record.answer for record in records], wheres, unusable_rows)


def encode_preferences(
    encoder: Encoder, records: Sequence[PairRecord], unusable_rows: Literal["error", "drop"] = "error"
) -> list[list[Encoded] | None]:
    """Rows with a chosen answer (first) and rejected ones after the same prompt; None for dropped ones."""
    answers = [answers_of(record) for record in records]
    wheres = [record.where for record in records]
    return encoder.groups([record.prompt for record in records], answers, wheres, unusable_rows, first_differs=True)


# --- helpers -----------------------------------------------------------------------------------------------------------------------


def _no_lengths() -> dict[str, TextLengths]:
    return {"prompt": TextLengths(), "answer": TextLengths()}


def _call(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text of its own accord (BOS, CLS; EOS, SEP)."""
    bare = _call(tokenizer, ["a"], split_special_tokens=True)[0]
    full = list(tokenizer("a", split_special_tokens=True, verbose=False)["input_ids"])
    start = next(place for place in range(len(full)) if full[place : place + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    tokens = sorted({str(token) for token in tokenizer.all_special_tokens if str(token)}, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None


def _texts(prompt: Prompt) -> list[str]:
    return [prompt.question, prompt.context, *(text for turn in prompt.history for text in turn)]


def _map_texts(prompt: Prompt, change: Callable[[str], str]) -> Prompt:
    history = tuple((change(question), change(answer)) for question, answer in prompt.history)
    return Prompt(change(prompt.question), change(prompt.context), history)


def _at(where: str, problem: str) -> str:
    return f"{where}: {problem}" if where else problem
