"""How a model runs: eval mode for a while, with or without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

LAYER_DROPOUT = "layerdrop"
"""By this probability a stack of layers leaves out whole ones in training."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside every submodule is in the mode it was in, so frozen parts stay in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def dropout_attributes(module: nn.Module) -> list[str]:
    """Names of a module's own dropout probabilities: what its forward hands to functional dropout, or `LAYER_DROPOUT`."""
    numbers = (name for name, value in vars(module).items() if isinstance(value, (int, float)) and not isinstance(value, bool))
    return [name for name in numbers if "drop" in name or (name == "p" and isinstance(module, nn.Dropout))]


def draws_dropout(model: nn.Module) -> bool:
    """Whether a forward is random, because a dropout is on."""
    return any(module.training and any(getattr(module, name) > 0 for name in dropout_attributes(module)) for module in model.modules())
