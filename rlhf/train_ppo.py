"""PPO: makes an SFT model answer what a reward pipeline prefers, without leaving what it learnt behind.

    python train_ppo.py --config configs/trainer_config.yaml [section.key=value ...] [--validate | --dry_run | --resume [PATH]]

Reads and checks config, prompts and models' files first, so that a mistake costs a second; what then happens stands in `training.py`,
the mathematics in `ppo/`. It tests nothing: that is `test_ppo.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parent)  # modules have one import name, whichever folder this runs from

from common.config import parse_command_line
from common.errors import both, run_main
from common.followers import world_size
from common.launch.workers import check_number_of_workers, processes_to_train, starts_ray
from common.notes import say
from common.resume import begin, check_data, say_finished
from common.run_length import check_save_interval
from common.runs import stage_runs_root
from rlhf.config import PPORunConfig
from rlhf.inputs import check_models, read_prompts, total_steps, training_prompts
from rlhf.notes import idle_settings, lengths_beyond_a_judge, repeated_prompts


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(PPORunConfig, STAGE_DIR, argv, description=__doc__, resumable=True, measurable=True)
    config = invocation.config
    invocation.print_notes()
    if not starts_ray(config.launch):
        check_number_of_workers(config.launch, world_size())
    root = stage_runs_root(config.save_config.checkpoint_dir, config.runs_root, "rlhf")
    resume = begin(invocation, root, "ppo")
    if resume is not None and resume.finished:
        say_finished(resume)
        return 0
    sources, splits = both(lambda: check_models(config), lambda: read_prompts(config))
    prompts = training_prompts(splits, config.data_config)
    processes = processes_to_train(config) or 1
    steps = total_steps(config, len(prompts), processes)
    interval = config.save_config.save_interval if "save_interval" in config.save_config.model_fields_set else None
    setting, length = "save_config.save_interval", ("data_config", "global_epochs", "ppo_config")
    about_saves = check_save_interval(invocation, setting, interval, steps, instead="lower it", length=length)
    about_data = [*splits.notes, *repeated_prompts(config, len(prompts), processes)]
    for note in [*about_data, *about_saves, *idle_settings(config, steps), *lengths_beyond_a_judge(config, sources)]:
        say(note)
    check_data(invocation, resume, splits.fingerprint)
    if invocation.validate_only:
        counts = f"{len(prompts):,} training prompts, {len(splits.val):,} val; {steps:,} PPO steps"
        invocation.say_valid(config.data_config.data_file_path, counts)
        return 0

    if starts_ray(config.launch):
        from common.launch.ray import train_on_ray
        from rlhf.train_ppo import main as worker

        resumed, timeout_s = resume and resume.run_dir, config.ppo_config.process_timeout_s
        return train_on_ray(worker, argv, config.launch, root=root, resumed=resumed, timeout_s=timeout_s)

    from rlhf.training import train  # torch is imported here, after everything that can be checked without it

    train(config, splits, sources, resume, dry_run=invocation.dry_run)
    return 0


if __name__ == "__main__":
    run_main(main)
