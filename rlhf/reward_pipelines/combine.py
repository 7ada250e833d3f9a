"""Parts made of parts: weighted sums, and ensembles that trust what their members agree on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rlhf.reward_pipelines.part import Answers, RewardPart
from rlhf.setting_rules import Combine


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
    """Members that judge the same thing, each on its normalised scale, as one: see `combined`. The spread is logged as `NAME_std`."""

    def __init__(self, name: str, members: Sequence[RewardPart], how: Combine = "mean", std_coef: float = 1.0) -> None:
        super().__init__(name, members)
        self.how = how
        self.std_coef = std_coef

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        values, components[f"{self.name}_std"] = combined(self._columns(answers, components), self.how, self.std_coef)
        return values


def combined(rows: Sequence[Sequence[float]], how: Combine, std_coef: float) -> tuple[list[float], list[float]]:
    """What several judges of each answer make of it together, and how far apart they are. `rows`: the values of each answer.

    mean: their average. min: the most severe. mean_minus_std: the average minus `std_coef` times their spread (population standard
    deviation), so that an answer that fools one of them gains little.
    """
    spreads = [statistics.pstdev(row) for row in rows]
    if how == "min":
        return [min(row) for row in rows], spreads
    means = [statistics.fmean(row) for row in rows]
    if how == "mean":
        return means, spreads
    return [mean - std_coef * spread for mean, spread in zip(means, spreads, strict=True)], spreads
