"""The classic PPO trainer for language models: `from rlhf.ppo import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead`."""

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from rlhf.ppo.trainer import NonFiniteError, PPOTrainer

__all__ = ["AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead", "NonFiniteError", "PPOConfig", "PPOTrainer"]
