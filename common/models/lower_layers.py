"""The bottom of a transformer that does not train, run once where training passes over the same texts again and again.

Everything below the lowest block that trains gives the same states in every pass, as long as dropout is off. They are computed once;
later passes start from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from common.freezing import find_blocks
from common.models.trial import trial_ids


class _Reached(Exception):
    """The states that enter the lowest trained block are known; the blocks above need not run."""


class LowerLayers:
    """Blocks 0 … k - 1 of a causal transformer: none of what they compute, embeddings included, has a gradient."""

    def __init__(self, trunk: nn.Module, blocks: list[nn.Module], count: int, results: int) -> None:
        """`results`: how many things a block returns, its states the first of them."""
        self.trunk, self.below, self.first, self.results = trunk, blocks[:count], blocks[count], results

    @classmethod
    def find(cls, trunk: nn.Module) -> LowerLayers | None:
        """As many blocks as need no gradient; None where there are none, or the model cannot start above them.

        Tried on a small text: a block is above the frozen part if gradients reach its input, and starting there has to give what the
        whole model gives. A model whose blocks hand on more than their states (T5's do) fails the trial.
        """
        found = find_blocks(trunk)
        blocks = [trunk.get_submodule(block.prefix.rstrip(".")) for block in found]
        if not found or len(blocks) != found[0].count:  # an encoder beside the decoder
            return None
        ids = trial_ids(trunk, 2, 4)
        entering, results = _watch(trunk, blocks, ids)
        frozen = [not states.requires_grad for states in entering]
        count = frozen.index(False) - 1 if False in frozen else len(blocks) - 1
        if count < 1:
            return None
        lower = cls(trunk, blocks, count, results)
        try:
            with torch.no_grad():
                whole = trunk(input_ids=ids, use_cache=False).last_hidden_state
                with lower.replaced(lower.states(input_ids=ids)):
                    resumed = trunk(input_ids=ids, use_cache=False).last_hidden_state
        except (AttributeError, IndexError, TypeError, ValueError):
            return None
        return lower if torch.equal(whole, resumed) else None

    def in_twin(self, twin: nn.Module) -> LowerLayers | None:
        """The same layers of a copy, where they are the same tensors, so that their states are those of the copy, too; else None."""
        count = len(self.below)
        blocks = [twin.get_submodule(block.prefix.rstrip(".")) for block in find_blocks(twin)]
        if type(twin) is not type(self.trunk) or len(blocks) <= count:
            return None
        above = {id(parameter) for block in blocks[count:] for parameter in block.parameters()}
        theirs = dict(twin.named_parameters())
        for name, parameter in self.trunk.named_parameters():
            other = theirs.get(name)
            if other is None or (not parameter.requires_grad and id(other) not in above and other is not parameter):
                return None
        return LowerLayers(twin, blocks, count, self.results)

    @property
    def above(self) -> tuple[str, ...]:
        """Prefixes of the names of the other blocks' parameters, the lowest first."""
        return tuple(block.prefix for block in find_blocks(self.trunk)[len(self.below) :])

    def states(self, **inputs: Any) -> Tensor:
        """What enters the first block above (B, S, D); the blocks from there on do not run."""
        caught: list[Tensor] = []

        def catch(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(_states_among(arguments, keywords))
            raise _Reached

        with self.first.register_forward_pre_hook(catch, with_kwargs=True), torch.no_grad(), suppress(_Reached):
            self.trunk(**inputs, use_cache=False)
        return caught[0]

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Inside, forwards of the trunk start from `states`: the blocks below hand them on instead of computing."""

        def hand_on(*arguments: Any, **keywords: Any) -> Any:
            return states if self.results == 1 else (states, *[None] * (self.results - 1))

        own = [vars(block).get("forward") for block in self.below]  # another library may have put one there
        for block in self.below:
            block.forward = hand_on
        try:
            yield
        finally:
            for block, forward in zip(self.below, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


def starting_above(lower: LowerLayers | None, states: Tensor | None) -> AbstractContextManager[None]:
    """Inside, forwards start above `lower` from `states`, of any type; without either they run whole."""
    if lower is None or states is None:
        return nullcontext()
    return lower.replaced(states.to(next(lower.trunk.parameters()).dtype))


@torch.enable_grad()
def _watch(trunk: nn.Module, blocks: list[nn.Module], ids: Tensor) -> tuple[list[Tensor], int]:
    """The states that enter each block in a forward of `ids`, and how many things a block returns."""
    seen: list[Tensor] = []
    counts: list[int] = []

    def note(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        seen.append(_states_among(arguments, keywords))
        counts.append(len(result) if isinstance(result, tuple) else 1)

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        trunk(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, counts[0]


def _states_among(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    states: Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return states
