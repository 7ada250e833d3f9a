"""Statistics over the tokens that count. `mask` is True (or 1) on those; everything else never touches a result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Elementwise sum over processes; the identity where there is one."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask, a scalar. What stands outside, NaN included, does not count."""
    return torch.where(mask.bool(), values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean over the mask of all processes, a scalar; 0 where the mask is empty."""
    total, count = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    mean: Tensor = total / count.clamp(min=1)
    return mean


def masked_moments(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (divisor n - 1) over the mask of all processes; the variance of a single token is 0."""
    count = reduce(mask.sum().to(values.dtype))
    mean = reduce(masked_sum(values, mask)) / count.clamp(min=1)
    squares = reduce(masked_sum((values - mean) ** 2, mask))
    return mean, squares / (count - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """(values - mean) * rsqrt(var + 1e-8) inside the mask, 0 outside; a single token becomes 0."""
    mean, var = masked_moments(values, mask, reduce)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8), 0.0)


def masked_rescale(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Unit variance with the mean kept inside the mask, 0 outside; a single token stays as it is."""
    mean, var = masked_moments(values, mask, reduce)
    return torch.where(mask.bool(), (values - mean) * torch.rsqrt(var + 1e-8) + mean, 0.0)
