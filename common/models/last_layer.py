"""The last block's feed-forward part at those tokens alone whose final states are read.

What it gives a token nobody sees but that token itself, so for the tokens of a prompt, whose predictions are known, it need not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.freezing import find_blocks, is_attention
from common.models.modes import evaluating
from common.models.packed import as_line
from common.models.trial import trial_rows


class LastFeedForward:
    """The module behind attention in the last block of a trunk that reads lines of texts."""

    def __init__(self, trunk: nn.Module, module: nn.Module) -> None:
        self.trunk, self.module = trunk, module

    @classmethod
    def find(cls, trunk: nn.Module) -> LastFeedForward | None:
        """The one part of the last block with linear layers that is no attention; None where there is no such one.

        Tried on a line of two small texts: states at chosen tokens have to be those of the whole model.
        """
        blocks = find_blocks(trunk)
        if not blocks:
            return None
        parts = trunk.get_submodule(blocks[-1].prefix.rstrip(".")).named_children()
        found = [
            part for name, part in parts if not is_attention(name, part) and any(isinstance(inner, nn.Linear) for inner in part.modules())
        ]
        if len(found) != 1:
            return None
        last = cls(trunk, found[0])
        line = as_line(*trial_rows(trunk))
        places = torch.tensor([7, 3, 4, 3], device=line.ids.device)
        with torch.no_grad(), evaluating(trunk):
            whole = line.states(trunk)
            try:
                with last.at(places):
                    got = line.states(trunk)
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
                return None
        same = torch.allclose(got[places], whole[places], rtol=1e-5, atol=1e-6)
        return last if same and not torch.allclose(got, whole, rtol=1e-5, atol=1e-6) else None

    @contextmanager
    def at(self, places: Tensor) -> Iterator[None]:
        """Inside, final states of a line are right at its tokens `places` (M,), in any order, and without meaning elsewhere.

        With gradient checkpointing, which computes blocks again when this is over, all are right.
        """
        places = places.unique()
        if any(module.training and getattr(module, "gradient_checkpointing", False) for module in self.trunk.modules()):
            yield
            return
        shapes: list[torch.Size] = []

        def take(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            states, *others = arguments
            shapes.append(states.shape)
            return states.index_select(1, places), *others

        def give_back(_: nn.Module, __: tuple[Any, ...], result: Tensor) -> Tensor:
            return result.new_zeros(shapes.pop()).index_copy(1, places, result)

        with self.module.register_forward_pre_hook(take), self.module.register_forward_hook(give_back):
            yield
