"""Statistics over the tokens that count. `mask` is True (or 1) on those; everything else never touches a result."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask, a scalar. What stands outside, NaN included, does not count."""
    return torch.where(mask.bool(), values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask, a scalar; 0 where the mask is empty."""
    return masked_sum(values, mask) / mask.sum().to(values.dtype).clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (divisor n - 1) over the mask; the variance of a single token is 0."""
    count = mask.sum().to(values.dtype)
    mean = masked_sum(values, mask) / count.clamp(min=1)
    squares = masked_sum((values - mean) ** 2, mask)
    return mean, squares / (count - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) * rsqrt(var + 1e-8) inside the mask, 0 outside; a single token becomes 0."""
    mean, var = masked_moments(values, mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8), 0.0)


def masked_rescale(values: Tensor, mask: Tensor) -> Tensor:
    """Unit variance with the mean kept inside the mask, 0 outside; a single token stays as it is."""
    mean, var = masked_moments(values, mask)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8) + mean, 0.0)
