"""Train a reward model on scores: one number per answer, votes or ratings.

Reads scored answers, trains a transformer with a scalar head to predict the (transformed) score, keeps the checkpoint that validates
best and publishes it as models/latest. It tests nothing: that is test_reward.py.

    python train_reward.py --config_file configs/trainer_config.yaml [section.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parents[1])

from common.config import parse_command_line
from common.errors import run_main
from common.prompts import answer_text, render_prompt
from common.score_transform import ScoreTransform
from reward_model.config import RegressionConfig
from reward_model.inputs import check_models, describe, idle_settings, read_training_data


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(RegressionConfig, STAGE_DIR, argv, description=__doc__ or "")
    config = invocation.config
    invocation.print_notes()
    for note in idle_settings(config):
        print(f"note: {note}")
    check_models(config)
    splits = read_training_data(config, "score")
    scores = [record.score for record in splits.train]
    transform = ScoreTransform.fit(config.model_params.score_transform, scores)
    if invocation.validate_only:
        print(describe(config, splits))
        return 0

    from reward_model.regression.dataset import collate_scores, encode_scores
    from reward_model.regression.module import CHOICES, ScoreModule
    from reward_model.training import Objective, train

    objective = Objective(
        stage="reward_regression",
        choices=CHOICES,
        texts=lambda record: (render_prompt(record.prompt), answer_text(record.answer)),
        encode=lambda records, encoder, model: encode_scores(records, encoder, model, transform, config.data.unusable_rows),
        collate=collate_scores,
        module=lambda model, total_steps, val_rows: ScoreModule(
            model,
            config.model_params,
            total_steps,
            transform=transform,
            train_mean=sum(scores) / len(scores),
            validation_rows=val_rows,
        ),
        transform=transform,
    )
    train(config, splits, objective)
    return 0


if __name__ == "__main__":
    run_main(main)
