"""What the scripts of both kinds check and read before torch is imported: the model they start from and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from common.devices import check_cuda, check_trainer_devices
from common.errors import UserError, both
from common.launch.workers import starts_ray
from common.model_init import check_buildable, check_fresh_length, check_room
from common.model_source import ModelSource, check_layers, check_length, check_model_source, check_prompt_format, start_config
from common.records import PairRecord, Prompt, ScoreRecord, Splits, read_rows
from reward_model.config import RewardConfig, RewardTestConfig

Kind = Literal["pair", "score"]


def check_models(config: RewardConfig) -> None:
    """Raise UserError where the backbone, the checkpoint to start from or the GPUs are missing or do not fit the settings."""
    if not starts_ray(config.launch):  # its workers may have what this machine lacks
        check_trainer_devices(config.trainer.params)
    named = {"model_name": (config.model_name, "backbone"), "trainer.ckpt_path": (config.trainer.ckpt_path, "reward")}
    for setting, (name, role) in named.items():
        if name is None:
            continue
        source = check_model_source(name, setting=setting, role=role, trust_remote_code=config.trust_remote_code)  # type: ignore[arg-type]
        check_prompt_format(source, config.data.prompt_format, "data.prompt_format")
        check_length(source, config.data.max_length, f"data.max_length {config.data.max_length}")
        check_room(source, config.data.max_length, config.data.prompt_format, "data.max_length")
        if config.data.max_prompt_length is not None:
            check_room(source, config.data.max_prompt_length, config.data.prompt_format, "data.max_prompt_length", answer=False)
    check_layers(config.model_params.layers_not_to_freeze, start_config(config), "model_params")
    if config.model_init is not None and config.trainer.ckpt_path is None:
        check_fresh_length(config.model_init, config.data.max_length, "data.max_length")


def check_fresh_model(config: RewardConfig) -> None:
    """Raise UserError where `model_init` describes no model; training finds that out by building it, this is for `--validate`."""
    if config.model_init is not None and config.trainer.ckpt_path is None:
        check_buildable(config.model_init, config.data.max_length, writes_text=False)


def idle_settings(config: RewardConfig) -> list[str]:
    """Notes on settings that have no effect: those shared with SFT alone, and a limit beyond another."""
    params = config.model_params
    notes = {
        "do_compute_metrics": "every figure of a reward model is computed anyway" if params.do_compute_metrics else "",
        "use_cache": "a reward model generates nothing" if params.use_cache else "",
    }
    lines = [f"model_params.{name} has no effect here: {why}" for name, why in notes.items() if why]
    if (limit := config.data.max_prompt_length) is not None and limit >= config.data.max_length:
        lines.append(f"data.max_prompt_length {limit} has no effect: data.max_length {config.data.max_length} limits every prompt")
    return lines


def read_training_data(config: RewardConfig, kind: Kind) -> Splits:
    """Validated rows; train and validation split are needed."""
    return read_rows(config.data.data_dir, kind, config.data, seed=config.seed, require=("train", "val"))


def read_test_data(config: RewardTestConfig, kind: Kind) -> tuple[ModelSource, Splits]:
    """The model to evaluate and validated rows; the split that the config names is needed."""
    data, name = config.data, tested_model(config)
    if config.cuda:
        check_cuda("cuda", "set cuda: false")
    setting = "test_params.test_model_path" if config.test_params.test_model_path else "model_name"
    return both(
        lambda: check_model_source(name, setting=setting, role="reward", trust_remote_code=config.trust_remote_code),
        lambda: read_rows(data.data_dir, kind, data, seed=config.seed, require=(data.split,)),
    )


def breakdown_values(records: Sequence[PairRecord | ScoreRecord], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The values, as text, of the columns that figures are broken down by, for each row. Raises UserError where a row lacks one."""
    for name in names:
        if lacking := [record for record in records if name not in record.columns]:
            known = ", ".join(sorted({column for record in records for column in record.columns})) or "none"
            raise UserError(
                f"{lacking[0].where}: no column {name}, which test_params.breakdown_by names "
                f"({len(lacking)} of {len(records)} rows lack it; further columns of these rows: {known})"
            )
    return [tuple(str(record.columns[name]) for name in names) for record in records]


def tested_model(config: RewardTestConfig) -> str:
    return config.test_params.test_model_path or config.model_name


def prompt_length(prompt: Prompt) -> int:
    """Characters of question, context and earlier turns."""
    return len(prompt.question) + len(prompt.context) + sum(len(question) + len(answer) for question, answer in prompt.history)
