"""Predict the scores of a split with a trained reward model and say whether it can be trusted.

Writes a CSV of target and predicted score of every answer, in the data's units (continued where it stopped when started again), and a
summary: errors against always predicting the mean training score, correlations, order of the answers to one question, intervals by
question, dependence on length, padding and batch order. It trains nothing; of the train split it reads the mean score.

    python test_reward.py --config_file configs/test_config.yaml [section.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parents[1])

from common.config import parse_command_line
from common.errors import run_main
from common.evaluation.csv_log import add_resume_option
from common.model_source import ModelSource
from common.records import ScoreRecord, question_key
from reward_model.config import RewardTestConfig
from reward_model.inputs import breakdown_values, prompt_length, read_test_data, tested_model
from reward_model.regression.report import ScoredAnswer, score_report

if TYPE_CHECKING:
    from common.models.reward import RewardScorer

COLUMNS = ("question", "answer", "target_score", "pred_score", "mse")


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(RewardTestConfig, STAGE_DIR, argv, description=__doc__ or "", add_options=add_resume_option)
    config = invocation.config
    invocation.print_notes()
    source, splits = read_test_data(config, "score")
    records: Sequence[ScoreRecord] = splits.split(config.data.split)
    values = breakdown_values(records, config.test_params.breakdown_by)
    title = f"{tested_model(config)}: {len(records)} answers, {config.data.split} split of {config.data.data_dir}"
    for note in [*splits.notes, *order_alone(source)]:
        print(f"note: {note}")
    if not splits.train:
        print("no train split: the baseline is the mean of the scored split itself, which no model could have known")
    if invocation.validate_only:
        invocation.say_valid(title)
        return 0

    from reward_model import evaluation

    log = evaluation.open_log(config, source, splits.fingerprint, COLUMNS, only_resume=invocation.options.only_resume)
    scorer = evaluation.load_scorer(config)
    for start in range(len(log.rows), len(records), config.test_params.save_steps):
        log.append(scored_rows(scorer, records[start : start + config.test_params.save_steps]))
        print(f"{len(log.rows)} of {len(records)} answers scored", flush=True)
    for note in scorer.encoder.take_notes(config.data.split, remedy="raise data.max_length or data.max_prompt_length"):
        print(f"note: {note}")

    scored = [
        ScoredAnswer(
            question=question_key(record.prompt),
            target=record.score,
            predicted=float(row["pred_score"]),
            length=len(record.answer),
            prompt_length=prompt_length(record.prompt),
            spread=float(row["spread"]) if "spread" in row else None,
            values=row_values,
        )
        for record, row, row_values in zip(records, log.rows, values, strict=True)
    ]
    title = "\n".join([title, *(f"note: {note}" for note in order_alone(source))])
    known = splits.train or records
    train_mean = sum(record.score for record in known) / len(known)
    differences = evaluation.invariance(scorer, [(record.prompt, record.answer) for record in records], config.seed)
    report = score_report(
        scored, train_mean, differences, config.test_params.bootstrap_samples, config.seed, title, config.test_params.breakdown_by
    )
    evaluation.publish(report, log, config, "reward_regression")
    return 0


def scored_rows(scorer: RewardScorer, records: Sequence[ScoreRecord]) -> list[dict[str, object]]:
    """CSV rows of answers. `mse` is the squared error of the row, `spread` the standard deviation of an ensemble's members."""
    judged = scorer.judge([record.prompt for record in records], [record.answer for record in records])
    return [
        {
            "question": record.prompt.question,
            "answer": record.answer,
            "target_score": record.score,
            "pred_score": predicted.score,
            "mse": (predicted.score - record.score) ** 2,
        }
        | ({"spread": predicted.spread} if len(predicted.members) > 1 else {})
        for record, predicted in zip(records, judged, strict=True)
    ]


def order_alone(source: ModelSource) -> list[str]:
    """A line on what to look at where the model never saw a score."""
    if source.manifest is None or source.manifest.stage != "reward_classification":
        return []
    return [
        "this model was trained on pairs (reward_classification): its scores order answers, on a scale of their own, so errors, R2 and "
        "calibration say nothing about it; look at pair accuracy and Spearman"
    ]


if __name__ == "__main__":
    run_main(main)
