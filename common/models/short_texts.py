"""Attention over short texts in bfloat16 on a CPU, as plain matrix products over several texts of like length.

The CPU's attention kernel computes bfloat16 in blocks of a text and one head, which for a hundred tokens are too small for the matrix
units: its gradient is slower than in float32. Products over all heads of some texts are two to four times as fast, forward and
backward together. As in the kernel logits and softmax are float32, probabilities bfloat16; these are kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

LONGEST = 512
"""Tokens of a text up to which the products win, and what is kept for the gradient is small beside a layer's other states."""
LOGITS_AT_ONCE = 2**20
"""Numbers of logits that are computed together: what stays in a CPU's cache (4 MiB)."""


class Groups(NamedTuple):
    """The texts of a line of N tokens in groups of like length, each padded to its longest; P tokens in all."""

    shapes: list[tuple[int, int]]
    """(G, S) texts and tokens of each group."""
    places: Tensor
    """(P,): where each token stands in the line; 0 for padding, which causality hides."""
    real: Tensor
    """(P, 1) True where a token is no padding."""
    back: Tensor
    """(N,): where each token of the line stands among the P."""

    def take(self, line: Tensor, *, masked: bool = False) -> list[Tensor]:
        """(N, heads, d) -> (G * heads, S, d) of each group; `masked`: zeros for padding."""
        padded = line.flatten(1).index_select(0, self.places)
        if masked:
            padded *= self.real
        parts = padded.unflatten(1, line.shape[1:]).split([count * tokens for count, tokens in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2).flatten(0, 1) for part, shape in zip(parts, self.shapes, strict=True)]

    def put(self, parts: Sequence[Tensor], heads: int) -> Tensor:
        """(G * heads, S, d) of each group -> (N, heads, d)."""
        padded = [part.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1).flatten(1) for part in parts]
        line: Tensor = torch.cat(padded).index_select(0, self.back).unflatten(1, (heads, -1))
        return line


def groups_of_like_length(lengths: Sequence[int], heads: int, device: torch.device | str) -> Groups:
    """Longest texts first, groups of at most `LOGITS_AT_ONCE` logits, at least one text each."""
    begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    shapes, places, real = [], [], []
    while order:
        longest = lengths[order[0]]
        count = max(1, LOGITS_AT_ONCE // (heads * longest**2))
        texts, order = order[:count], order[count:]
        shapes.append((len(texts), longest))
        for text in texts:
            places.append(pad(torch.arange(begins[text], begins[text + 1]), (0, longest - lengths[text])))
            real.append(torch.arange(longest) < lengths[text])
    slots, kept = torch.cat(places), torch.cat(real)
    back = torch.empty(begins[-1], dtype=torch.long)
    back[slots[kept]] = kept.nonzero()[:, 0]
    return Groups(shapes, slots.to(device), kept[:, None].to(device), back.to(device))


def serves(query: Tensor, key: Tensor, lengths: Sequence[int]) -> bool:
    """Whether attention of these is computed here: bfloat16 on a CPU, short texts, as many heads of keys as of queries."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape == key.shape and max(lengths) <= LONGEST


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: Groups, masks: Sequence[Tensor], scale: float) -> Tensor:
    """Attention within each text: (1, heads, N, d) -> (1, N, heads, d). `masks`: added to each group's logits, (S, S) in float32."""
    lines = (part[0].transpose(0, 1) for part in (query, key, value))
    mixed: Tensor = _InGroups.apply(*lines, groups, masks, scale)
    return mixed[None]


class _InGroups(torch.autograd.Function):
    """Queries, keys and values (N, heads, d) -> (N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, masks: Sequence[Tensor], scale: float) -> Tensor:
        mixed: list[Tensor] = []
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for q, k, v, mask in zip(*(groups.take(line) for line in (query, key, value)), masks, strict=True):
                logits = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)
                weights = logits.softmax(-1).to(q.dtype)
                mixed.append(weights @ v)
                kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.scale = groups, scale
        return groups.put(mixed, query.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        kept = ctx.saved_tensors
        for number, mixed in enumerate(ctx.groups.take(gradient, masked=True)):
            q, k, v, weights = kept[4 * number : 4 * number + 4]
            of_logits = torch._softmax_backward_data(mixed @ v.transpose(1, 2), weights, -1, weights.dtype)
            if ctx.scale != 1.0:
                of_logits *= ctx.scale
            parts.append((of_logits @ k, of_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ mixed))
        return *(ctx.groups.put(part, gradient.shape[1]) for part in zip(*parts, strict=True)), None, None, None
