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
from common.errors import UserError, both, run_main
from common.launch.workers import starts_ray
from common.notes import say
from common.records import ScoreRecord, question_key
from common.resume import begin, check_data, say_finished
from common.run_length import check_training_length
from common.runs import stage_runs_root
from common.schema import resolve_monitor
from common.score_transform import ScoreTransform
from reward_model.config import RegressionConfig, RewardConfig
from reward_model.inputs import check_fresh_model, check_models, idle_settings, read_training_data
from reward_model.metrics import group_ids, pairs_within


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(RegressionConfig, STAGE_DIR, argv, description=__doc__ or "", resumable=True, measurable=True)
    config = invocation.config
    invocation.print_notes()
    root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "reward_regression")
    resume = begin(invocation, root, "reward_regression")
    if resume is not None and resume.finished:
        say_finished(resume)
        return 0
    for note in idle_settings(config):
        say(note)
    _, splits = both(lambda: check_models(config), lambda: read_training_data(config, "score"))
    for note in [*splits.notes, *check_training_length(invocation, len(splits.train), config.data.batch_size)]:
        say(note)
    scores = scores_of(splits.train)
    transform = ScoreTransform.fit(config.model_params.score_transform, scores)
    check_pairs(config, splits.val)
    check_data(invocation, resume, splits.fingerprint)
    if invocation.validate_only:
        check_fresh_model(config)
        invocation.say_valid(config.data.data_dir, splits.counts)
        return 0

    if starts_ray(config.launch):
        from common.launch.ray import train_on_ray
        from reward_model.regression.train_reward import main as worker

        return train_on_ray(
            worker, argv, config.launch, root=root, resumed=resume and resume.run_dir, timeout_s=config.trainer.process_timeout_s
        )

    from reward_model.regression.objective import score_objective
    from reward_model.training import train

    train(config, splits, score_objective(config, transform, scores), resume, dry_run=invocation.dry_run)
    return 0


def scores_of(rows: Sequence[ScoreRecord]) -> Sequence[float]:
    """The rows' scores."""
    if isinstance(rows, list):
        return [row.score for row in rows]
    return rows.values  # type: ignore[attr-defined, no-any-return]  # those of a large file


def check_pairs(config: RewardConfig, rows: Sequence[ScoreRecord]) -> None:
    """Raise UserError where pair accuracy is to choose checkpoints and validation has no pair."""
    chosen = resolve_monitor(config.trainer.checkpoint.monitor, config.monitored)
    if chosen != "val/pair_accuracy":
        return
    groups = group_ids([question_key(row.prompt) for row in rows])
    if not len(pairs_within(groups, [row.score for row in rows])[0]):
        raise UserError(
            f"trainer.checkpoint.monitor: got {chosen}, but no question of the validation split has two answers of different score; "
            "use val/spearman, say"
        )


if __name__ == "__main__":
    run_main(main)
