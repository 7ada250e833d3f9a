"""The interface of every part of a reward: answers in, one number per answer out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.records import Prompt


@dataclass(frozen=True)
class Answers:
    """A batch of answers as text. All sequences have one entry per answer."""

    prompts: Sequence[Prompt]
    responses: Sequence[str]
    columns: Sequence[Mapping[str, Any]]
    """Every other column of the row that a prompt came from."""
    ended: Sequence[bool]
    """False for an answer cut off before its EOS."""

    def __post_init__(self) -> None:
        counts = {"prompts": len(self.prompts), "responses": len(self.responses), "columns": len(self.columns), "ended": len(self.ended)}
        if len(set(counts.values())) > 1:
            raise ValueError("one entry per answer is needed, got " + ", ".join(f"{n} {name}" for name, n in counts.items()))

    @property
    def questions(self) -> list[str]:
        """The questions as they stand in the data, without the frame of a prompt format."""
        return [prompt.question for prompt in self.prompts]


@dataclass(frozen=True)
class RewardResult:
    """Scores of answers, and what every part gave them under its name, each with one number per answer."""

    scores: list[float]
    components: dict[str, list[float]]


class RewardPart(ABC):
    """One part of a reward. A subclass says what it is worth (`values`); naming and logging happen here."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        """One number per answer. A part made of parts calls their `score` with the same `components`."""

    def score(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        """`values`, entered into `components` under the part's name."""
        values = self.values(answers, components)
        assert len(values) == len(answers.responses)
        components[self.name] = values
        return values

    @property
    def members(self) -> Sequence[RewardPart]:
        """The parts it is made of."""
        return ()

    @property
    def texts_cut(self) -> int:
        """Prompts and answers that were too long to be read whole, so far."""
        return 0

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must see the reference's answers before the first `score`."""
        return False

    def calibrate(self, answers: Answers) -> None:  # noqa: B027 (most parts need not override it)
        """Learn a scale from the reference's answers; most parts have nothing to learn."""

    def state_dict(self) -> dict[str, Any]:
        """What `calibrate` learnt, plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` gave."""

    def walk(self) -> Iterator[RewardPart]:
        """This part and all it is made of."""
        yield self
        for member in self.members:
            yield from member.walk()
