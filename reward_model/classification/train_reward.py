"""Train a reward model on preferences: the chosen answer to a question should score higher than the rejected ones.

Reads pairs, trains a transformer with a scalar head on -log sigmoid(chosen - rejected), keeps the checkpoint that validates best and
publishes it as models/latest. It tests nothing: that is test_reward.py.

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
from common.errors import both, run_main
from common.launch.workers import starts_ray
from common.notes import say
from common.resume import begin, check_data, say_finished
from common.run_length import check_training_length
from common.runs import stage_runs_root
from reward_model.classification.margins import check_margins
from reward_model.config import ClassificationConfig
from reward_model.inputs import check_fresh_model, check_models, idle_settings, read_training_data


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(ClassificationConfig, STAGE_DIR, argv, description=__doc__ or "", resumable=True, measurable=True)
    config = invocation.config
    invocation.print_notes()
    root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "reward_classification")
    resume = begin(invocation, root, "reward_classification")
    if resume is not None and resume.finished:
        say_finished(resume)
        return 0
    for note in idle_settings(config):
        say(note)
    _, splits = both(lambda: check_models(config), lambda: read_training_data(config, "pair"))
    about_length = check_training_length(invocation, len(splits.train), config.data.batch_size)
    for note in [*splits.notes, *about_length, *check_margins(splits, config.model_params)]:
        say(note)
    check_data(invocation, resume, splits.fingerprint)
    if invocation.validate_only:
        check_fresh_model(config)
        invocation.say_valid(config.data.data_dir, splits.counts)
        return 0

    if starts_ray(config.launch):
        from common.launch.ray import train_on_ray
        from reward_model.classification.train_reward import main as worker

        return train_on_ray(
            worker, argv, config.launch, root=root, resumed=resume and resume.run_dir, timeout_s=config.trainer.process_timeout_s
        )

    from reward_model.classification.objective import pair_objective
    from reward_model.training import train

    train(config, splits, pair_objective(config), resume, dry_run=invocation.dry_run)
    return 0


if __name__ == "__main__":
    run_main(main)
