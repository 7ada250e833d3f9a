"""PPO's losses. Every tensor has one shape, (B, T) or flat; `mask` is True where a token counts; log-probabilities in nats.

Losses are sums over the mask divided by `count`: the tokens of the whole optimizer step, over all its micro-batches and processes.
That makes the gradient the same however a batch is split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.ppo.masked import masked_sum

BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**28}
"""Numbers of logits that are worked on at a time: on a CPU as many as its caches hold."""


class TokenStats(NamedTuple):
    """What the policy says about given tokens, each (N,): log-probability of the token and entropy of the distribution."""

    logprobs: Tensor
    entropy: Tensor | None


def token_stats(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, *, entropy: bool = False, entropy_gradient: bool = True
) -> TokenStats:
    """Log-probabilities (N,) in float32 of `tokens` (N,) under softmax(logits / temperature), logits (N, V); entropy in nats.

    `entropy_gradient`: False where the entropy is a figure to look at and no term of the loss. Logits of -inf have probability 0.
    """
    chosen, distribution_entropy = _TokenStats.apply(logits, tokens, temperature, entropy, entropy and entropy_gradient)
    return TokenStats(chosen, distribution_entropy if entropy else None)


class _TokenStats(torch.autograd.Function):
    """Keeps one (N, V) tensor for the gradient, the probabilities, and turns it into the gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, entropy: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        keeps = ctx.needs_input_grad[0]
        probabilities = torch.empty_like(logits, dtype=torch.float32) if keeps else None
        chosen, spread = (torch.zeros(len(logits), device=logits.device) for _ in range(2))
        size = max(1, BLOCK_LOGITS.get(logits.device.type, BLOCK_LOGITS["cpu"]) // logits.shape[-1])
        for block in map(slice, range(0, len(logits), size), range(size, len(logits) + size, size)):
            scaled = logits[block].float() if temperature == 1.0 else logits[block].float() / temperature
            top = scaled.amax(-1, keepdim=True)
            shares = torch.sub(scaled, top, out=None if probabilities is None else probabilities[block]).exp_()
            total = shares.sum(-1, keepdim=True)
            log_total = top + total.log()
            shares /= total
            chosen[block] = (scaled.gather(-1, tokens[block, None]) - log_total).squeeze(-1)
            if entropy:
                # 0 * -inf is no number: a token that cannot come adds nothing.
                spread[block] = (log_total.squeeze(-1) - torch.linalg.vecdot(shares, scaled.clamp(min=-1e30))).clamp(min=0.0)
        ctx.mark_non_differentiable(*(() if entropy_gradient else (spread,)))
        ctx.save_for_backward(probabilities, tokens, spread)
        ctx.temperature, ctx.entropy_gradient, ctx.dtype = temperature, entropy_gradient, logits.dtype
        return chosen, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chosen_gradient: Tensor, spread_gradient: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, tokens, spread = ctx.saved_tensors
        weight = -chosen_gradient[:, None]
        if ctx.entropy_gradient:  # dH / dx = -p (log p + H)
            surprise = torch.where(probabilities > 0, probabilities.log(), 0.0) + spread[:, None]
            weight = weight - surprise * spread_gradient[:, None]
        gradient = probabilities.mul_(weight)
        gradient.scatter_add_(-1, tokens[:, None], chosen_gradient[:, None])
        if ctx.temperature != 1.0:
            gradient /= ctx.temperature
        return gradient.to(ctx.dtype), None, None, None, None


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
