"""Which prompts make a PPO batch: a function of (seed, pass) and the step's number alone, so nothing has to be saved to go on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.sampling import Stream, stream_keys
from common.scratch import scratch


class PromptOrder:
    """Batches from passes over the prompts, each pass in an order of its own; a batch may reach into the next pass.

    A batch has B rows (those of all processes), `samples` side by side for each prompt. So step s takes the P = B / samples prompts from
    number s * P on of the endless sequence of passes.
    """

    def __init__(self, prompts: int, batch_size: int, *, seed: int, samples: int = 1) -> None:
        assert prompts > 0 and batch_size % samples == 0
        self.prompts, self.batch_size, self.samples, self.seed = prompts, batch_size, samples, seed
        self._orders: dict[int, Tensor] = {}

    def batch(self, step: int) -> list[int]:
        """Prompt index of each row of the batch at `step` (from 0)."""
        first = step * (self.batch_size // self.samples)
        self._orders = {number: order for number, order in self._orders.items() if number >= first // self.prompts}
        places = [divmod(first + number // self.samples, self.prompts) for number in range(self.batch_size)]
        return [int(self._order(passed)[place]) for passed, place in places]

    def _order(self, passed: int) -> Tensor:
        if passed not in self._orders:
            key = int(stream_keys(self.seed, passed, torch.tensor([0]), 0, Stream.PROMPT_ORDER))
            self._orders[passed] = shuffled_places(self.prompts, key)
        return self._orders[passed]


def shuffled_places(count: int, seed: int) -> Tensor:
    """0 to `count` in an order drawn by the seed: (N,), int32, in a temporary file where they are many."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), out=torch.from_numpy(scratch(count, np.int32)))
