"""llm-on-ray's configs: sections General, Dataset and Training, read as the settings of our stages.

Each of their keys stands in a table with what it is called in every stage. A key that has no place here is a problem (a line that says
what to do) or without effect (a note that says why). Their `.conf` files are Python literals that YAML reads as well, but for `None`.
Relative paths in these sections count from the working directory, as they did there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from common.config_yaml import MarkedData
from common.errors import UserError
from common.schema import CommandLineValue
from common.schema_types import KeyPath, dotted

Stage = Literal["sft", "reward", "ppo"]

NO_EFFECT, REFUSED = "no effect", "refused"


class Row(NamedTuple):
    """What a key of theirs is in each stage: the path of a setting, `NO_EFFECT` or `REFUSED`."""

    sft: str
    reward: str
    ppo: str
    why: str = ""
    """Why it has no effect or what to do instead; else what to know about it."""
    read: Callable[[Any], Any] = lambda value: value
    """Our value for theirs."""
    quiet: tuple[Any, ...] = ()
    """Values (beside null) that ask for nothing."""


def _of_trainer(path: str, ppo: str, why: str = "", **more: Any) -> Row:
    """The same setting in SFT and reward models."""
    return Row(path, path, ppo, why, **more)


def _nowhere(cell: str, why: str, **more: Any) -> Row:
    return Row(cell, cell, cell, why, **more)


def _path(value: Any) -> Any:
    return CommandLineValue(value) if isinstance(value, str) else value


def _choice(meaning: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """What a word stands for, in any letters; other values as they are, for the schema to refuse."""

    def read(value: Any) -> Any:
        key = value.lower() if isinstance(value, str) else value
        return meaning.get(key, value) if isinstance(key, str | bool) else value

    return read


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _adapters(value: Any) -> Any:
    """`lora_config` without its task, which the stage decides."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key != "task_type" and item is not None}


def _resources(value: Any) -> Any:
    """`resources_per_worker` without devices of which none are asked for."""
    return {key: item for key, item in value.items() if item or key in ("CPU", "GPU")} if isinstance(value, dict) else value


_PPO_ALONE = "it belongs to PPO (rlhf/train_ppo.py)"
_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_hf": "AdamW",
    "adamw": "AdamW",
    "adam": "Adam",
    "adafactor": "Adafactor",
    "sgd": "SGD",
}
_PRECISIONS = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_STRATEGIES = {f"{device}{mode}": name for mode, name in (("fsdp", "fsdp"), ("deepspeed", "deepspeed")) for device in ("", "cpu_", "gpu_")}

KEYS: dict[str, Row] = {
    "General.base_model": _of_trainer("model_name", REFUSED, "PPO's policy is `General.model_name`", read=_path),
    "General.model_name": Row(REFUSED, REFUSED, "ppo_config.model_name", "SFT and reward models have `General.base_model`", read=_path),
    "General.model_pretrain": Row(
        REFUSED, REFUSED, "ppo_config.model_pretrain", "SFT and reward models start from `trainer.ckpt_path`", read=_path
    ),
    "General.rm_name": Row(REFUSED, REFUSED, "reward_config.reward_model_name", _PPO_ALONE, read=_path),
    "General.rm_pretrain": Row(REFUSED, REFUSED, "reward_config.rm_pretrain", _PPO_ALONE, read=_path),
    "General.tokenizer_name": _nowhere(REFUSED, "a model is read with the tokenizer of its own directory; remove it"),
    "General.output_dir": _of_trainer(
        "trainer.checkpoint.dirpath", "save_config.checkpoint_dir", "folder of runs, each with log, checkpoints and final model", read=_path
    ),
    "General.checkpoint_dir": _of_trainer(
        "trainer.checkpoint.dirpath", "save_config.checkpoint_dir", "checkpoints stand in the run's folder, below `output_dir`", read=_path
    ),
    "General.tracking_dir": _nowhere(
        "tensorboard", "any path is `true`: TensorBoard's files stand in the run's folder", read=lambda _: True
    ),
    "General.report_to": _nowhere("tensorboard", "`tensorboard` is `true`", read=_choice({"none": False, "tensorboard": True})),
    "General.resume_from_checkpoint": _nowhere(REFUSED, "say it on the command line: `--resume PATH`"),
    "General.save_strategy": _of_trainer(
        NO_EFFECT,
        NO_EFFECT,
        "`trainer.checkpoint.every_n_train_steps` and PPO's `save_config.save_interval` say when checkpoints are written",
    ),
    "General.config.trust_remote_code": _nowhere("trust_remote_code", ""),
    "General.config.use_auth_token": _nowhere(REFUSED, "a key belongs into the environment (HF_TOKEN)", quiet=(False, "false")),
    "General.lora_config": _of_trainer("model_params.lora", "ppo_config.lora", "without its `task_type`", read=_adapters),
    "General.deltatuner_config": _nowhere(REFUSED, "deltatuner is not used here; `lora_config` trains adapters"),
    "General.enable_gradient_checkpointing": _of_trainer("model_params.gradient_checkpointing", "ppo_config.gradient_checkpointing"),
    "General.gpt_base_model": _nowhere(NO_EFFECT, "it chose an older transformers"),
    "General.gaudi_config_name": _nowhere(REFUSED, "Gaudi's devices are not supported"),
    "General.attn_softmax_bf16": _nowhere(REFUSED, "Gaudi's devices are not supported", quiet=(False,)),
    "General.use_flash_attention": _nowhere(REFUSED, "Gaudi's devices are not supported", quiet=(False,)),
    "Dataset.train_file": _of_trainer("data.data_dir", "data_config.data_file_path", "a hub data set is `hf:OWNER/NAME`", read=_path),
    "Dataset.validation_file": _of_trainer("data.validation_file", "data_config.validation_file", read=_path),
    "Dataset.validation_split_percentage": _of_trainer(
        "data.validation_split_percentage", "data_config.validation_split_percentage", "whole questions are held out, by `seed`"
    ),
    "Dataset.max_length": _of_trainer(
        "data.max_length", "data_config.max_prompt_length", "tokens of prompt and answer; in PPO of the prompt"
    ),
    "Dataset.max_seq_length": _of_trainer("data.max_length", "data_config.max_prompt_length", "`Dataset.max_length` comes first"),
    "Dataset.max_source_length": Row(
        NO_EFFECT, "data.max_prompt_length", "data_config.max_prompt_length", "in SFT `data.max_length` alone limits a prompt"
    ),
    "Dataset.group": Row(
        "data.batching",
        NO_EFFECT,
        NO_EFFECT,
        "`true` is `packed`, `false` is `random`; rows stay whole and do not see each other; SFT alone packs",
        read=_choice({True: "packed", False: "random"}),
    ),
    "Dataset.block_size": _nowhere(NO_EFFECT, "a packed line has `data.max_length` tokens"),
    "Dataset.shuffle": _nowhere(NO_EFFECT, "rows are shuffled anew in each epoch, by `seed`", quiet=(True,)),
    "Dataset.preprocessing_num_workers": _nowhere(NO_EFFECT, "all cores tokenize, once, and the ids are kept"),
    "Dataset.padding_side": _nowhere(NO_EFFECT, "padding is never learnt, on either side"),
    "Dataset.padding": _nowhere(NO_EFFECT, "padding is never learnt", quiet=(True,)),
    "Dataset.truncation_side": _nowhere(NO_EFFECT, "prompts lose their end, dialogues their oldest turns"),
    "Dataset.truncation": _nowhere(NO_EFFECT, "`truncate_prompt` says whether prompts are cut", quiet=(True,)),
    "Dataset.mask_input": _nowhere(REFUSED, "the loss is on answers alone; set it to true or remove it", quiet=(True,)),
    "Dataset.mask_response": _nowhere(NO_EFFECT, "every token of an answer is learnt", quiet=(True,)),
    "Dataset.data_preprocess_type": _nowhere(NO_EFFECT, "`prompt_format` says how prompts are written: `qa` or `chat`"),
    "Training.optimizer": _of_trainer(
        "model_params.optimizer",
        "ppo_config.optimizer",
        "AdamW, Adam, Adafactor and SGD, in transformers' spelling too",
        read=_choice(_OPTIMIZERS),
    ),
    "Training.learning_rate": _of_trainer("model_params.learning_rate", "ppo_config.learning_rate"),
    "Training.lr_scheduler": _of_trainer("model_params.lr_scheduler", "ppo_config.lr_schedule", "without a warm-up, as there"),
    "Training.weight_decay": _of_trainer("model_params.weight_decay", "ppo_config.weight_decay", "of matrices, not of norms and biases"),
    "Training.experience_batch_size": Row(
        REFUSED, REFUSED, "ppo_config.batch_size", "PPO's answers per step and worker; elsewhere it is `batch_size`"
    ),
    "Training.batch_size": _of_trainer("data.batch_size", "ppo_config.batch_size", "rows per worker"),
    "Training.gradient_accumulation_steps": _of_trainer("trainer.params.accumulate_grad_batches", "ppo_config.gradient_accumulation_steps"),
    "Training.epochs": _of_trainer("trainer.params.max_epochs", "global_epochs", "in PPO passes over the prompts"),
    "Training.max_train_steps": _of_trainer(
        "trainer.params.max_steps", "ppo_config.steps", "with it, `epochs` does not end an SFT or reward run"
    ),
    "Training.training_iteration": Row(REFUSED, REFUSED, "ppo_config.steps", "PPO's steps; elsewhere it is `max_train_steps`"),
    "Training.kl_coeff": Row(REFUSED, REFUSED, "ppo_config.init_kl_coef", f"{_PPO_ALONE}, and stays fixed there (`adap_kl_ctrl: false`)"),
    "Training.seed": _nowhere("seed", ""),
    "Training.mixed_precision": _of_trainer(
        "trainer.params.precision",
        "ppo_config.mixed_precision",
        "weights stay float32: `bf16` is `bf16-mixed`, `fp16` is `16-mixed`; PPO has `no` and `bf16`",
    ),
    "Training.device": Row(
        "trainer.params.accelerator", "trainer.params.accelerator", NO_EFFECT, "PPO takes the GPU that its process sees", read=_lower
    ),
    "Training.num_training_workers": _nowhere("launch.num_training_workers", "with `launch.engine: ray`"),
    "Training.resources_per_worker": _nowhere("launch.resources_per_worker", "CPU and GPU", read=_resources),
    "Training.accelerate_mode": _of_trainer(
        "trainer.params.strategy",
        REFUSED,
        "FSDP is `fsdp`, DeepSpeed `deepspeed` (ZeRO-3, requirements-deepspeed.txt), both of two workers or more; DDP is how processes "
        "train together anyway; PPO is sharded by accelerate's own file (rlhf/configs/accelerate)",
        read=_choice(_STRATEGIES),
        quiet=("DDP", "CPU_DDP", "GPU_DDP"),
    ),
    "Training.deepspeed_config_file": _nowhere(
        NO_EFFECT, "DeepSpeed spreads weights, gradients and optimizer (ZeRO-3), and moves nothing to the CPU or a disk", quiet=("",)
    ),
    "Training.logging_steps": _of_trainer("trainer.params.log_every_n_steps", NO_EFFECT, "PPO logs every step"),
    "Training.hpu_execution_mode": _nowhere(NO_EFFECT, "Gaudi's devices are not supported"),
    "Training.pipelining_fwd_bwd": _nowhere(NO_EFFECT, "Gaudi's devices are not supported", quiet=(False,)),
    "failure_config.max_failures": _nowhere("launch.max_failures", ""),
}
"""Their key -> what it is here. Of two that stand for one setting the upper one comes first."""

# What their code fixed, where ours has a setting with another default.
_FIXED: dict[Stage, dict[str, Any]] = {
    "sft": {"model_params.warmup_steps_per_cent": 0.0, "data.unusable_rows": "drop"},
    "reward": {"model_params.warmup_steps_per_cent": 0.0, "data.unusable_rows": "drop"},
    "ppo": {
        "ppo_config.adap_kl_ctrl": False,
        "ppo_config.ppo_epochs": 1,
        "generation_config.max_new_tokens": 50,
        "data_config.unusable_rows": "drop",
    },
}
SECTIONS = ("General", "Dataset", "Training", "failure_config")
_INNER = ("General.config",)


def stage_of(schema: type[BaseModel]) -> Stage | None:
    """The stage whose training a schema describes; None for other scripts."""
    fields = schema.model_fields.keys()
    if "ppo_config" in fields:
        return "ppo"
    if not {"trainer", "data", "model_params"} <= fields:
        return None
    return "sft" if "evaluation" in fields else "reward"


def translate(marked: MarkedData, schema: type[BaseModel], notes: list[str]) -> None:
    """Turn llm-on-ray's sections of a config, where it has any, into ours; `notes` gets a line for each key.

    Raises UserError where the script is none that trains, or where an override names a key that has no place.
    """
    theirs = [section for section in SECTIONS if section in marked.data]
    if not theirs:
        return
    stage = stage_of(schema)
    if stage is None:
        raise UserError(f"{marked.at((theirs[0],))}: is a section of llm-on-ray's training configs, and this script does not train")
    given: dict[str, str] = {}  # our path -> their key
    try:
        for path in _ordered(marked):
            _translate_key(marked, stage, path, given, notes)
        _follow(marked, given, notes)
        if "Training" in theirs and ("Training",) in marked.lines:
            _add_what_was_fixed(marked, stage, given, notes)
    finally:
        for section in theirs:
            del marked.data[section]
            marked.forget((section,))


def _ordered(marked: MarkedData) -> list[KeyPath]:
    """The paths of their keys: known ones in the table's order, then the others."""

    def below(path: KeyPath) -> list[KeyPath]:
        content = _value(marked.data, path)
        if content is not None and not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else "a single value"
            _refuse(marked, path, f"{dotted(path)}: got {kind}, expected a section")
        return [(*path, key) for key in content] if isinstance(content, dict) else []

    paths: list[KeyPath] = []
    for section in SECTIONS:
        for path in below((section,)):
            paths += below(path) if dotted(path) in _INNER else [path]
    rank = {name: number for number, name in enumerate(KEYS)}
    return sorted(paths, key=lambda path: rank.get(dotted(path), len(rank)))


def _translate_key(marked: MarkedData, stage: Stage, path: KeyPath, given: dict[str, str], notes: list[str]) -> None:
    key, value = dotted(path), _value(marked.data, path)
    value = None if value == "None" else value  # Python's word
    place = marked.origin(path)[0]
    row = KEYS.get(key)
    if row is None:
        _refuse(marked, path, _unknown(key))
        return
    if value is None or any(value == quiet and type(value) is type(quiet) for quiet in row.quiet):
        return
    cell: str = getattr(row, stage)
    if cell == REFUSED:
        _refuse(marked, path, f"{key}: {row.why}")
        return
    if cell == NO_EFFECT:
        notes.append(f"{place}: {key} has no effect: {row.why}")
        return
    if cell in given:
        notes.append(f"{place}: {key} has no effect: {given[cell]} says it")
        return
    target: KeyPath = tuple(cell.split("."))
    taken = _value(marked.data, target)
    overrides = marked.origin(path)[1] == 0
    if taken is not None and not overrides:
        _refuse(marked, path, f"{key}: is llm-on-ray's name of {cell}, which {marked.origin(target)[0]} gives too; keep {cell}")
        return
    given[cell] = key
    ours = _our_value(stage, key, row, value)
    if cell == "ppo_config.steps" and taken is not None and _value(marked.data, ("global_epochs",)) == taken:
        _set(marked, ("global_epochs",), ours)  # it was there for the steps that now are others
    notes.append(f"{place}: {key} is read as {cell}" + ("" if ours == value or isinstance(ours, dict) else f": {_shown(ours)}"))
    marked.forget(target)
    _set(marked, target, ours)
    _move_marks(marked, path, target)


def _our_value(stage: Stage, key: str, row: Row, value: Any) -> Any:
    if key == "Training.mixed_precision" and stage != "ppo":
        return _choice(_PRECISIONS)(value)
    return row.read(value)


def _follow(marked: MarkedData, given: Mapping[str, str], notes: list[str]) -> None:
    """Numbers of steps decide where they are given: no number of epochs ends the training before."""
    if "trainer.params.max_steps" in given:
        place = marked.origin(("trainer", "params", "max_steps"))[0]
        if _value(marked.data, ("trainer", "params", "max_epochs")) not in (None, -1):
            notes.append(f"{place}: Training.max_train_steps says when training ends, and no number of epochs")
        _set(marked, ("trainer", "params", "max_epochs"), -1)
    if "ppo_config.steps" in given and _value(marked.data, ("global_epochs",)) is None:
        _set(marked, ("global_epochs",), _value(marked.data, ("ppo_config", "steps")))  # each pass has a step at least


def _add_what_was_fixed(marked: MarkedData, stage: Stage, given: Mapping[str, str], notes: list[str]) -> None:
    """Settings that their code knew no others of, unless the config has its own."""
    fixed: dict[str, Any] = dict(_FIXED[stage])
    if "launch.num_training_workers" in given:
        fixed["launch.engine"] = "ray"
    if stage != "ppo" and _value(marked.data, ("model_params", "optimizer")) in (None, "AdamW", "Adam"):
        fixed["model_params.adam_betas"] = [0.9, 0.999]
    place = marked.origin(("Training",))[0]
    for name, value in fixed.items():
        target: KeyPath = tuple(name.split("."))
        if _value(marked.data, target) is None:
            _set(marked, target, value)
            marked.lines[target] = marked.lines[("Training",)]
            notes.append(f"{place}: {name} is {_shown(value)}, as in llm-on-ray")


def _refuse(marked: MarkedData, path: KeyPath, text: str) -> None:
    place, line = marked.origin(path)
    if line == 0:
        raise UserError(f"{place}: {text.removeprefix(f'{dotted(path)}: ')}")
    marked.problems.append((line, text))


def _unknown(key: str) -> str:
    known = {name.rpartition(".")[2]: name for name in KEYS}
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    return f"{key}: unknown key" + (f"; did you mean {known[close[0]]}?" if close else "; docs/llm_on_ray.md lists those that are read")


def _value(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _set(marked: MarkedData, path: KeyPath, value: Any) -> None:
    """Put a value in its place, unless what should be a section there is none, which the schema refuses."""
    section: Any = marked.data
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            return
    section[path[-1]] = value


def _move_marks(marked: MarkedData, old: KeyPath, new: KeyPath) -> None:
    for marks in (marked.lines, marked.files, marked.overrides):
        for known in [known for known in marks if known[: len(old)] == old]:
            marks[(*new, *known[len(old) :])] = marks.pop(known)  # type: ignore[assignment]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
