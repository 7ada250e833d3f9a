"""How a model runs: eval mode for a while, activations kept or recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


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


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: activations inside blocks are recomputed in backward. Works with frozen embeddings and adapters."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name in later transformers 5, where the older one warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
