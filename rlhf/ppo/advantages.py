"""Advantages: generalised advantage estimation with its returns, and two ways to compare several answers to one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ppo.masked import masked_mean, masked_moments

ROUNDING = 1e-5
"""Differences of float32 numbers that are smaller than this share of them may be rounding alone."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): advantages and returns, both (B, T), from rewards and old values (B, T).

        delta_t = r_t + gamma * V_(t+1) - V_t
        A_t     = delta_t + gamma * lam * A_(t+1)
        R_t     = A_t + V_t

    Values outside the mask are 0, so V after the end is 0, also for an answer that was cut off at its largest length.
    """
    values = torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0]) if deltas.shape[1] else deltas.new_zeros(len(deltas))
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def rloo(scores: Tensor, rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, section 2.2): advantages (B, T), one number per answer.

        R_i = score_i - kl_coef * sum over tokens of kl_t
        A_i = R_i - mean of R_j over the `group` - 1 other answers to the prompt

    `scores` (B,); `rewards` (B, T) as `kl_shaped_rewards` gives them, whose sum is R; rows g * group to (g + 1) * group - 1 answer
    one prompt. An answer without any token, which has no row of rewards, counts with its score. The baseline does not depend on
    the answer, so sum_i A_i * grad log p(answer_i) / B is an unbiased gradient of the expected R.
    """
    returns = torch.where(mask.any(1), torch.where(mask, rewards, 0.0).sum(1), scores).view(-1, group)
    others = (returns.sum(1, keepdim=True) - returns) / (group - 1)
    return _on_every_token((returns - others).flatten(), mask)


def grpo(scores: Tensor, mask: Tensor, group: int) -> Tensor:
    """Group-relative advantages (Shao et al. 2024, section 4.1.2), (B, T), one number per answer:

        A_i = (score_i - mean of the group) / (standard deviation of the group + 1e-4)

    `scores` (B,) without KL, which is a term of the loss; the deviation's divisor is `group` - 1. Rows as in `rloo`. Answers of
    one score, up to rounding, get 0.
    """
    groups = scores.view(-1, group)
    centred = groups - groups.mean(1, keepdim=True)
    rounding = centred.abs().amax(1, keepdim=True) <= ROUNDING * groups.abs().amax(1, keepdim=True)
    centred = centred.masked_fill(rounding, 0.0)
    return _on_every_token((centred / (groups.std(1, keepdim=True) + 1e-4)).flatten(), mask)


def are_alike(advantages: Tensor, mask: Tensor, scale: Tensor | float, *, centre: bool) -> bool:
    """Whether advantages (B, T) say nothing: none differs from 0 by more than rounding; with `centre`, from their mean.

    An optimizer that divides by the gradient's size, as Adam does, would make steps of full size of what rounding left. `scale`: how
    large the numbers were that they are differences of. False where there is none.
    """
    centred = advantages - masked_mean(advantages, mask) if centre else advantages
    differs = (torch.where(mask, centred, 0.0).abs() > ROUNDING * scale).any()
    return bool(mask.any()) and not bool(differs)


def _on_every_token(advantages: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, advantages[:, None], 0.0)


def classic_whitened_rewards(rewards: Tensor, mask: Tensor, trailing: Tensor) -> Tensor:
    """Rewards rescaled as the classic trainer did it, (B, T') with T' >= T: padding after an answer is shifted too.

    The classic trainer whitened the zeros of padding along with the rewards, without masking them again, so that they leak
    into the advantages of shorter answers. `trailing` (B,): padded columns after each answer in its layout (the batch's longest
    prompt + answer minus this one). `masked_rescale` is the same without the leak.
    """
    mean, var = masked_moments(rewards, mask)
    width = rewards.shape[1]
    ends = mask_ends(mask) + trailing
    columns = max(width, int(ends.max()))
    padded = torch.nn.functional.pad(torch.where(mask, rewards, 0.0), (0, columns - width))
    whitened = (padded - mean) * torch.rsqrt(var + 1e-8) + mean
    return torch.where(torch.arange(columns, device=rewards.device) < ends[:, None], whitened, 0.0)


def mask_ends(mask: Tensor) -> Tensor:
    """One more than the last True column of each row (B,); 0 for an empty row."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.long)
