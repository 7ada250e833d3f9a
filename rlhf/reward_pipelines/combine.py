"""Parts made of parts: weighted sums, and ensembles that trust what their members agree on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from rlhf.reward_pipelines.part import Answers, RewardPart


class _Combined(RewardPart):
    def __init__(self, name: str, members: Sequence[RewardPart]) -> None:
        super().__init__(name)
        self._members = tuple(members)

    @property
    def members(self) -> Sequence[RewardPart]:
        return self._members

    def _columns(self, answers: Answers, components: dict[str, list[float]]) -> list[tuple[float, ...]]:
        """For each answer the values of all members."""
        return list(zip(*(member.score(answers, components) for member in self._members), strict=True))


class WeightedSum(_Combined):
    """The sum of weight * value over the members."""

    def __init__(self, name: str, members: Sequence[RewardPart], weights: Sequence[float]) -> None:
        super().__init__(name, members)
        self.weights = tuple(weights)

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        rows = self._columns(answers, components)
        return [sum(weight * value for weight, value in zip(self.weights, row, strict=True)) for row in rows]


class Ensemble(_Combined):
    """Members that judge the same thing, each on its normalised scale.

    mean: their average. min: the most severe. mean_minus_std: the average minus `std_coef` times their spread (population standard
    deviation), so that an answer that fools one member gains little. The spread is logged as `NAME_std`.
    """

    def __init__(
        self, name: str, members: Sequence[RewardPart], how: Literal["mean", "min", "mean_minus_std"] = "mean", std_coef: float = 1.0
    ) -> None:
        super().__init__(name, members)
        self.how = how
        self.std_coef = std_coef

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        rows = self._columns(answers, components)
        spreads = [statistics.pstdev(row) for row in rows]
        components[f"{self.name}_std"] = spreads
        if self.how == "min":
            return [min(row) for row in rows]
        means = [statistics.fmean(row) for row in rows]
        if self.how == "mean":
            return means
        return [mean - self.std_coef * spread for mean, spread in zip(means, spreads, strict=True)]
