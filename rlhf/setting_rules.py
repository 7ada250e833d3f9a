"""Rules between PPO's settings, the same for a config file's section and for `PPOConfig`. Torch is not imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlhf.config import PPOParams
    from rlhf.ppo.config import PPOConfig

AdvantageEstimator = Literal["gae", "rloo", "grpo"]
WITHOUT_VALUES = ("rloo", "grpo")
"""Estimators whose baseline is the other answers to a prompt: they need several, and no value."""


def check_settings(settings: PPOParams | PPOConfig, mini_batch_size: int) -> None:
    """Raise ValueError where settings contradict each other."""
    batch, accumulated, samples = settings.batch_size, settings.gradient_accumulation_steps, settings.samples_per_prompt
    if batch % (mini_batch_size * accumulated):
        raise ValueError(
            f"batch_size {batch} is not divisible by mini_batch_size {mini_batch_size} "
            f"x gradient_accumulation_steps {accumulated} = {mini_batch_size * accumulated}"
        )
    if batch % samples:
        raise ValueError(f"batch_size {batch} counts answers and is not divisible by samples_per_prompt {samples}")
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
