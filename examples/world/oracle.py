"""The oracle: judges any answer text by the truth of the world. Training never sees it.

It reads the text, it does not compare with templates: which values are claimed, whether the answer says what it is about and how to check
it, whether it is rude, whether it goes on and on, whether it ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.world.facts import ATTRIBUTES, COUNTRIES, values
from examples.world.questions import EXTREMES, Question, understand

MAX_WORDS = 24  # more is rambling
RUDE_WORDS = frozenset({"dumb", "fool", "idiot", "lazy", "moron", "ridiculous", "silly", "stupid"})
CHECK = r"\bcount"  # how a comparison is checked
WEIGHTS = {"right": 0.4, "helpful": 0.4, "polite": 0.1, "ends": 0.1}


@dataclass(frozen=True)
class Verdict:
    """What is true of one answer."""

    right: bool  # it claims the right value and no other
    helpful: bool  # it says what it answers and how to check it, and keeps to the point
    polite: bool
    ends: bool  # the model stopped by itself, at the end of a sentence

    @property
    def score(self) -> float:
        """0 to 1. Being helpful counts only where the answer is right."""
        earned = {"right": self.right, "helpful": self.right and self.helpful, "polite": self.polite, "ends": self.ends}
        return sum(weight for name, weight in WEIGHTS.items() if earned[name])


def judge(question: str | Question, answer: str, ended: bool = True) -> Verdict:
    """Judge an answer's text. `ended`: the model produced its end token (a text that was cut off did not end).

    Raises ValueError where the question is none of this world's.
    """
    if isinstance(question, str):
        question = understand(question)
    text = " ".join(answer.lower().split())
    words = _words(text)
    polite = bool(words) and RUDE_WORDS.isdisjoint(words)
    return Verdict(
        right=_right(question, text),
        helpful=polite and not _rambles(words) and _says_what_it_answers(question, text) and _says_how_to_check(question, text),
        polite=polite,
        ends=ended and bool(words) and text[-1] in ".!?",
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+", text)


def _named(candidates: object, text: str) -> set[str]:
    """Those of the candidates that stand in the text as whole words, lower case."""
    assert isinstance(candidates, list | tuple | dict | range)
    return {name for name in (str(candidate).lower() for candidate in candidates) if re.search(rf"\b{re.escape(name)}\b", text)}


def _right(question: Question, text: str) -> bool:
    """The right value is claimed, no rival is, and nothing else is talked about (the capital of another country, say)."""
    if question.family == "fact":
        attribute, country = question.slots
        return (
            _named(values(attribute), text) == {question.right.lower()}
            and _named(COUNTRIES, text) <= {country.lower()}
            and _named(ATTRIBUTES, text) <= {attribute}
        )
    asked, *operands = question.slots
    echo = r"\W+(?:and |or )?".join(map(re.escape, operands))
    text = re.sub(rf"\b{echo}\b", " ", text)  # repeating the list claims nothing
    return set(re.findall(r"\d+", text)) == {question.right} and _named(EXTREMES, text) <= {asked}


def _rambles(words: list[str]) -> bool:
    """Too long, or the same five words twice."""
    fives = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    return len(words) > MAX_WORDS or len(set(fives)) < len(fives)


def _says_what_it_answers(question: Question, text: str) -> bool:
    topics = question.slots if question.family == "fact" else question.slots[:1]
    return all(_named([topic], text) for topic in topics)


def _says_how_to_check(question: Question, text: str) -> bool:
    if question.family == "fact":
        return bool(_named([ATTRIBUTES[question.slots[0]]], text))
    return re.search(CHECK, text) is not None
