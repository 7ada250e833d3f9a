"""A text generator taken apart: the transformer that gives hidden states, and the layer that makes logits of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from common.models.modes import evaluating
from common.models.trial import trial_ids


class Parts(NamedTuple):
    """`head(trunk(input_ids=...).last_hidden_state)` are the logits."""

    trunk: nn.Module
    head: nn.Module


def without_adapters(model: Any) -> Any:
    """The transformers model inside peft's wrapper, its adapters in place; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def take_apart(model: Any) -> Parts | None:
    """The parts of a causal model, perhaps with adapters; None where its logits are anything but the output layer of the last states.

    Some models cap or scale their logits. Which do is tried on a small text, never guessed.
    """
    plain = without_adapters(model)
    trunk, head = getattr(plain, getattr(plain, "base_model_prefix", ""), None), plain.get_output_embeddings()
    if plain.config.is_encoder_decoder or not isinstance(trunk, nn.Module) or not isinstance(head, nn.Module):
        return None
    ids = trial_ids(plain, 1, 3)
    with torch.no_grad(), evaluating(plain):
        whole = plain(input_ids=ids, use_cache=False).logits
        split = head(trunk(input_ids=ids, use_cache=False).last_hidden_state)
    return Parts(trunk, head) if torch.allclose(whole, split, rtol=1e-5, atol=1e-6) else None
