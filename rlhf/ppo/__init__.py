"""The classic PPO trainer for language models: `from rlhf.ppo import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead`.

`docs/migrating_from_trl_ppo.md` tells what is as in trl 0.11.4, and what is not.
"""

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.length_sampler import LengthSampler
from rlhf.ppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, create_reference_model
from rlhf.ppo.trainer import NonFiniteError, PPOTrainer

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "LengthSampler",
    "NonFiniteError",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
]
