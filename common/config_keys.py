"""Old names of settings, settings that mean nothing any more, and overrides from the command line."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from common.config_secrets import holds_key
from common.config_yaml import MarkedData, parse_override_value
from common.errors import UserError
from common.llm_on_ray import translate
from common.schema import CommandLineValue
from common.schema_types import KeyPath, dotted, section_of, type_at, type_below, type_words

# Older spellings, and llm-on-ray's names -> ours. A name counts only in sections that have a new name as a field.
ALIASES: dict[str, tuple[str, ...]] = {
    "truncate_promt": ("truncate_prompt",),
    "max_length_promt": ("max_prompt_length",),
    "log_obg": ("monitor",),
    "global_epoches": ("global_epochs",),
    "forward_batch_size": ("mini_batch_size",),
    "train_batch_size": ("batch_size",),
    "train_file": ("data_dir", "data_file_path"),
    "output_dir": ("dirpath", "checkpoint_dir"),
    "experience_batch_size": ("batch_size",),
    "kl_coeff": ("init_kl_coef",),
}
# Old and new name of these may stand together as long as they agree.
MAY_AGREE = frozenset({"forward_batch_size"})

# Sections and keys that tell a script's configs from those of others.
SIGNS: dict[str, frozenset[str]] = {
    "sft/train_sft.py or a train_reward.py": frozenset({"model_init", "model_params", "trainer"}),
    "rlhf/train_ppo.py": frozenset({"data_config", "freeze_config", "generation_config", "ppo_config", "reward_config", "save_config"}),
    "sft/test_sft.py or rlhf/test_ppo.py": frozenset({"cuda", "generate_params", "test_params"}),
    "a test_reward.py": frozenset({"cuda", "test_params"}),
}

# Keys that once meant something: section -> key -> what replaces it. They are accepted, without effect, with this note.
OBSOLETE: dict[str, dict[str, str]] = {
    "model_params": {"mae_loss": "it chooses the loss of scores, and there are none here"},
    "ppo_config": {
        "remove_unused_columns": "every column of a row reaches the reward pipeline",
        "optimize_cuda_cache": "mini_batch_size bounds the memory",
        "optimize_device_cache": "mini_batch_size bounds the memory",
        "compare_steps": "it had no effect in the classic trainer either",
        "backward_batch_size": "it is mini_batch_size x gradient_accumulation_steps",
        "global_batch_size": "it is batch_size x processes",
        "global_backward_batch_size": "it is mini_batch_size x gradient_accumulation_steps x processes",
        "world_size": "the launcher decides",
        "dataset_num_proc": "prompts are tokenized as they are needed",
        "exp_name": "a run is named by desc",
        "task_name": "a run is named by desc",
        "query_dataset": "prompts come from data_config.data_file_path",
        "reward_model": "the reward comes from reward_config",
        "is_encoder_decoder": "the model's own configuration tells",
        "is_peft_model": "ppo_config.lora tells",
        "accelerator_kwargs": "the launcher decides (torchrun or accelerate launch)",
        "project_kwargs": "save_config.checkpoint_dir and tracker_kwargs say where things go",
        "push_to_hub_if_best_kwargs": "hf_hub_name names the repository",
    },
}


def current_name(old: str, fields: Collection[str]) -> str | None:
    """The one of `fields` that an older name stands for."""
    return next((new for new in ALIASES.get(old, ()) if new in fields), None)


def check_script(data: Mapping[str, Any], schema: type[BaseModel], shown: str) -> None:
    """Refuse a file with more signs of another script's configs than of this one's: one line instead of one for every key."""
    own = {key for keys in SIGNS.values() for key in keys & schema.model_fields.keys()} & data.keys()
    foreign = {script: (keys - schema.model_fields.keys()) & data.keys() for script, keys in SIGNS.items()}
    script, found = max(foreign.items(), key=lambda item: len(item[1]))
    if len(found) > len(own - SIGNS[script]):
        signs = " and ".join(sorted(found)[:2])
        raise UserError(
            f"{shown}: looks like a config of {script} (it has {signs}): give it to that script, or this one a config of its own"
        )


def rename_old_keys(marked: MarkedData, schema: type[BaseModel], notes: list[str], path: KeyPath = ()) -> None:
    """Old names become ours and obsolete keys go, in the section at `path` and below; `notes` gets a line for each."""
    section: Any = marked.data
    for part in path:
        section = section[part]
    for old in [key for key in ALIASES if key in section and key not in schema.model_fields]:
        new = current_name(old, schema.model_fields)
        if new is None:
            continue
        old_path, new_path = (*path, old), (*path, new)
        place, line = marked.origin(old_path)
        if new in section and not (old in MAY_AGREE and section[old] == section[new]):
            given = f"which {marked.origin(new_path)[0]} gives too"
            values = " with another value" if old in MAY_AGREE else ""
            marked.problems.append((line, f"{dotted(old_path)}: is the old name of {new}, {given}{values}; keep {new}"))
            del section[old]
            continue
        notes.append(f"{place}: {dotted(old_path)} is read as {new}")
        section[new] = section.pop(old)
        for marks in (marked.lines, marked.files, marked.overrides):
            if old_path in marks:
                marks[new_path] = marks.pop(old_path)  # type: ignore[assignment]
    for key, replacement in OBSOLETE.get(str(path[-1]) if path else "", {}).items():
        if key in section and key not in schema.model_fields:
            notes.append(f"{marked.origin((*path, key))[0]}: {dotted((*path, key))} is obsolete and has no effect: {replacement}")
            del section[key]
    for key, field in schema.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and isinstance(section.get(key), dict):
            rename_old_keys(marked, inner, notes, (*path, key))


def without_spaces(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides as the command line has them -> those that are whole, and a problem for each that is in several words (`key = value`)."""
    whole: list[str] = []
    problems = []
    words = list(overrides)
    while words:
        text = words.pop(0)
        if "=" not in text and words and words[0].startswith("="):
            key, spent = text, 2 if words[0] == "=" else 1
        elif text.endswith("=") and text.count("=") == 1 and words and "=" not in words[0]:
            key, spent = text[:-1], 1
        else:
            whole.append(text)
            continue
        del words[:spent]
        problems.append(f"override {dotted((key.strip(),))}: got a space beside =, expected {key.strip()}=value in one word, or in quotes")
    return whole, problems


def apply_override(marked: MarkedData, schema: type[BaseModel], text: str, notes: list[str]) -> None:
    """Set what `section.key=value` says. Raises UserError, in words that never repeat the value (it may be a key)."""
    key, equals, value_text = text.partition("=")
    key, name = key.strip(), dotted((key.strip(),))
    if not equals or not key:
        raise UserError(f"override {name or dotted((text,))}: expected section.key=value, got no {'=' if key else 'key before ='}")
    shown = f"override {name}"
    path = _key_path(marked, schema, key, shown, notes)
    public = UserError(f"{shown}: a key on the command line can be read by others; put it into the environment (WANDB_API_KEY)")
    if holds_key(value_text.strip().strip("\"'"), path):  # before it is parsed: messages about broken YAML could repeat it
        raise public
    value = parse_override_value(value_text, shown)
    if holds_key(value, path):  # inside a section: `wandb={api: …}`
        raise public
    _container(marked, path, name)[path[-1]] = _from_command_line(value, type_at(schema, path))
    marked.forget(path)
    marked.overrides[path] = name
    translate(marked, schema, notes)
    rename_old_keys(marked, schema, notes)


def _key_path(marked: MarkedData, schema: type[BaseModel], name: str, shown: str, notes: list[str]) -> KeyPath:
    """The path that a dotted name stands for. A part in double quotes keeps its dots, as do keys of mappings from text to text."""
    parts = next(csv.reader([name], delimiter="."))
    path: KeyPath = ()
    annotation: Any = schema
    data: Any = marked.data
    while parts:
        rest = ".".join(parts)
        if (isinstance(data, dict) and rest in data) or _holds_single_values(annotation):
            return (*path, rest)
        part, *parts = parts
        if not part:
            raise UserError(f"{shown}: expected section.key=value, got an empty part in the key")
        section = section_of(annotation)
        if section is not None and part not in section.model_fields and (new := current_name(part, section.model_fields)):
            notes.append(f"{shown}: {part} is read as {new}")
            part = new
        key: str | int = part
        if isinstance(data, list):
            if not part.isdigit() or int(part) >= len(data):
                raise UserError(f"{shown}: {dotted(path)} is a list of {len(data)}, expected a number below {len(data)} after it")
            key = int(part)
            data = data[key]
        elif path and not (_may_have_keys(annotation) and isinstance(data, dict | None)):
            words = "a single value" if annotation is None or _may_have_keys(annotation) else type_words(annotation)
            raise UserError(f"{shown}: {dotted(path)} is {words} and has no key {part}")
        else:
            data = data.get(part) if data is not None else None
        # An unknown key is reported with all other problems, once the value stands in its place.
        annotation = type_below(annotation, key) if annotation is not None else None
        path = (*path, key)
    return path


def _holds_single_values(annotation: Any) -> bool:
    """Whether keys below may contain dots, since nothing lies under them (`data.columns`)."""
    return get_origin(annotation) is dict and get_args(annotation)[1] is str


def _may_have_keys(annotation: Any) -> bool:
    return annotation is None or section_of(annotation) is not None or type_below(annotation, "any key") is not None


def _container(marked: MarkedData, path: KeyPath, name: str) -> Any:
    """What holds the last key of `path`; sections on the way that are missing or null are made."""
    container: Any = marked.data
    for number, key in enumerate(path[:-1], start=1):
        if isinstance(container, dict) and container.get(str(key)) is None:
            container[str(key)] = {}
            marked.overrides.setdefault(path[:number], name)
        container = container[key]
    return container


def _from_command_line(value: Any, annotation: Any) -> Any:
    """Marks texts in typed places as given on the command line; what lies in free mappings stays plain."""
    if isinstance(value, str) and annotation not in (None, Any):
        return CommandLineValue(value)
    if isinstance(value, list):
        return [_from_command_line(item, type_below(annotation, number)) for number, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _from_command_line(item, type_below(annotation, key)) for key, item in value.items()}
    return value
