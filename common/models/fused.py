"""Faster forms of two parts of a model that transformers computes in many small steps, equal to them to float32 rounding.

    attention of GPT-Neo                     written-out softmax(q k' + mask) v  ->  one scaled_dot_product_attention
    tanh-GELU (`gelu_new` and its synonyms)  nine elementwise operations         ->  one, in GPT-Neo with prepacked weights none

Each part's class is exchanged for a subclass without state of its own, and back. Unlike a replaced module or a bound method that
leaves parameter names, weights, configuration, hooks, deep copies and pickles as they are, and works on a model in memory, adapters
and all. Transformers' own registry of attention functions is no way: GPT-Neo does not consult it, and choosing from its table of
classes needs a setting in the configuration that transformers refuses for this model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP, GPTNeoSelfAttention

from common.models.packed import attend_to_own_text, texts_in_line
from common.models.prepacked import PrepackedLinear


class FusedGPTNeoSelfAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention in one kernel: no (B, heads, S, S) weights are kept, and decoding reads no keys beyond a local window.

    Where the weights themselves are asked for, or dropout acts on them, transformers' own code runs. Results differ from it in two
    places. Padding behind a text that is longer than the window sees other padding, and is read by nobody. In a cache that is longer
    than the text (StaticCache), local layers find their window here, which transformers counts from the cache's end.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """States (B, Q, D) -> states (B, Q, D); `attention_mask` (B, 1, Q, K) is added to the logits, as transformers hands it over."""
        packed = texts_in_line() is not None and not output_attentions
        plainly = output_attentions or attention_mask is None or (self.training and self.attn_dropout.p > 0)
        if plainly and not packed:
            plain: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
            return plain
        if torch.is_autocast_enabled(hidden_states.device.type):  # once, not for each of the three
            hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (self._split_heads(layer(hidden_states), self.num_heads, self.head_dim) for layer in projections)
        window = self.config.window_size if self.attention_type == "local" else None
        if packed:
            dropout = self.attn_dropout.p if self.training else 0.0
            own = attend_to_own_text(query, key, value, scale=1.0, window=window, dropout=dropout)
            return self.resid_dropout(self.out_proj(own.flatten(2))), None
        assert attention_mask is not None
        start: int | Tensor = 0  # position of the first query among the keys
        dtype = query.dtype
        if layer_past is not None:
            if dtype == torch.bfloat16 and query.device.type == "cpu":
                # For one query per row the CPU's kernel is three times slower in bfloat16 than in float32.
                query, key, value = query.float(), key.float(), value.float()
            key, value = layer_past.update(key, value, self.layer_id)
            start = layer_past.get_seq_length(self.layer_id) - query.shape[-2]
        mixed = _attend(query, key, value, attention_mask, start, window)
        merged = self._merge_heads(mixed, self.num_heads, self.head_dim).to(dtype)
        return self.resid_dropout(self.out_proj(merged)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, start: int | Tensor, window: int | None) -> Tensor:
    """Causal attention of queries (B, heads, Q, d), the first of which stands at key `start`, to the last `window` keys (None: all).

    GPT-Neo does not scale its logits. Kernels compute them in float32 whatever the inputs' type, as GPT-Neo does.
    """
    if query.shape[-2] == 1 and isinstance(start, int) and window is not None and start >= window:
        key, value = key[..., -window:, :], value[..., -window:, :]
    visible = _visible(mask, query.shape[-2], start, window, query.dtype)
    if visible is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)


# A model makes one mask per forward for all its layers; what becomes of it is made once for each kind of layer, and lives as long.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _visible(mask: Tensor, queries: int, start: int | Tensor, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """The mask (B, 1, Q, K) with causality and window in it; None where it is plain causality, with which kernels skip half the work."""
    if isinstance(start, Tensor):  # a cache that counts on its device: comparing counts would wait for it
        return _make_visible(mask, queries, start, window, dtype)
    version = None if mask.is_inference() else mask._version
    made: dict[Any, Tensor | None] = _made.setdefault(mask, {})
    key = (start, window, dtype, version)
    if key not in made:
        made[key] = _make_visible(mask, queries, start, window, dtype)
    return made[key]


def _make_visible(mask: Tensor, queries: int, start: int | Tensor, window: int | None, dtype: torch.dtype) -> Tensor | None:
    keys = mask.shape[-1]
    # Transformers hides with the lowest number, so that padding sees other padding, never NaN. Half of it stays finite in every kernel.
    lowest = torch.finfo(dtype).min / 2
    if queries == 1 and isinstance(start, int):  # a decoding step: nothing comes later, and the window is a slice
        first = 0 if window is None else max(0, start + 1 - window)
        return mask[..., first:].clamp(min=lowest).to(dtype)
    distance = start + torch.arange(queries, device=mask.device)[:, None] - torch.arange(keys, device=mask.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)  # (Q, K)
    if queries == keys and (window is None or keys <= window) and _adds_nothing(mask, hidden):
        return None
    return mask.clamp(min=lowest).to(dtype).masked_fill(hidden, -torch.inf)


def _adds_nothing(mask: Tensor, hidden: Tensor) -> bool:
    """Whether `mask` is zero wherever causality hides no key, as without padding. False on a GPU, whose queue a look would stop."""
    if mask.device.type != "cpu":
        return False
    # Padding and packed rows show in the last query's line: most masks need no second look.
    return not bool(mask[..., -1, :].any()) and not bool(mask.masked_fill(hidden, 0.0).any())


class _FusedGELU(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 of any shape."""
        return gelu(input, approximate="tanh")


class FusedNewGELU(_FusedGELU, NewGELUActivation):
    """`gelu_new`: GPT-2, GPT-Neo, GPT-J, CodeGen, Phi, gated T5 ..."""


class FusedFastGELU(_FusedGELU, FastGELUActivation):
    """`gelu_fast`, the same function."""


class FusedAccurateGELU(_FusedGELU, AccurateGELUActivation):
    """`gelu_accurate`, the same function."""


class FusedGPTNeoMLP(GPTNeoMLP):
    """GPT-Neo's feed-forward part: its activation is computed with the product before it where weights are prepacked, and is not kept for
    the gradient, which computes it again: a fifth of what a training forward keeps, for one activation more."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """States (..., D) -> states (..., D)."""
        if not isinstance(self.act, _FusedGELU):
            plain: Tensor = super().forward(hidden_states)
            return plain
        if isinstance(self.c_fc, PrepackedLinear):
            states: Tensor = self.dropout(self.c_proj(self.c_fc.then_gelu(hidden_states)))
            return states
        before = self.c_fc(hidden_states)
        after = self.act(before)
        with _computed_anew(after, before):
            product = self.c_proj(after)
        states = self.dropout(product)
        return states


def _computed_anew(after: Tensor, before: Tensor) -> saved_tensors_hooks:
    """Inside, autograd does not keep `after`, the GELU of `before`, which it keeps anyway; the gradient computes it again."""
    kept, place, size = before.detach(), after.data_ptr(), after.numel()  # autograd holds the hooks, which must not hold `after`

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == place and saved.numel() == size else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return gelu(kept, approximate="tanh").view(packed) if isinstance(packed, torch.Size) else packed

    return saved_tensors_hooks(pack, unpack)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    GPTNeoSelfAttention: FusedGPTNeoSelfAttention,
    GPTNeoMLP: FusedGPTNeoMLP,
    NewGELUActivation: FusedNewGELU,
    FastGELUActivation: FusedFastGELU,
    AccurateGELUActivation: FusedAccurateGELU,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
# What of the exchanged classes the subclasses rely on: another version's class with another interface is left as it is.
_INTERFACES = {
    GPTNeoSelfAttention: ("hidden_states", "attention_mask", "layer_past", "use_cache", "output_attentions", "kwargs"),
    GPTNeoMLP: ("hidden_states",),
    NewGELUActivation: ("input",),
    FastGELUActivation: ("input",),
    AccurateGELUActivation: ("input",),
}


def set_fused(model: nn.Module, fused: bool = True) -> tuple[str, ...]:
    """Switch the faster forms of a model's parts on or off, in place; returns notes on what stays slow, and why.

    What fits is told by a module's class, subclasses excluded: they may compute something else. Masks, caches, gradients, recomputed
    activations, adapters and short types work as before. In bfloat16 and float16, where transformers' GELU rounds nine times and the
    fused one once, results differ by that rounding.
    """
    notes: set[str] = set()
    for module in model.modules():
        kind = type(module)
        if not fused:
            module.__class__ = _PLAIN.get(kind, kind)
        elif kind in _FUSED and _interface(kind) != _INTERFACES[kind]:
            notes.add(f"{kind.__name__} has changed in this version of transformers and stays as it is there")
        elif kind in _FUSED:
            module.__class__ = _FUSED[kind]
    if fused:
        notes |= _eager_attention(model)
    if any(isinstance(module, FusedGPTNeoSelfAttention) and module.attn_dropout.p > 0 for module in model.modules()):
        notes.add("attention with dropout on its weights trains as it is in transformers; attention_dropout 0 trains faster")
    return tuple(sorted(notes))


def _interface(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _eager_attention(model: nn.Module) -> set[str]:
    """Notes on models with transformers' eager attention, for which there is no faster form here."""
    if any(isinstance(module, FusedGPTNeoSelfAttention) for module in model.modules()):
        return set()
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    slow = {config.model_type for config in configs if config._attn_implementation == "eager"}
    return {f"{model_type} runs with transformers' eager attention, of which there is no faster form here" for model_type in slow}
