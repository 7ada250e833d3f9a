"""What choosing among a model's own answers gains, and how far it goes from the model: best-of-n, and the best that can be.

All of it comes from draws: P prompts with N answers each, drawn from the model, their scores and qualities as arrays (P, N). How often an
answer occurs among the N counts as its probability (the plug-in estimate). That takes answers drawn once for N times rarer than certain,
rarer ones than that for impossible, and so leaves a bias of order 1 / N, which `extrapolated` removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weigh = Callable[[Array], Array]
"""From the N scores of a prompt's draws to a probability for each draw, summing to 1."""


class Point(NamedTuple):
    """A policy: KL from the model it comes from (nats per answer), mean score and mean quality; means over prompts."""

    kl: float
    score: float
    quality: float


def best_of_n(n: int) -> Weigh:
    """The answer of the highest score among n draws; each of several equal ones is as likely.

    With F(s) the share of answers that score s at most, the best of n has score s with probability F(s)^n - F(s-)^n. Answers of equal
    score share it, so identical answers count as one, however often they were drawn.
    """

    def weigh(scores: Array) -> Array:
        _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
        below = np.concatenate([[0.0], np.cumsum(counts) / len(scores)]) ** n
        return (np.diff(below) / counts)[level]

    return weigh


def optimum(kl_coef: float) -> Weigh:
    """The policy that no other beats at score - kl_coef * KL: p(answer) * exp(score / kl_coef), normalised for each prompt."""

    def weigh(scores: Array) -> Array:
        weights = np.exp((scores - scores.max()) / kl_coef)
        return weights / weights.sum()

    return weigh


def kl_bound(n: int) -> float:
    """Upper bound of best-of-n's KL in nats, met where no answer ever repeats (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def plug_in(weigh: Weigh, scores: Array, qualities: Array) -> Point:
    """The reweighted model, taking the draws (P, N) for all its answers."""
    weights = np.stack([weigh(row) for row in scores])
    # Draws of equal score have equal weights and so equal ratios to their shares: a sum over draws is the sum over answers.
    terms = np.where(weights > 0, weights * np.log(np.maximum(weights, np.finfo(float).tiny) * scores.shape[1]), 0.0)
    return Point(float(terms.sum(1).mean()), float((weights * scores).sum(1).mean()), float((weights * qualities).sum(1).mean()))


def extrapolated(weigh: Weigh, scores: Array, qualities: Array) -> Point:
    """`plug_in` without its bias of order 1 / N: twice what all draws give, less the mean of what each half of them gives."""
    whole = plug_in(weigh, scores, qualities)
    halves = [plug_in(weigh, scores[:, half::2], qualities[:, half::2]) for half in (0, 1)]
    return Point(*(2 * all_draws - (first + second) / 2 for all_draws, first, second in zip(whole, *halves, strict=True)))


def frontier(points: list[tuple[float, float]], kl: float) -> float:
    """The highest gain within `kl` nats of policies (KL, gain) and of mixtures of two of them; 0 nats gain 0.

    Whoever answers by one of two policies, chosen by a coin, has their mean score at no more than their mean KL.
    """
    hull = [(0.0, 0.0)]
    for point in sorted(points):
        while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if point[1] > hull[-1][1]:
            hull.append(point)
    kls, gains = zip(*hull, strict=True)
    return float(np.interp(kl, kls, gains))


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else math.inf if end[1] > start[1] else -math.inf
