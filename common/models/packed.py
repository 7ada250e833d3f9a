"""Texts of different lengths one behind the other, without padding: linear layers, norms and activations then work on real tokens alone.

A batch is one line (1, N) with positions that start anew in each text; only attention is computed text by text. Transformers' registry
of attention functions takes it in, so it works for any causal model that asks the registry and takes `position_ids`; GPT-Neo, which
does not ask, is served by `common.models.fused`. Whether a model is one of these is tried on a small text, never guessed.

Texts that begin alike, as the answers to one question do, may share that beginning: it stands in the line once, in the first of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from common.models.modes import evaluating
from common.models.short_texts import Groups, attend_in_groups, groups_of_like_length, serves
from common.models.trial import trial_rows

NAME = "packed_texts"
SHARED_TOKENS = 8
"""A common beginning is shared from so many tokens on; for fewer, attention loses more than the other layers gain."""


class Shared(NamedTuple):
    """The beginning that a text has in common with another one of the line, which has all its tokens there."""

    text: int
    tokens: int


NOTHING = Shared(0, 0)


class Texts:
    """The texts of a line: tokens of each that stand there, what each takes from another, and by how many layers they were kept apart."""

    def __init__(self, lengths: Sequence[int], shared: Sequence[Shared] | None = None) -> None:
        self.lengths = tuple(lengths)
        self.shared = tuple(shared) if shared is not None else (NOTHING,) * len(self.lengths)
        self.shares_nothing = all(tokens == 0 for _, tokens in self.shared)
        self.attended = 0
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        self._groups: Groups | None = None

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """What is added to the logits (queries, keys) of a text's last tokens; None where plain causality says it all."""
        if queries == keys and (window is None or keys <= window):
            return None
        return self._mask(queries, keys, window, like.dtype, like.device)

    def _mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = queries, keys, window, dtype
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[key] = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return self._masks[key]

    def in_groups(self, query: Tensor, window: int | None) -> tuple[Groups, list[Tensor]]:
        """The texts in groups of like length, and what is added to the logits of each."""
        if self._groups is None:
            self._groups = groups_of_like_length(self.lengths, query.shape[1], query.device)
        return self._groups, [self._mask(tokens, tokens, window, torch.float32, query.device) for _, tokens in self._groups.shapes]


_line: ContextVar[tuple[Any, Texts] | None] = ContextVar("configuration of the trunk that reads a line, and the texts", default=None)
# What attention may be told besides; another model's own ideas (a cap on logits, sinks, biases) are not computed here.
_UNDERSTOOD = {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}


def texts_in_line() -> Texts | None:
    """The texts of the line that is being computed; None outside `packed_line`."""
    line = _line.get()
    return None if line is None else line[1]


@contextmanager
def packed_line(trunk: nn.Module, lengths: Sequence[int], shared: Sequence[Shared] | None = None) -> Iterator[None]:
    """Inside, the trunk reads an input (1, N) as texts of these lengths; `shared`: what each has from another, where any has.

    Raises RuntimeError where no layer kept them apart: the model's attention is no longer the one that was tried.
    """
    texts = Texts(lengths, shared)
    with _reading(trunk.config, texts):
        yield
    if not texts.attended:
        raise RuntimeError(f"the attention of {type(trunk).__name__} read texts in a line as one; was it exchanged after the trial?")


@contextmanager
def _reading(config: Any, texts: Texts) -> Iterator[None]:
    usual = config._attn_implementation
    token = _line.set((config, texts))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _line.reset(token)


def line_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: what is recomputed in backward finds the line that there was in forward."""
    line = _line.get()
    return nullcontext(), nullcontext() if line is None else _reading(*line)


def attend_to_own_text(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within each text of the line: (1, heads, N, d) -> (1, N, heads, d). `window`: keys that a query sees at most."""
    texts = texts_in_line()
    assert texts is not None
    texts.attended += 1
    if dropout == 0.0 and texts.shares_nothing and serves(query, key, texts.lengths):
        groups, masks = texts.in_groups(query, window)
        return attend_in_groups(query, key, value, groups, masks, query.shape[-1] ** -0.5 if scale is None else scale)
    queries, keys, values = (part.split(texts.lengths, dim=2) for part in (query, key, value))
    mixed = []
    for q, k, v, (text, tokens) in zip(queries, keys, values, texts.shared, strict=True):
        if tokens:
            k, v = (torch.cat([whole[text][:, :, :tokens], own], dim=2) for whole, own in ((keys, k), (values, v)))
        mask = texts.mask(q.shape[2], k.shape[2], window, q)
        own = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(own.transpose(1, 2))
    return torch.cat(mixed, dim=1)


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


def line_positions(lengths: Sequence[int], device: torch.device | str, shared: Sequence[Shared] | None = None) -> Tensor:
    """Positions (1, N) of the tokens of a line, from 0 in each text, or from the end of what it shares."""
    begins = [tokens for _, tokens in shared] if shared is not None else [0] * len(lengths)
    parts = [torch.arange(begin, begin + length, device=device) for begin, length in zip(begins, lengths, strict=True)]
    return torch.cat(parts)[None]


class Line(NamedTuple):
    """Rows of a batch as a line of N tokens."""

    ids: Tensor
    """(1, N)."""
    lengths: list[int]
    shared: list[Shared] | None
    places: Tensor
    """(B, S): where each token of the padded batch stands in the line; 0 for padding."""
    kept: Tensor
    """(B, S) True on the tokens that stand there themselves, not as those of another row."""

    def positions(self) -> Tensor:
        """(1, N) in the texts."""
        return line_positions(self.lengths, self.ids.device, self.shared)

    def states(self, trunk: nn.Module) -> Tensor:
        """Last hidden states (N, D)."""
        with packed_line(trunk, self.lengths, self.shared):
            states: Tensor = trunk(input_ids=self.ids, position_ids=self.positions(), use_cache=False).last_hidden_state[0]
        return states


def as_line(ids: Tensor, mask: Tensor, *, share: bool = False) -> Line:
    """Right-padded rows (B, S) and their mask without the padding; `share`: common beginnings stand in the line once."""
    shared = common_beginnings(ids, mask) if share else None
    kept = mask
    if shared is not None:
        begins = torch.tensor([tokens for _, tokens in shared], device=ids.device)
        kept = mask & (torch.arange(ids.shape[1], device=ids.device) >= begins[:, None])
    places = (kept.flatten().cumsum(0) - 1).view_as(ids) * kept
    for row, (text, tokens) in enumerate(shared or ()):
        places[row, :tokens] = places[text, :tokens]
    return Line(ids[kept][None], kept.sum(1).tolist(), shared, places, kept)


def common_beginnings(ids: Tensor, mask: Tensor) -> list[Shared]:
    """What each of the rows (B, S) may take from an earlier one that takes nothing; at least its last token stays its own."""
    lengths = mask.sum(1).tolist()
    # (B, B, S) True where two rows differ or one has ended, and in a last column, so that there is a first such place
    apart = (ids[:, None] != ids[None]) | ~(mask[:, None] & mask[None])
    alike = torch.nn.functional.pad(apart, (0, 1), value=True).byte().argmax(-1).tolist()  # (B, B) tokens in common
    whole: list[int] = []
    found = []
    for row, length in enumerate(lengths):
        tokens, text = max(((min(alike[row][text], length - 1), text) for text in whole), default=(0, 0))
        if tokens >= SHARED_TOKENS:
            found.append(Shared(text, tokens))
        else:
            whole.append(row)
            found.append(NOTHING)
    return found


WINDOWS = ("sliding_window", "attention_chunk_size")
"""Names under which configurations and attention modules hold how many tokens attention looks back over."""


@contextmanager
def _narrow_windows(trunk: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, windows of attention are `tokens` wide at most, so that a small text is longer than they are."""
    holders = {id(holder): holder for module in trunk.modules() for holder in (module, getattr(module, "config", None))}
    found = [
        (holder, name, width)
        for holder in holders.values()
        for name in WINDOWS
        if isinstance(width := getattr(holder, name, None), int) and width > tokens
    ]
    for holder, name, _ in found:
        setattr(holder, name, tokens)
    try:
        yield
    finally:
        for holder, name, width in found:
            setattr(holder, name, width)


def can_pack(trunk: nn.Module) -> bool:
    """Whether a causal trunk gives texts in a line the states that it gives them in padded rows.

    Tried with windows shorter than the text: some models have their window in the mask of padded rows alone, where a line loses it.
    """
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return False
    ids, mask = trial_rows(trunk)
    with torch.no_grad(), evaluating(trunk), _narrow_windows(trunk, 3):
        rows = trunk(input_ids=ids, use_cache=False).last_hidden_state
        expected = rows[mask]
        try:
            got = as_line(ids, mask).states(trunk)
        except Exception:  # whatever a model raises here, it cannot read a line
            return False
    short = rows.dtype != torch.float32
    return torch.allclose(got, expected, rtol=1e-2 if short else 1e-4, atol=1e-2 if short else 1e-5)
