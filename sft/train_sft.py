"""Supervised fine-tuning: teaches a language model to answer, on answer tokens and EOS alone.

    python train_sft.py --config_file configs/trainer_config.yaml [section.key=value ...] [--validate | --dry_run | --resume [PATH]]

Reads and checks config and data first, so that a mistake costs a second; what then happens stands in `training.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parent)  # modules have one import name, whichever folder this runs from

from common.config import parse_command_line
from common.devices import check_trainer_devices
from common.errors import UserError, both, run_main
from common.evaluation.generation_options import generation_options
from common.launch.workers import starts_ray
from common.model_init import check_buildable, check_fresh_length, check_room
from common.model_source import check_layers, check_length, check_model_source, check_prompt_format, start_config
from common.notes import say
from common.records import read_rows
from common.resume import begin, check_data, say_finished
from common.run_length import check_training_length
from common.runs import stage_runs_root
from sft.config import SFTConfig


def check_models(config: SFTConfig) -> None:
    """Raise UserError where the model to start from or the GPUs are missing, or do not fit the settings, or no model takes an option."""
    try:
        generation_options(config.evaluation.generate_params)
    except UserError as error:
        raise UserError(*(f"evaluation.{problem}" for problem in error.problems)) from None
    if not starts_ray(config.launch):  # its workers may have what this machine lacks
        check_trainer_devices(config.trainer.params)
    for setting, name in {"model_name": config.model_name, "trainer.ckpt_path": config.trainer.ckpt_path}.items():
        if name is not None:
            source = check_model_source(name, setting=setting, role="generator", trust_remote_code=config.trust_remote_code)
            check_length(source, config.data.max_length, f"data.max_length {config.data.max_length}")
            check_room(source, config.data.max_length, config.data.prompt_format, "data.max_length")
            if setting == "trainer.ckpt_path":
                check_prompt_format(source, config.data.prompt_format, "data.prompt_format")
    check_layers(config.model_params.layers_not_to_freeze, start_config(config), "model_params")
    if config.model_init is not None and config.trainer.ckpt_path is None:
        check_fresh_length(config.model_init, config.data.max_length, "data.max_length")


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(SFTConfig, STAGE_DIR, argv, description=__doc__, resumable=True, measurable=True)
    config, data = invocation.config, invocation.config.data
    invocation.print_notes()
    root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "sft")
    resume = begin(invocation, root, "sft")
    if resume is not None and resume.finished:
        say_finished(resume)
        return 0
    _, splits = both(
        lambda: check_models(config), lambda: read_rows(data.data_dir, "sft", data, seed=config.seed, require=("train", "val"))
    )
    for note in [*splits.notes, *check_training_length(invocation, len(splits.train), data.batch_size)]:
        say(note)
    check_data(invocation, resume, splits.fingerprint)
    if invocation.validate_only:
        if config.model_init is not None and config.trainer.ckpt_path is None:
            check_buildable(config.model_init, data.max_length, writes_text=True)
        invocation.say_valid(data.data_dir, splits.counts)
        return 0

    if starts_ray(config.launch):
        from common.launch.ray import train_on_ray
        from sft.train_sft import main as worker

        return train_on_ray(
            worker, argv, config.launch, root=root, resumed=resume and resume.run_dir, timeout_s=config.trainer.process_timeout_s
        )

    from sft.training import train  # torch is imported here, after everything that can be checked without it

    train(config, splits, resume, dry_run=invocation.dry_run)
    return 0


if __name__ == "__main__":
    run_main(main)
