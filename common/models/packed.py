"""Texts of different lengths one behind the other, without padding: linear layers, norms and activations then work on real tokens alone.

A batch is one line (1, N) with positions that start anew in each text; only attention is computed text by text. Transformers' registry
of attention functions takes it in, so it works for any causal model that asks the registry and takes `position_ids`; GPT-Neo, which
does not ask, is served by `common.models.fused`. Whether a model is one of these is tried on a small text, never guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "packed_texts"
_line: ContextVar[_Line | None] = ContextVar("the line that is being computed", default=None)
# What attention may be told besides; another model's own ideas (a cap on logits, sinks, biases) are not computed here.
_UNDERSTOOD = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}


@dataclass
class _Line:
    lengths: tuple[int, ...]
    attended: int = 0


def texts_in_line() -> tuple[int, ...] | None:
    """Lengths of the texts of the line that is being computed; None outside `packed_line`."""
    line = _line.get()
    return None if line is None else line.lengths


@contextmanager
def packed_line(trunk: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Inside, the trunk reads an input (1, N) as texts of these lengths.

    Raises RuntimeError where no layer kept them apart: the model's attention is no longer the one that was tried.
    """
    config: Any = trunk.config
    usual = config._attn_implementation
    line = _Line(tuple(lengths))
    token = _line.set(line)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _line.reset(token)
    if not line.attended:
        raise RuntimeError(f"the attention of {type(trunk).__name__} read texts in a line as one; was it exchanged after the trial?")


def attend_to_own_text(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within each text of the line: (1, heads, N, d) -> (1, N, heads, d). `window`: keys that a query sees at most."""
    line = _line.get()
    assert line is not None
    line.attended += 1
    lengths = line.lengths
    mixed = []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        near = _window_mask(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        text = scaled_dot_product_attention(
            q, k, v, attn_mask=near, is_causal=near is None, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(text.transpose(1, 2))
    return torch.cat(mixed, dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _registered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, given in others.items() if given is not None and name not in _UNDERSTOOD]
    if unknown or attention_mask is not None or others.get("is_causal") is False:
        raise NotImplementedError(f"attention over packed texts knows nothing of {', '.join(unknown) or 'this mask'}")
    return attend_to_own_text(query, key, value, scale=scaling, window=others.get("sliding_window"), dropout=dropout), None


AttentionInterface.register(NAME, _registered)


def line_positions(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Positions (1, N) of the tokens of a line, from 0 in each text."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def can_pack(trunk: nn.Module) -> bool:
    """Whether a causal trunk gives texts in a line the states that it gives them in padded rows."""
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    vocabulary: Any = trunk.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(10, device=next(trunk.parameters()).device).reshape(2, 5) % vocabulary.num_embeddings
    lengths = (5, 3)
    line = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])[None]
    with torch.no_grad():
        rows = trunk(input_ids=ids, use_cache=False).last_hidden_state
        expected = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
        try:
            with packed_line(trunk, lengths):
                got = trunk(input_ids=line, position_ids=line_positions(lengths, ids.device), use_cache=False).last_hidden_state[0]
        except Exception:  # whatever a model raises here, it cannot read a line
            return False
    short = rows.dtype != torch.float32
    return torch.allclose(got, expected, rtol=1e-2 if short else 1e-4, atol=1e-2 if short else 1e-5)
