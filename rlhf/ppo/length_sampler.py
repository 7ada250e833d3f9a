"""Answer lengths drawn at random, for `PPOTrainer.generate(length_sampler=…)`."""

from __future__ import annotations

import random


class LengthSampler:
    """Each call draws a length from `min_value` to `max_value - 1`, all equally likely, as a function of `seed` and the call's number."""

    def __init__(self, min_value: int, max_value: int, seed: int = 0) -> None:
        if not 0 < min_value < max_value:
            raise ValueError(f"min_value {min_value} and max_value {max_value}: expected 0 < min_value < max_value")
        self.min_value, self.max_value = min_value, max_value
        self._random = random.Random(seed)

    def __call__(self) -> int:
        return self._random.randrange(self.min_value, self.max_value)
