"""What a reward model learns from scores."""

from __future__ import annotations

from collections.abc import Sequence

from common.prompts import answer_text, render_prompt
from common.records import ScoreRecord
from common.score_transform import ScoreTransform
from reward_model.config import RegressionConfig
from reward_model.regression.dataset import ScoreRow, collate_scores, encode_scores
from reward_model.regression.module import ScoreModule
from reward_model.training import Objective


def score_objective(config: RegressionConfig, transform: ScoreTransform, scores: Sequence[float]) -> Objective[ScoreRecord, ScoreRow]:
    """`scores`: those of the training rows, which `transform` was fitted to."""
    return Objective(
        stage="reward_regression",
        texts=lambda record: (render_prompt(record.prompt), answer_text(record.answer)),
        encode=lambda records, encoder, entry, cache=None, split="": encode_scores(
            records, encoder, entry, transform, config.data.unusable_rows, cache, split
        ),
        collate=collate_scores,
        module=lambda model, total_steps, val_rows: ScoreModule(
            model,
            config.model_params,
            total_steps,
            transform=transform,
            train_mean=sum(scores) / len(scores),
            validation_rows=val_rows,
            seed=config.seed,
        ),
        transform=transform,
    )
