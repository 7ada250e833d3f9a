"""Fixed evaluation: the same held-out prompts and the same sampling noise every time, so that two figures differ by the model alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from common.record_types import PromptRecord
from common.schema import GenerateParams
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.sharing import score_rollout
from rlhf.prompt_order import shuffled_places
from rlhf.reward_pipelines.build import RewardPipeline

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer

NOISE_STREAM = 1 << 40
"""The `step` of evaluation's sampling noise, far from any training step."""
SAMPLE_COLUMNS = ("prompt", "answer", "score", "kl", "ended")


@dataclass(frozen=True)
class Evaluation:
    """Figures and rows for the sample table."""

    figures: dict[str, float]
    samples: list[tuple[Any, ...]]


class Evaluator:
    """Answers the evaluation prompts as training samples them, scores them, and compares with the reference.

    Processes share the prompts, and each gets the figures over all of them.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        pipeline: RewardPipeline,
        prompts: Sequence[EncodedPrompt],
        params: GenerateParams,
        *,
        penalise: Callable[[Sequence[float], Rollout], Tensor],
        seed: int,
        samples: int,
        **decoding: Any,
    ) -> None:
        """`penalise`: scores (B,) of a rollout as training sees them; `decoding`: further arguments of `collect_rollout`."""
        self.trainer, self.pipeline, self.prompts, self.params = trainer, pipeline, prompts, params
        self.penalise, self.seed, self.samples, self.decoding = penalise, seed, samples, decoding

    def __call__(self) -> Evaluation:
        ids = [prompt.ids for prompt in self.prompts]
        rollout = self.trainer.rollout_of_all(ids, self.params, seed=self.seed, step=NOISE_STREAM, **self.decoding)
        with self.trainer.sharding.gathered(*self.pipeline.networks):
            result, _ = score_rollout(self.trainer.runtime, self.pipeline, self.prompts, rollout)
        scores = result.scores
        kl = self.trainer.sampled_kl(rollout, self.params.temperature)
        texts = Counter(rollout.texts)
        figures = {
            "eval/score": fmean(scores),
            "eval/penalised_score": float(self.penalise(scores, rollout).mean()),
            "eval/kl": fmean(kl),
            "eval/eos_rate": fmean(rollout.ended),
            "eval/length": fmean(map(len, rollout.responses)),
            "eval/distinct_share": len(texts) / len(rollout),
            "eval/commonest_share": max(texts.values()) / len(rollout),
            **{f"eval/reward/{name}": fmean(values) for name, values in result.components.items()},
        }
        shown = range(min(self.samples, len(rollout)))
        rows = [
            (self.prompts[row].record.prompt.question, rollout.texts[row], round(scores[row], 4), round(kl[row], 4), rollout.ended[row])
            for row in shown
        ]
        return Evaluation(figures, rows)


def choose_evaluation_prompts(records: Sequence[PromptRecord], count: int, seed: int) -> list[PromptRecord]:
    """`count` records at most, drawn by the seed."""
    return [records[index] for index in sorted(shuffled_places(len(records), seed)[:count].tolist())]
