"""The members of an ensemble of readouts: which rows each learns from, and how far apart they are."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from common.readout_settings import ReadoutSettings
from common.sampling import Stream, stream_keys

# P(count <= n) for n = 0, 1, 2 … of Poisson(1); one more is a matter of 1e-16.
_POISSON = tuple(itertools.accumulate(math.exp(-1) / math.factorial(count) for count in range(18)))


def member_weights(weight: Tensor, rows: Tensor, readout: ReadoutSettings, seed: int) -> Tensor:
    """The weight in the loss (B,) for each of the M members, (B, M), or for all of them, (B, 1).

    rows: places in the data set (B,). With `bootstrap` a weight is multiplied by how often a member's resample has the row.
    """
    if not readout.bootstrap:
        return weight[:, None]
    return weight[:, None] * bootstrap_counts(rows, readout.ensemble, seed)


def bootstrap_counts(rows: Tensor, members: int, seed: int) -> Tensor:
    """How often each row (B,) stands in each member's resample, (B, M) int64: Poisson(1), a function of (seed, row, member) alone.

    As the size of the data grows that is drawing with replacement (Oza & Russell 2001).
    """
    keys = torch.stack([stream_keys(seed, 0, rows, member, Stream.BOOTSTRAP) for member in range(members)], 1)
    uniform = ((keys >> 11) & ((1 << 53) - 1)).double() * 2.0**-53  # (B, M) in [0, 1)
    return torch.bucketize(uniform, torch.tensor(_POISSON, dtype=torch.float64, device=rows.device), right=True)


def spread(members: Tensor) -> Tensor:
    """Standard deviation over M members: (B, M) -> (B,)."""
    return members.std(1, correction=0)
