"""Losses over pairs of scores. Pure functions; P pairs, N questions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Negative log-likelihood of each preference, (P,), in nats (Bradley & Terry 1952).

    d = chosen - rejected - margin
    loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d)

    chosen, rejected: scores (P,). margin (P,): how much better the chosen answer should score before a pair counts as settled
    (Touvron et al. 2023, eq. 2). label_smoothing e: probability that a preference is taken as reversed.
    """
    difference = chosen - rejected - margin
    loss = -logsigmoid(difference)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * logsigmoid(-difference)
    return loss


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Square of each pair's mean score, (P,): keeps scores near 0, which the preference alone leaves free (Eisenstein et al. 2023)."""
    return ((chosen + rejected) / 2.0) ** 2


def pair_loss(
    chosen: Tensor, rejected: Tensor, weight: Tensor, margin: Tensor, *, label_smoothing: float = 0.0, centring_coef: float = 0.0
) -> Tensor:
    """Weighted sum over pairs of the preference loss and the centring term, a scalar; divide by the number of questions.

    All tensors are (P,), or (P, M) and (P, 1) for M models that are trained together. `weight` is 1 / K for each of the K pairs of one
    question, so that a question counts once, however many of its answers were rejected; times the pair's importance, where its margin
    says how much it counts (Wang et al. 2024, HelpSteer2-Preference).
    """
    loss = bradley_terry_loss(chosen, rejected, margin, label_smoothing)
    if centring_coef:
        loss = loss + centring_coef * centring_penalty(chosen, rejected)
    return torch.sum(weight * loss)
