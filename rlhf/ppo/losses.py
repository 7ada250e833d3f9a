"""PPO's losses. Every tensor has one shape, (B, T) or flat; `mask` is True where a token counts; log-probabilities in nats.

Losses are sums over the mask divided by `count`: the tokens of the whole optimizer step, over all its micro-batches and processes.
That makes the gradient the same however a batch is split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.ppo.masked import masked_sum


class TokenStats(NamedTuple):
    """What the policy says about given tokens, each (N,): log-probability of the token and entropy of the distribution."""

    logprobs: Tensor
    entropy: Tensor | None


def token_stats(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, entropy: bool = False, entropy_gradient: bool = True
) -> TokenStats:
    """Log-probabilities (N,) in float32 of `tokens` (N,) under softmax(logits / temperature), logits (N, V); entropy in nats.

    `entropy_gradient`: False where the entropy is a figure to look at and no term of the loss.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    all_logprobs = logits.log_softmax(-1)
    chosen = all_logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    if not entropy:
        return TokenStats(chosen, None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
        return TokenStats(chosen, -(all_logprobs.exp() * all_logprobs).sum(-1))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_coef: float,
    *,
    dual_clip: float | None = None,
    count: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7) as a loss, and the share of tokens where the clip decides.

    With `dual_clip` c the loss of a token with negative advantage is at most -c * A (Ye et al. 2020, eq. 5).
    """
    count = mask.sum() if count is None else count
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    losses = torch.max(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.min(losses, -advantages * dual_clip), losses)
    return masked_sum(losses, mask) / count, masked_sum((clipped > unclipped).float(), mask) / count


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_coef: float, *, count: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """0.5 * mean of max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip_coef` of the old value; and the share clipped."""
    count = mask.sum() if count is None else count
    clipped = torch.clamp(values, old_values - clip_coef, old_values + clip_coef)
    errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_sum(torch.max(errors, clipped_errors), mask) / count
    return loss, masked_sum((clipped_errors > errors).float(), mask) / count
