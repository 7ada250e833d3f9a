"""A critic of its own, started from the reward model that PPO maximises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.checkpoint import vocabulary_fingerprint
from common.errors import UserError
from common.models.kinds import backbone_kind
from rlhf.ppo.models import Critic, ModelWithValueHead
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.combine import WeightedSum
from rlhf.reward_pipelines.model import TrainedRewardModel
from rlhf.reward_pipelines.part import RewardPart


def start_critic(model: ModelWithValueHead, tokenizer: PreTrainedTokenizerBase, pipeline: RewardPipeline) -> Critic:
    """A copy of the pipeline's first reward model, whose values are what that model adds to PPO's scores.

    Call it once the pipeline is calibrated. Raises UserError where that model cannot read the policy's ids.
    """
    part, weight = next(weighed_models(pipeline.root))
    scorer: Any = part.scorer
    if vocabulary_fingerprint(scorer.tokenizer) != vocabulary_fingerprint(tokenizer):
        raise UserError(f"ppo_config.critic: got model, but the tokenizer of reward part {part.name} is not the policy's; use head")
    if backbone_kind(scorer.model.config) != backbone_kind(model.config):
        raise UserError(f"ppo_config.critic: got model, but reward part {part.name} is of another kind than the policy; use head")
    mean, scale, transform = part.mean, part.scale, scorer.transform
    if transform.name == "log1p":  # not linear, so a linear head cannot undo it: the scores as the model gives them
        mean, scale = 0.0, 1.0
    else:  # score = raw * transform.scale + transform.shift
        mean, scale = (mean - transform.shift) / transform.scale, scale / transform.scale
    return Critic.from_reward_model(scorer.model, mean=mean, scale=scale, weight=weight).to(model.device)


def weighed_models(part: RewardPart, weight: float = 1.0) -> Iterator[tuple[TrainedRewardModel, float]]:
    """The trained reward models below a part, each with the product of the weights of the sums above it."""
    if isinstance(part, TrainedRewardModel):
        yield part, weight
    weights = part.weights if isinstance(part, WeightedSum) else [1.0] * len(part.members)
    for member, own in zip(part.members, weights, strict=True):
        yield from weighed_models(member, weight * own)
