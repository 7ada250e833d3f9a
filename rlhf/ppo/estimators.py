"""Advantage estimators, from which `advantage_estimator` chooses.

Everything else of a step is the same for all of them: the clipped objective, and a loss that is the sum over tokens divided by the
tokens of the whole optimizer step, which makes it independent of micro-batches and processes. The papers divide otherwise:

- RLOO sums over an answer's tokens and averages over answers. That is this loss times the mean answer length of the optimizer step:
  the same direction, and the same step of Adam.
- GRPO averages within each answer first (1 / |o_i|), so that a token of a long answer weighs less. Here every token weighs the same, as
  in DAPO (Yu et al. 2025), since otherwise wrong answers are punished less the longer they are.

GAE's advantages are whitened over the batch. Those of RLOO and GRPO are centred in their groups already; to whiten them again would
mix in the scale of other prompts and, tokens being counted, shift long answers against short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf.ppo.advantages import gae, grpo, rloo
from rlhf.ppo.config import PPOConfig
from rlhf.setting_rules import AdvantageEstimator

Estimate = Callable[[Tensor, Tensor, Tensor, Tensor, PPOConfig], tuple[Tensor, Tensor | None]]
"""(scores (B,), rewards (B, T), values (B, T), mask (B, T), settings) -> advantages (B, T), and the returns (B, T) that values are
trained towards, or None where no value is."""


@dataclass(frozen=True)
class Estimator:
    """How a step's advantages are made, and what it needs for that."""

    estimate: Estimate
    reads_values: bool = False
    """Whether there is a value head or critic to read and to train."""
    whitens: bool = False
    """Whether advantages are whitened over the batch of all processes."""
    kl_in_loss: bool = False
    """KL from the reference enters the loss, as kl_coef times k3 per token, and not the rewards. (The gradient of k3 over sampled
    tokens is that of KL(reference || policy).)"""


ESTIMATORS: dict[AdvantageEstimator, Estimator] = {
    "gae": Estimator(
        lambda scores, rewards, values, mask, settings: gae(rewards, values, mask, settings.gamma, settings.lam),
        reads_values=True,
        whitens=True,
    ),
    "rloo": Estimator(lambda scores, rewards, values, mask, settings: (rloo(scores, rewards, mask, settings.samples_per_prompt), None)),
    "grpo": Estimator(
        lambda scores, rewards, values, mask, settings: (grpo(scores, mask, settings.samples_per_prompt), None), kl_in_loss=True
    ),
}
