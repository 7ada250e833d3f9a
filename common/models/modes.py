"""How a model runs: eval mode for a while, with or without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FUNCTIONAL_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
"""Attributes of modules, numbers that their forward hands to functional dropout."""


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


def draws_dropout(model: nn.Module) -> bool:
    """Whether a forward is random, because a dropout is on."""
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else FUNCTIONAL_DROPOUTS
        if module.training and any(isinstance(p := module.__dict__.get(name), (int, float)) and p > 0 for name in names):
            return True
    return False
