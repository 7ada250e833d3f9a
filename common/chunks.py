"""Which rows share a forward: rows of like length, so that little of it is padding, and no more than memory holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORWARD_TOKENS = {"cpu": 128, "cuda": 4096}
"""What one more forward costs, in tokens of padding: its calls, kernel starts and additions to gradients."""
CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of one forward at most."""


def length_chunks(
    widths: Tensor, *, weights: Tensor | None = None, most_weight: int | None = None, spared: Tensor | None = None
) -> list[Tensor]:
    """Rows 0 … B - 1 in groups, the shortest first, whose padded tokens and forwards cost least together.

    `widths` (B, K): tokens of each row in each of K inputs that are padded on their own (a decoder's, an encoder's); a group of n rows
    costs n * (sum of its K largest widths) tokens, `CHUNK_TOKENS` at most unless it is a single row. `weights` (B,): what else adds up
    over a group, to `most_weight` at most. `spared` (B,): rows are not padded but stand one behind the other, cost what they are long,
    and stay in their order; so many tokens a row need not have where the row before it is in its group.
    """
    device = widths.device.type
    most_tokens, overhead = (limits.get(device, limits["cpu"]) for limits in (CHUNK_TOKENS, FORWARD_TOKENS))
    order = widths.sum(1).argsort(stable=True) if spared is None else torch.arange(len(widths), device=widths.device)
    sizes = widths[order].tolist()
    weighed = weights[order].tolist() if weights is not None else [0] * len(sizes)
    ends = _best_ends(sizes, weighed, overhead, most_tokens, most_weight, spared.tolist() if spared is not None else None)
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _best_ends(
    sizes: Sequence[Sequence[int]],
    weights: Sequence[int],
    overhead: int,
    most_tokens: int,
    most_weight: int | None,
    spared: Sequence[int] | None,
) -> list[int]:
    """Where each group ends, for rows in order: the cheapest split of the first `end` rows, for every `end` (dynamic programming)."""
    cost, begins = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        widest, whole, total, best = [0] * len(sizes[0]), 0, 0, (float("inf"), end - 1)
        for begin in range(end - 1, -1, -1):
            widest = [max(pair) for pair in zip(widest, sizes[begin], strict=True)]
            whole += sum(sizes[begin])
            if spared is not None and begin + 1 < end:
                whole -= spared[begin + 1]
            total += weights[begin]
            tokens = (end - begin) * sum(widest) if spared is None else whole
            if begin < end - 1 and (tokens > most_tokens or (most_weight is not None and total > most_weight)):
                break
            best = min(best, (cost[begin] + tokens + overhead, begin))
        cost.append(best[0])
        begins.append(best[1])
    ends = [len(sizes)] if sizes else []
    while ends and begins[ends[0]] > 0:
        ends.insert(0, begins[ends[0]])
    return ends
