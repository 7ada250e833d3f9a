"""A YAML file and overrides in, a frozen typed config out; or every problem at once, each with file, line, key and what was expected.

    FILE:LINE: data.batch_size: got -1, expected an integer of at least 1
    FILE:LINE: data.bach_size: unknown key; did you mean batch_size?

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from common.config_yaml import KeyPath, MarkedData, parse_scalar_text, read_marked_yaml
from common.errors import UserError
from common.schema import API_PLACEHOLDERS, CommandLineValue, KeyedProblems, Section

C = TypeVar("C", bound=Section)

# Older spellings -> ours. A name counts only in sections that have the new name as a field.
ALIASES = {
    "truncate_promt": "truncate_prompt",
    "max_length_promt": "max_prompt_length",
    "log_obg": "monitor",
    "global_epoches": "global_epochs",
    "forward_batch_size": "mini_batch_size",
}
# Old and new name of these may stand together as long as they agree.
MAY_AGREE = frozenset({"forward_batch_size"})

# Keys that once meant something: section -> key -> what replaces it. They are accepted, without effect, with this note.
OBSOLETE: dict[str, dict[str, str]] = {
    "ppo_config": {
        "remove_unused_columns": "every column of a row reaches the reward pipeline",
        "optimize_cuda_cache": "memory is bounded by mini_batch_size",
        "optimize_device_cache": "memory is bounded by mini_batch_size",
        "compare_steps": "it had no effect in the classic trainer either",
        "backward_batch_size": "it is mini_batch_size x gradient_accumulation_steps",
        "exp_name": "a run is named by desc",
        "task_name": "a run is named by desc",
        "query_dataset": "prompts come from data_config.data_file_path",
        "reward_model": "the reward comes from reward_config",
        "is_encoder_decoder": "the model's own configuration tells",
        "is_peft_model": "ppo_config.lora tells",
        "accelerator_kwargs": "one process needs none",
        "project_kwargs": "one process needs none",
        "push_to_hub_if_best_kwargs": "hf_hub_name names the repository",
        "world_size": "the launcher decides",
        "global_batch_size": "it is batch_size x processes",
    },
}
_SECRET = re.compile(r"(?:^|_)(?:api_key|apikey|token|secret|password)$", re.IGNORECASE)


@dataclass(frozen=True)
class Invocation(Generic[C]):
    """What a command line asks for."""

    config: C
    config_path: Path
    stage_dir: Path
    resume: str | None  # None, "auto" (the last good checkpoint) or a path
    validate_only: bool
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    notes: tuple[str, ...] = ()

    def print_notes(self) -> None:
        """Say which keys were read under old names or have no effect any more, and what relative paths stand for."""
        for note in self.notes:
            print(f"note: {note}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")


def parse_command_line(
    schema: type[C],
    stage_dir: Path,
    argv: Sequence[str],
    *,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
    resumable: bool = False,
) -> Invocation[C]:
    """Read `--config FILE [section.key=value …]`. Raises UserError with every problem of file and overrides."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    names = ("--config", "--config_file", "--config_path")
    parser.add_argument(*names, dest="config", action="append", metavar="FILE", help="YAML file of settings (one option under three names)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file")
    parser.add_argument("--validate", action="store_true", help="read config and data, report, and stop")
    if resumable:
        parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on from the last good checkpoint, or from PATH")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_intermixed_args(list(argv))
    files = list(dict.fromkeys(str(Path(name).expanduser().absolute()) for name in options.config or ()))
    if not files:
        raise UserError("command line: --config FILE is missing, for example --config configs/trainer_config.yaml")
    if len(files) > 1:
        raise UserError(f"command line: --config and --config_file differ ({files[0]}, {files[1]}); they are one option, give it once")
    path = Path(files[0])
    config, notes = _load(schema, path, options.overrides, stage_dir)
    return Invocation(
        config=config,
        config_path=path,
        stage_dir=stage_dir,
        resume=getattr(options, "resume", None),
        validate_only=options.validate,
        options=options,
        notes=tuple(notes),
    )


def load_config(schema: type[C], path: Path | str, overrides: Sequence[str] = (), *, base_dir: Path | None = None) -> C:
    """A config from a file; relative paths in it count from `base_dir` (default: the file's folder's parent, the stage)."""
    path = Path(path)
    return _load(schema, path, overrides, base_dir or path.absolute().parent.parent)[0]


def resolved_dict(config: BaseModel) -> dict[str, Any]:
    """Every setting with its final value, as plain data that YAML and JSON can hold; secrets removed."""
    cleaned = _without_secrets(config.model_dump(mode="json"))
    assert isinstance(cleaned, dict)
    if isinstance(cleaned.get("wandb"), dict):
        cleaned["wandb"].pop("api", None)
    return cleaned


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items() if not (_SECRET.search(str(key)) and isinstance(item, str))}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return value


# --- loading ---------------------------------------------------------------------------------------------------------------------


def _load(schema: type[C], path: Path, overrides: Sequence[str], base_dir: Path) -> tuple[C, list[str]]:
    marked = read_marked_yaml(path, _shown(path))
    notes: list[str] = []
    problems: list[str] = []
    _rename(marked, schema, (), notes, problems)
    for text in overrides:
        _override(marked, schema, text, notes, problems)
    _take_secrets_out(marked.data)
    _spell_out_sections(marked.data, schema)
    config: C | None = None
    try:
        config = schema.model_validate(marked.data, context={"base_dir": base_dir})
    except ValidationError as error:
        problems.extend(_lines(error, marked, schema))
    if problems or config is None:
        raise UserError(*dict.fromkeys(problems))
    return config, notes


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        relative = path.absolute().relative_to(Path.cwd())
    except ValueError:
        return str(path.absolute())
    return str(relative)


def _rename(marked: MarkedData, schema: type[BaseModel], path: KeyPath, notes: list[str], problems: list[str]) -> None:
    """Old names become ours and obsolete keys go, in the section at `path` and below."""
    section = _at(marked.data, path)
    if not isinstance(section, dict):
        return
    for old, new in ALIASES.items():
        if old not in section or new not in schema.model_fields:
            continue
        old_path, new_path = (*path, old), (*path, new)
        if new in section and not (old in MAY_AGREE and section[old] == section[new]):
            place = marked.place(old_path)
            problems.append(
                f"{place}: {dotted(old_path)}: got {_got(section[old])}, but {new} (its new name) is {_got(section[new])}; keep {new}"
            )
            section.pop(old)
            continue
        notes.append(f"{marked.place(old_path)}: {dotted(old_path)} is read as {new}")
        section[new] = section.pop(old)
        marked.lines.setdefault(new_path, marked.lines.get(old_path, 1))
    name = str(path[-1]) if path else ""
    for key, replacement in OBSOLETE.get(name, {}).items():
        if key in section and key not in schema.model_fields:
            notes.append(f"{marked.place((*path, key))}: {dotted((*path, key))} is obsolete and has no effect: {replacement}")
            section.pop(key)
    for key, child in schema.model_fields.items():
        inner = section_of(child.annotation)
        if inner is not None and isinstance(section.get(key), dict):
            _rename(marked, inner, (*path, key), notes, problems)


def _override(marked: MarkedData, schema: type[BaseModel], text: str, notes: list[str], problems: list[str]) -> None:
    name, equals, value_text = text.partition("=")
    name = name.strip().removeprefix("--")
    if not equals or not name:
        problems.append(f"override {text}: got no '=', expected section.key=value")
        return
    try:
        value = _command_line(parse_scalar_text(value_text, f"override {text}"))
    except UserError as error:
        problems.extend(error.problems)
        return
    path: KeyPath = ()
    section: Any = marked.data
    model: type[BaseModel] | None = schema
    parts = name.split(".")
    for number, part in enumerate(parts):
        if model is not None and part in ALIASES and part not in model.model_fields and ALIASES[part] in model.model_fields:
            notes.append(f"override {text}: {part} is read as {ALIASES[part]}")
            part = ALIASES[part]
        if isinstance(section, list) and part.isdigit() and int(part) < len(section):
            key: str | int = int(part)
        elif isinstance(section, dict):
            key = part
        else:
            problems.append(f"override {text}: {dotted(path)} is {_got(section)}, a single value, and has no key {part}")
            return
        path = (*path, key)
        if number == len(parts) - 1:
            section[key] = value
            marked.overrides[path] = text
            for known in [known for known in marked.overrides if known != path and known[: len(path)] == path]:
                del marked.overrides[known]
            return
        field_info = model.model_fields.get(part) if model is not None else None
        model = section_of(field_info.annotation) if field_info is not None else None
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
            marked.overrides.setdefault(path, text)
        section = section[key]


def _command_line(value: Any) -> Any:
    if isinstance(value, str):
        return CommandLineValue(value)
    if isinstance(value, list):
        return [_command_line(item) for item in value]
    if isinstance(value, dict):
        return {key: _command_line(item) for key, item in value.items()}
    return value


def _take_secrets_out(data: dict[str, Any]) -> None:
    """A key found in the config moves into the environment (unless one is there) before anything can log or save it."""

    def keep(secret: str) -> None:
        os.environ.setdefault("WANDB_API_KEY", secret)

    wandb = data.get("wandb")
    if isinstance(wandb, dict) and isinstance(wandb.get("api"), str):
        if wandb["api"].strip() not in API_PLACEHOLDERS:
            keep(str(wandb["api"]).strip())
        wandb["api"] = None
    ppo = data.get("ppo_config")
    kwargs = ppo.get("tracker_kwargs") if isinstance(ppo, dict) else None
    for place in (kwargs, kwargs.get("wandb") if isinstance(kwargs, dict) else None):
        if isinstance(place, dict):
            for key in [key for key in place if _SECRET.search(key) and isinstance(place[key], str)]:
                keep(place.pop(key))


def _spell_out_sections(data: dict[str, Any], schema: type[BaseModel]) -> None:
    """Sections left out become empty ones, so that their defaults are validated too (paths in them count from the stage folder)."""
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        if inner is None:
            continue
        if name not in data and info.default_factory is inner:
            data[name] = {}
        if isinstance(data.get(name), dict):
            _spell_out_sections(data[name], inner)


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


# --- saying what is wrong ----------------------------------------------------------------------------------------------------------


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation (`Section | None`, `Annotated[…]`), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for argument in typing.get_args(annotation) if (found := section_of(argument))), None)
    return None


def walk_fields(schema: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field of a schema with its path, sections before what is in them; sections that hold themselves are entered once."""
    for name, info in schema.model_fields.items():
        yield (*path, name), info
        inner = section_of(info.annotation)
        if inner is not None and inner is not schema:
            yield from walk_fields(inner, (*path, name))


def _lines(error: ValidationError, marked: MarkedData, schema: type[BaseModel]) -> list[str]:
    """One line per wrong key: branches of a union that all refused the same value are told together."""
    expected: dict[KeyPath, list[str]] = {}
    lines: dict[KeyPath, str] = {}
    result: list[str] = []
    for problem in error.errors(include_url=False):
        path, value = _real_path(problem["loc"], marked.data)
        place = marked.place(path)
        kind = problem["type"]
        if kind == "extra_forbidden":
            result.append(f"{place}: {dotted(path)}: unknown key{_suggestion(path, schema)}")
        elif kind == "missing":
            info = _field_at(schema, path)
            what = info.description.rstrip(".") if info is not None and info.description else "a value"
            result.append(f"{place}: {dotted(path)}: missing, expected: {what}")
        elif kind == "value_error":
            cause = problem["ctx"]["error"]
            if isinstance(cause, KeyedProblems):
                for key, message in cause.keyed.items():
                    inner = (*path, key)
                    result.append(f"{marked.place(inner)}: {dotted(inner)}: {message}")
            else:
                result.append(f"{place}: {dotted(path) or 'config'}: {cause}")
        else:
            expected.setdefault(path, []).append(_expected(kind, problem.get("ctx", {}), problem["msg"], value))
            lines.setdefault(path, f"{place}: {dotted(path)}: got {_got(value)}, expected ")
    result.extend(line + " or ".join(dict.fromkeys(expected[path])) for path, line in lines.items())
    order = {id(text): number for number, text in enumerate(result)}
    return sorted(result, key=lambda text: (_line_number(text), order[id(text)]))


def _line_number(text: str) -> int:
    found = re.match(r".*?:(\d+): ", text)
    return int(found[1]) if found else 0


def _real_path(location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, Any]:
    """Pydantic's location without the names of union branches, and the value there."""
    path: KeyPath = ()
    last = len(location) - 1
    for number, part in enumerate(location):
        inside = (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        if inside:
            path, data = (*path, part), data[part]
        elif isinstance(data, dict) and number == last:
            return (*path, part), None  # a missing key
    return path, data


def _field_at(schema: type[BaseModel], path: KeyPath) -> Any:
    model: type[BaseModel] | None = schema
    info = None
    for part in path:
        info = model.model_fields.get(str(part)) if model is not None else None
        model = section_of(info.annotation) if info is not None else None
    return info


def _suggestion(path: KeyPath, schema: type[BaseModel]) -> str:
    key = str(path[-1])
    parent: type[BaseModel] | None = schema
    if len(path) > 1:
        info = _field_at(schema, path[:-1])
        parent = section_of(info.annotation) if info is not None else None
    names = list(parent.model_fields) if parent is not None else []
    elsewhere = [dotted(found) for found, _ in walk_fields(schema) if found[-1] == ALIASES.get(key, key) and found != path]
    if elsewhere:
        return f"; it belongs to {' or '.join(elsewhere)}"
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    known = {found[-1]: dotted(found) for found, _ in walk_fields(schema)}
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
    if close:
        return f"; did you mean {known[close[0]]}?"
    return f"; expected one of {', '.join(names)}" if names else ""


def _got(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list) and len(repr(value)) > 60:
        return f"a list of {len(value)}"
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_PLAIN_EXPECTATIONS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "none_required": "null",
    "finite_number": "a finite number",
}
_COMPARISONS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}


def _expected(kind: str, context: Mapping[str, Any], message: str, value: Any) -> str:
    if kind in _PLAIN_EXPECTATIONS:
        return _PLAIN_EXPECTATIONS[kind]
    if kind in _COMPARISONS:
        key, words = _COMPARISONS[kind]
        noun = "an integer" if isinstance(context[key], int) and isinstance(value, int) else "a number"
        return f"{noun} {words} {context[key]}"
    if kind == "literal_error":
        choices = [choice.strip().strip("'") for choice in re.split(r",| or ", str(context["expected"]))]
        close = difflib.get_close_matches(str(value), choices, n=1)
        return ("one of " if len(choices) > 1 else "") + ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else "")
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind in ("too_short", "too_long"):
        return f"a list of {context.get('min_length', context.get('max_length'))}"
    return message[0].lower() + message[1:]
