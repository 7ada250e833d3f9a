"""Rules between PPO's settings, the same for a config file and for the classes of Python. Torch is not imported here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf.config import PPOParams
    from rlhf.ppo.config import PPOConfig

AdvantageEstimator = Literal["gae", "rloo", "grpo"]
WITHOUT_VALUES = ("rloo", "grpo")
"""Estimators whose baseline is the other answers to a prompt: they need several, and no value."""
Combine = Literal["mean", "min", "mean_minus_std"]
"""See `rlhf.reward_pipelines.combine.combined`."""
Normalise = Literal["manifest", "reference", "none"]
"""See `rlhf.reward_pipelines.model.TrainedRewardModel`."""


def check_settings(settings: PPOParams | PPOConfig, mini_batch_size: int) -> None:
    """Raise ValueError where settings contradict each other."""
    batch, accumulated, samples = settings.batch_size, settings.gradient_accumulation_steps, settings.samples_per_prompt
    backward = mini_batch_size * accumulated
    batches = _nearest(batch, math.lcm(backward, samples))
    if batch % backward:
        minibatches = [] if batch % accumulated else _nearest_divisors(mini_batch_size, batch // accumulated)
        raise ValueError(
            f"batch_size {batch} is not divisible by mini_batch_size {mini_batch_size} x gradient_accumulation_steps {accumulated} = "
            f"{backward}; batch_size {batches} is" + (f", or mini_batch_size {_or(minibatches)} divides it" if minibatches else "")
        )
    if batch % samples:
        raise ValueError(
            f"batch_size {batch} counts answers and is not divisible by samples_per_prompt {samples}; batch_size {batches} is, or "
            f"samples_per_prompt {_or(_nearest_divisors(samples, batch))} divides it"
        )
    if settings.use_score_norm and not settings.use_score_scaling:
        raise ValueError("use_score_norm has no effect without use_score_scaling: true")
    estimator = settings.advantage_estimator
    if estimator not in WITHOUT_VALUES:
        return
    if samples < 2:
        raise ValueError(f"advantage_estimator {estimator} compares answers to one prompt: samples_per_prompt {samples} is less than 2")
    if settings.critic_warmup_steps:
        raise ValueError(f"critic_warmup_steps {settings.critic_warmup_steps}: advantage_estimator {estimator} has no value to warm up")
    if settings.whiten_rewards:
        raise ValueError(f"whiten_rewards: advantage_estimator {estimator} takes scores as they are; leave it false")


def _nearest(number: int, factor: int) -> str:
    """The multiples of `factor` on both sides of a number."""
    below = number // factor * factor
    return _or([multiple for multiple in (below, below + factor) if multiple])


def _nearest_divisors(number: int, of: int) -> list[int]:
    """The divisors of `of` that come next below and above a number."""
    divisors = [divisor for divisor in range(1, of + 1) if of % divisor == 0]
    return [*[divisor for divisor in divisors if divisor < number][-1:], *[divisor for divisor in divisors if divisor > number][:1]]


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
