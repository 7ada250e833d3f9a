"""Activations that are computed again in backward instead of kept."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from common.models.packed import line_again


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing: activations inside blocks are recomputed in backward. Works with frozen embeddings, adapters and lines.

    Blocks below the lowest one that trains stay out of the backward pass, as without it.
    """
    how: dict[str, Any] = {"use_reentrant": False, "context_fn": line_again}
    if hasattr(model, "activation_checkpointing_enable"):  # the name in later transformers 5, where the older one warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    # transformers lets gradients reach the embeddings, as reentrant checkpoints need it; they would go through frozen blocks for that.
    model.disable_input_require_grads()
