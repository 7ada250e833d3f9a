"""The SFT loss over the answer tokens of a batch. Pure functions; M answer tokens, D hidden size, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26
"""Numbers of logits that are kept for backward at most (256 MiB in float32)."""

Head = Callable[[Tensor], Tensor]
"""Hidden states (M, D) -> logits (M, V)."""


def answer_loss(states: Tensor, targets: Tensor, head: Head, vocab: int, most_logits: int = MOST_LOGITS) -> Tensor:
    """Summed cross-entropy in nats of the tokens `targets` (M,), from the states (M, D) that predict them; 0 for no token.

    More than `most_logits` numbers of logits are computed in parts, each of them again in backward: they are never there together.
    """
    parts = list(_parts(states, targets, vocab, most_logits))
    if len(parts) == 1:
        return _summed(*parts[0], head)
    return torch.stack([checkpoint(_summed, *part, head, use_reentrant=False) for part in parts]).sum()


@torch.no_grad()
def answer_figures(states: Tensor, targets: Tensor, head: Head, vocab: int, most_logits: int = MOST_LOGITS) -> tuple[float, int, int]:
    """The same sum, the number M of tokens, and how many of them were the likeliest one; without gradients."""
    loss, correct = 0.0, 0
    for some_states, some_targets in _parts(states, targets, vocab, most_logits):
        logits = head(some_states)
        loss += float(F.cross_entropy(logits.float(), some_targets, reduction="sum"))
        correct += int((logits.argmax(-1) == some_targets).sum())
    return loss, len(targets), correct


def _parts(states: Tensor, targets: Tensor, vocab: int, most_logits: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, most_logits // vocab)
    return zip(states.split(size), targets.split(size), strict=True)


def _summed(states: Tensor, targets: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="sum")
