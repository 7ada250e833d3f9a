"""KL divergence from the reference: estimators per token, and the coefficient that weighs it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLPenalty = Literal["kl", "abs", "mse", "k3", "full"]


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, penalty: KLPenalty = "kl") -> Tensor:
    """KL estimate of each sampled token, in nats, shaped as the arguments; with d = logprobs - ref_logprobs:

        kl    d                     (k1: unbiased, may be negative)
        abs   |d|
        mse   d^2 / 2               (k2)
        k3    exp(-d) - 1 + d       (unbiased, never negative; Schulman 2020)

    `full` needs whole distributions: `full_kl`.
    """
    difference = logprobs - ref_logprobs
    if penalty == "kl":
        return difference
    if penalty == "abs":
        return difference.abs()
    if penalty == "mse":
        return 0.5 * difference.square()
    if penalty == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_penalty {penalty} is no estimator per sampled token; expected kl, abs, mse or k3")


def full_kl(all_logprobs: Tensor, ref_all_logprobs: Tensor) -> Tensor:
    """Exact KL(policy || reference) per token, summed over the vocabulary: (..., V) twice -> (...). Never negative.

    Tokens that cannot come (log-probability -inf) add nothing.
    """
    probabilities = all_logprobs.exp()
    return torch.where(probabilities > 0, probabilities * (all_logprobs - ref_all_logprobs), 0.0).sum(-1)


def adapted_kl_coef(coef: float, kl: float, target: float, answers: int, horizon: float) -> float:
    """The adaptive controller of Ziegler et al. 2019, section 2.2: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon).

    `kl`: nats per answer, mean over the answers of all processes; `answers`: how many those are.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * answers / horizon)
