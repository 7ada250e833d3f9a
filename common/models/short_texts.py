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


class Group(NamedTuple):
    """Some texts of a line, padded to the longest."""

    places: Tensor
    """(G, S): where each token stands in the line; 0 for padding, which causality hides."""
    real: Tensor
    """(G, S) True where a token is no padding."""

    def take(self, line: Tensor) -> Tensor:
        """(N, heads, d) -> (G * heads, S, d)."""
        return line[self.places].transpose(1, 2).flatten(0, 1)

    def put(self, into: Tensor, padded: Tensor) -> None:
        """Write (G * heads, S, d) into a line (N, heads, d)."""
        rows = padded.unflatten(0, (len(self.places), -1)).transpose(1, 2)
        into[self.places[self.real]] = rows[self.real]


def groups_of_like_length(lengths: Sequence[int], heads: int, device: torch.device | str) -> list[Group]:
    """The texts of a line, the longest first, in groups of at most `LOGITS_AT_ONCE` logits, at least one text each."""
    begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
    groups = []
    while order:
        longest = lengths[order[0]]
        count = max(1, LOGITS_AT_ONCE // (heads * longest**2))
        texts, order = order[:count], order[count:]
        places = [pad(torch.arange(begins[text], begins[text + 1]), (0, longest - lengths[text])) for text in texts]
        real = torch.arange(longest) < torch.tensor([[lengths[text]] for text in texts])
        groups.append(Group(torch.stack(places).to(device), real.to(device)))
    return groups


def serves(query: Tensor, key: Tensor, lengths: Sequence[int]) -> bool:
    """Whether attention of these is computed here: bfloat16 on a CPU, short texts, as many heads of keys as of queries."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape == key.shape and max(lengths) <= LONGEST


def attend_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], masks: Sequence[Tensor], scale: float) -> Tensor:
    """Attention within each text: (1, heads, N, d) -> (1, N, heads, d). `masks`: added to each group's logits, (S, S) in float32."""
    lines = (part[0].transpose(0, 1) for part in (query, key, value))
    mixed: Tensor = _InGroups.apply(*lines, groups, masks, scale)
    return mixed[None]


class _InGroups(torch.autograd.Function):
    """Queries, keys and values (N, heads, d) -> (N, heads, d)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], masks: Sequence[Tensor], scale: float
    ) -> Tensor:
        mixed = torch.empty(query.shape, dtype=query.dtype)
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for group, mask in zip(groups, masks, strict=True):
                q, k, v = (group.take(line) for line in (query, key, value))
                logits = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)
                weights = logits.softmax(-1).to(q.dtype)
                group.put(mixed, weights @ v)
                kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.groups, ctx.scale = groups, scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [torch.empty(gradient.shape, dtype=gradient.dtype) for _ in range(3)]
        kept = ctx.saved_tensors
        for number, group in enumerate(ctx.groups):
            q, k, v, weights = kept[4 * number : 4 * number + 4]
            mixed = group.take(gradient) * group.real.repeat_interleave(gradient.shape[1], 0)[..., None]
            of_value = weights.transpose(1, 2) @ mixed
            of_logits = torch._softmax_backward_data(mixed @ v.transpose(1, 2), weights, -1, weights.dtype)
            if ctx.scale != 1.0:
                of_logits *= ctx.scale
            for line, part in zip(gradients, (of_logits @ k, of_logits.transpose(1, 2) @ q, of_value), strict=True):
                group.put(line, part)
        return *gradients, None, None, None
