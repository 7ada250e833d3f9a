"""Which rows share a forward: rows of like length, so that little of it is padding, and no more than memory holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

FORWARD_TOKENS = {"cpu": 128, "cuda": 4096}
"""What one more forward costs, in tokens of padding: its calls, kernel starts and additions to gradients."""
CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of one forward at most."""


def length_chunks(widths: Tensor, *, weights: Tensor | None = None, most_weight: int | None = None, padded: bool = True) -> list[Tensor]:
    """Rows 0 … B - 1 in groups, the shortest first, whose padded tokens and forwards cost least together.

    `widths` (B, K): tokens of each row in each of K inputs that are padded on their own (a decoder's, an encoder's); a group of n rows
    costs n * (sum of its K largest widths) tokens, `CHUNK_TOKENS` at most unless it is a single row. `weights` (B,): what else adds up
    over a group, to `most_weight` at most. `padded`: False where rows stand one behind the other, and cost what they are long.
    """
    device = widths.device.type
    most_tokens, overhead = (limits.get(device, limits["cpu"]) for limits in (CHUNK_TOKENS, FORWARD_TOKENS))
    order = widths.sum(1).argsort(stable=True)
    sizes = widths[order].tolist()
    weighed = weights[order].tolist() if weights is not None else [0] * len(sizes)
    ends = _best_ends(sizes, weighed, overhead, most_tokens, most_weight, padded)
    return [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _best_ends(
    sizes: Sequence[Sequence[int]], weights: Sequence[int], overhead: int, most_tokens: int, most_weight: int | None, padded: bool
) -> list[int]:
    """Where each group ends, for rows in order: the cheapest split of the first `end` rows, for every `end` (dynamic programming)."""
    cost, begins = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        widest, whole, total, best = [0] * len(sizes[0]), 0, 0, (float("inf"), end - 1)
        for begin in range(end - 1, -1, -1):
            widest = [max(pair) for pair in zip(widest, sizes[begin], strict=True)]
            whole += sum(sizes[begin])
            total += weights[begin]
            tokens = (end - begin) * sum(widest) if padded else whole
            if begin < end - 1 and (tokens > most_tokens or (most_weight is not None and total > most_weight)):
                break
            best = min(best, (cost[begin] + tokens + overhead, begin))
        cost.append(best[0])
        begins.append(best[1])
    ends = [len(sizes)] if sizes else []
    while ends and begins[ends[0]] > 0:
        ends.insert(0, begins[ends[0]])
    return ends
