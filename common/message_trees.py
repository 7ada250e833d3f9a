"""Conversations as trees of messages, as Open Assistant publishes them: several replies to a message, ranked by people.

A row is a message: `message_id`, `parent_id` (null: a conversation begins), `role` (`prompter` or `assistant`), `text`, and where people
compared the replies to one message their `rank` (0: the best). `lang` and `deleted` are read where they stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_rows import SPLITS, RawRow, RawRows, SplitName, parse_file
from common.record_types import Prompt, PromptRecord, ScoreRecord, SFTRecord
from common.records import load_hub

KEYS = ("message_id", "parent_id", "role", "text")
ROLES = ("prompter", "assistant")


@dataclass
class MessageTrees:
    """The conversations of one split."""

    source: str
    split: SplitName
    lang: str | None
    left_out: Counter[str]
    messages: dict[str, RawRow] = field(default_factory=dict)

    def answers(self) -> Iterator[ScoreRecord]:
        """Every ranked answer with what was said before it; its score is minus its rank."""
        for row in self.messages.values():
            value = row.value
            if value["role"] == "assistant" and value.get("rank") is not None and self.wanted(value) and (prompt := self.before(value)):
                yield ScoreRecord(prompt, value["text"], -float(value["rank"]), {}, self.where(row))

    def best_answers(self) -> Iterator[SFTRecord]:
        """The best answer to each message."""
        for answer in self.answers():
            if answer.score == 0:
                yield SFTRecord(answer.prompt, answer.answer, {}, answer.where)

    def prompts(self) -> Iterator[PromptRecord]:
        """Every message of a prompter, with what was said before it."""
        for row in self.messages.values():
            if row.value["role"] == "prompter" and self.wanted(row.value) and (prompt := self.upto(row.value)):
                yield PromptRecord(prompt, {}, self.where(row))

    def wanted(self, value: Mapping[str, Any]) -> bool:
        return (self.lang is None or value.get("lang") == self.lang) and bool(value["text"].strip()) and not value.get("deleted")

    def before(self, answer: Mapping[str, Any]) -> Prompt | None:
        """What an answer replies to; None, counted, where a message on the way is missing."""
        parent = self.messages.get(answer["parent_id"])
        if parent is None or parent.value["role"] != "prompter":
            self.left_out["answers to a message that is not there"] += 1
            return None
        return self.upto(parent.value)

    def upto(self, question: Mapping[str, Any]) -> Prompt | None:
        """A prompter's message as a prompt, the turns before it as its history; None, counted, where one of them is missing."""
        turns: list[tuple[str, str]] = []
        value = question
        while value["parent_id"] is not None:
            answer = self.messages.get(value["parent_id"])
            asked = self.messages.get(answer.value["parent_id"]) if answer is not None else None
            if answer is None or asked is None or len(turns) > len(self.messages):
                self.left_out["messages whose beginning is not there"] += 1
                return None
            turns.append((asked.value["text"], answer.value["text"]))
            value = asked.value
        return Prompt(question["text"], history=tuple(reversed(turns)))

    def where(self, row: RawRow) -> str:
        return f"{self.source}: {row.split} row {row.number}"


def read_message_trees(source: str, lang: str | None, left_out: Counter[str]) -> dict[SplitName, MessageTrees] | None:
    """The conversations of a file or `hf:NAME` by split, of one language where `lang` names it; None where its rows are no messages.

    Raises UserError, a line per row, where a message lacks a key or has another kind of value.
    """
    raw = _raw_rows(source)
    if raw is None or not raw.rows or not set(KEYS) - {"parent_id"} <= raw.rows[0].value.keys():
        return None
    trees = {name: MessageTrees(source, name, lang, left_out) for name in SPLITS}
    problems = list(raw.problems)
    for row in raw.rows:
        tree = trees[row.split]
        row.value.setdefault("parent_id", None)
        problems += [f"{tree.where(row)}: {problem}" for problem in _problems(row.value)]
        tree.messages[row.value.get("message_id")] = row
    if problems:
        raise UserError(*problems)
    return {name: tree for name, tree in trees.items() if tree.messages}


def _raw_rows(source: str) -> RawRows | None:
    if source.startswith("hf:"):
        return load_hub(source)
    path = Path(source)
    try:
        return parse_file(path.read_bytes(), source) if path.is_file() else None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror or error}") from None


def _problems(value: Mapping[str, Any]) -> Iterable[str]:
    for key in ("message_id", "text"):
        if not isinstance(value.get(key), str):
            yield f"{key}: got {value.get(key)!r}, expected text"
    if value.get("role") not in ROLES:
        yield f"role: got {value.get('role')!r}, expected prompter or assistant"
    if not isinstance(value.get("parent_id"), str | None):
        yield f"parent_id: got {value['parent_id']!r}, expected text or null"
    if isinstance(value.get("rank"), bool) or not isinstance(value.get("rank"), int | float | None):
        yield f"rank: got {value['rank']!r}, expected a number or null"
