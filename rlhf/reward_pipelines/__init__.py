"""What turns (prompts, responses) into scores: trained reward models, Python functions, rules, sums and ensembles of them.

Importing this package imports no torch; `check_pipeline` runs before the first model is loaded.
"""

from rlhf.reward_pipelines.build import RewardPipeline, as_pipeline, build_pipeline, check_pipeline
from rlhf.reward_pipelines.part import Answers, RewardPart, RewardResult

__all__ = ["Answers", "RewardPart", "RewardPipeline", "RewardResult", "as_pipeline", "build_pipeline", "check_pipeline"]
