"""Rules that look at an answer's text alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from common.words import split_words
from rlhf.reward_pipelines.part import Answers, RewardPart


class LengthRule(RewardPart):
    """0 within the bounds, minus 1 for every word too few or too many (characters, in scripts without spaces)."""

    def __init__(self, name: str, min_words: int | None, max_words: int | None) -> None:
        super().__init__(name)
        self.min_words = min_words
        self.max_words = max_words

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        return [-float(self._excess(len(split_words(response)))) for response in answers.responses]

    def _excess(self, words: int) -> int:
        too_few = self.min_words - words if self.min_words is not None else 0
        too_many = words - self.max_words if self.max_words is not None else 0
        return max(0, too_few, too_many)


class RepetitionRule(RewardPart):
    """Minus the share (0-1) of n-grams of words that stood in the answer before; 0 for answers shorter than n words."""

    def __init__(self, name: str, ngram: int) -> None:
        super().__init__(name)
        self.ngram = ngram

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        return [-repeated_share(split_words(response), self.ngram) for response in answers.responses]


def repeated_share(words: Sequence[str], n: int) -> float:
    """Share (0-1) of the n-grams that occurred before in the same sequence."""
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class RegexRule(RewardPart):
    """1 where the pattern is found anywhere in the answer, else 0."""

    def __init__(self, name: str, pattern: re.Pattern[str]) -> None:
        super().__init__(name)
        self.pattern = pattern

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        return [float(self.pattern.search(response) is not None) for response in answers.responses]


class MustEndRule(RewardPart):
    """1 where the answer's text, without space at its end, ends in one of the endings, else 0."""

    def __init__(self, name: str, endings: Sequence[str]) -> None:
        super().__init__(name)
        self.endings = tuple(endings)

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        return [float(response.rstrip().endswith(self.endings)) for response in answers.responses]
