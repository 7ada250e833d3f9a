"""What regression training does to scores before the loss, and how it is undone in every output. Floats in, floats out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from common.errors import UserError

TransformName = Literal["none", "standardize", "log1p", "minmax"]

LEAST_SCALE = 1e-6
"""Scores that spread less than this are taken as all alike, and not divided."""

LARGEST_TARGET = 1e18
"""What the loss sees is squared in float32, which ends at 3e38."""

# exp of more than this is no float any more; a prediction that far out is meaningless, but must not raise.
_LARGEST_EXPONENT = 700.0


class ScoreTransform(BaseModel):
    """An invertible map of scores, fitted on the training split.

    standardize   z = (x - mean) / std            shift = mean, scale = std (population)
    minmax        z = (x - min) / (max - min)     shift = min,  scale = max - min
    log1p         z = sign(x) * log(1 + |x|)      so that negative votes have a place; no parameters
    none          z = x
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TransformName = "none"
    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, name: TransformName, scores: Sequence[float]) -> ScoreTransform:
        """Fit to training scores; scores that are all equal keep the scale 1. Raises UserError on no or non-finite scores, and
        on such that it leaves too large for the loss.
        """
        if not scores:
            raise UserError("score_transform: no training scores to fit it on")
        if not all(math.isfinite(score) for score in scores):
            raise UserError("score_transform: a training score is not finite")
        lowest, highest = min(scores), max(scores)
        try:
            transform = cls._fitted(name, scores)
            fits = all(abs(target) <= LARGEST_TARGET for target in transform.apply([lowest, highest]))
        except OverflowError:
            fits = False
        if not fits:
            raise UserError(f"score_transform: {name} of training scores from {lowest:g} to {highest:g} is too large for the loss")
        return transform

    @classmethod
    def _fitted(cls, name: TransformName, scores: Sequence[float]) -> ScoreTransform:
        if name == "standardize":
            mean = math.fsum(scores) / len(scores)
            std = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
            return cls(name=name, shift=mean, scale=std or 1.0)
        if name == "minmax":
            return cls(name=name, shift=min(scores), scale=(max(scores) - min(scores)) or 1.0)
        return cls(name=name)

    def apply(self, scores: Sequence[float]) -> list[float]:
        """Original scores -> what the loss sees."""
        if self.name == "log1p":
            return [math.copysign(math.log1p(abs(score)), score) for score in scores]
        return [(score - self.shift) / self.scale for score in scores]

    def invert(self, scores: Sequence[float]) -> list[float]:
        """Raw model outputs -> scores on the original scale; NaN stays NaN."""
        if self.name == "log1p":
            return [math.copysign(math.expm1(min(abs(score), _LARGEST_EXPONENT)), score) for score in scores]
        return [score * self.scale + self.shift for score in scores]
