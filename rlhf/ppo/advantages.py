"""Advantages and returns: generalised advantage estimation (Schulman et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ppo.masked import Reduce, alone, masked_moments


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T), from rewards and old values (B, T).

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


def classic_whitened_rewards(rewards: Tensor, mask: Tensor, trailing: Tensor, reduce: Reduce = alone) -> Tensor:
    """Rewards rescaled as the classic trainer did it, (B, T') with T' >= T: padding after an answer is shifted too.

    The classic trainer whitened the zeros of padding along with the rewards, without masking them again, so that they leak
    into the advantages of shorter answers. `trailing` (B,): padded columns after each answer in its layout (the batch's longest
    prompt + answer minus this one). `masked_rescale` is the same without the leak.
    """
    mean, var = masked_moments(rewards, mask, reduce)
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
