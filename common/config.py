"""A YAML file and overrides in, a frozen typed config out; or every problem at once, each with file, line, key and what was expected.

    FILE:LINE: data.batch_size: got -1, expected a whole number >= 1
    FILE:LINE: data.bach_size: unknown key; did you mean batch_size?

`GROUP=NAME` among the overrides merges a file beside the config (`config_groups.py`). Whatever comes later on the command line wins.
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from common.command_line import Parser
from common.config_groups import chosen_group_file, merge_group
from common.config_keys import apply_override, check_script, rename_old_keys, without_spaces
from common.config_report import located, problem_lines
from common.config_secrets import KEY_VARIABLE, move_to_environment, take_key_out, without_secrets
from common.config_yaml import MarkedData, read_marked_yaml
from common.errors import UserError, locate_problems
from common.llm_on_ray import translate
from common.notes import begin_notes, say
from common.runs import RESULTS_ROOT_VARIABLE
from common.schema import Section
from common.schema_types import KeyPath, dotted, section_of

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class Invocation(Generic[C]):
    """What a command line asks for."""

    config: C
    config_path: Path
    stage_dir: Path
    resume: str | None  # None, "auto" (the last good checkpoint) or an absolute path
    validate_only: bool
    dry_run: bool = False
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    notes: tuple[str, ...] = ()
    overridden: tuple[KeyPath, ...] = ()

    def overrides(self, *settings: str) -> bool:
        """Whether the command line gives one of these settings or sections, or one inside or around them."""
        paths = [tuple(setting.split(".")) for setting in settings]
        return any(all(one == other for one, other in zip(given, path, strict=False)) for given in self.overridden for path in paths)

    def say_valid(self, *facts: str) -> None:
        """What `--validate` ends with: the config is in order, and so is what it names."""
        print(f"valid: {self.config_path}; {': '.join(facts)}")

    def print_notes(self) -> None:
        """Say which keys were read under old names or have no effect any more, and what relative paths stand for."""
        begin_notes()
        for note in self.notes:
            say(note)


def parse_command_line(
    schema: type[C],
    stage_dir: Path,
    argv: Sequence[str],
    *,
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
    resumable: bool = False,
    measurable: bool = False,
) -> Invocation[C]:
    """Read `--config FILE [section.key=value …]`. Raises UserError with every problem of file and overrides.

    resumable, measurable: whether the script has `--resume` and `--dry_run`.
    """
    parser = Parser(description=description)
    names = ("--config", "--config_file", "--config_path")
    parser.add_argument(*names, dest="config", action="append", metavar="FILE", help="YAML file of settings (one option under three names)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file; GROUP=NAME: merges GROUP/NAME.yaml"
    )
    parser.add_argument("--validate", action="store_true", help="read config and data, report, and stop")
    if resumable:
        parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on from the last good checkpoint, or from PATH")
        parser.add_argument("--allow_data_change", action="store_true", help="with --resume: go on though the data are not the same")
    if measurable:
        parser.add_argument("--dry_run", action="store_true", help="say what the run would take, from a few measured steps, and stop")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_intermixed_args(list(argv))
    if resumable:
        _tell_resume_from_override(options)
    path = _config_file(options.config or [])
    if not path.exists():
        raise UserError(_no_such_config(path, stage_dir))
    config, notes, marked = _load(schema, path, options.overrides, stage_dir)
    locate_problems(lambda problem: located(problem, marked, schema, resolved_dict(config), stage_dir))
    resume, dry_run = getattr(options, "resume", None), getattr(options, "dry_run", False)
    if dry_run and (resume is not None or options.validate):
        other, what = (
            ("--validate", "stops before anything is measured") if options.validate else ("--resume", "goes on with an earlier one")
        )
        raise UserError(f"command line: --dry_run measures a run from its start, and {other} {what}; leave one of them out")
    if resumable and options.allow_data_change and resume is None:
        raise UserError("command line: --allow_data_change acts on a run that goes on; add --resume or leave it out")
    return Invocation(
        config=config,
        config_path=path.absolute(),
        stage_dir=stage_dir,
        resume=resume,
        validate_only=options.validate,
        dry_run=dry_run,
        options=options,
        notes=tuple(notes),
        overridden=tuple(marked.overrides),
    )


def _config_file(names: Sequence[str]) -> Path:
    if not names:
        raise UserError("command line: --config FILE is missing, for example --config configs/trainer_config.yaml")
    different = list({Path(name).resolve(): name for name in names}.values())
    if len(different) > 1:
        raise UserError(f"command line: --config, --config_file and --config_path are one option, got {' and '.join(different)}")
    return Path(different[0])


def _no_such_config(path: Path, stage_dir: Path) -> str:
    """What to say of a missing file: the stage's own of that name, else what configs the stage has."""
    configs = sorted((stage_dir / "configs").glob("*.yaml"))
    named = [config for config in configs if config.name == path.name]
    if named:
        hint = f"; did you mean {os.path.relpath(named[0])}?"
    else:
        names = ", ".join(config.name for config in configs)
        hint = f" (looked for {path.absolute()})" + (f"; {os.path.relpath(configs[0].parent)} holds {names}" if configs else "")
    return f"{path}: no such config file{hint}"


def _tell_resume_from_override(options: argparse.Namespace) -> None:
    """`--resume section.key=value` has no path: the override belongs to the config."""
    if options.resume in (None, "auto"):
        return
    if re.match(r'[A-Za-z_][\w."-]*=', options.resume) and not Path(options.resume).exists():
        options.overrides.append(options.resume)
        options.resume = "auto"
    else:
        options.resume = str(Path(options.resume).absolute())


def load_config(schema: type[C], path: Path | str, overrides: Sequence[str] = (), *, base_dir: Path | None = None) -> C:
    """A config from a file; relative paths in it count from `base_dir` (default: the parent of the file's folder, the stage)."""
    path = Path(path)
    return _load(schema, path, overrides, base_dir or path.absolute().parent.parent)[0]


def resolved_dict(config: BaseModel) -> dict[str, Any]:
    """Every setting with its final value, as plain data that YAML and JSON can hold; secrets removed."""
    cleaned = without_secrets(config.model_dump(mode="json"))
    assert isinstance(cleaned, dict)
    return cleaned


def _load(schema: type[C], path: Path, overrides: Sequence[str], base_dir: Path) -> tuple[C, list[str], MarkedData]:
    """The config, notes about it, and the data it was read from.

    Relative paths count from `base_dir`, those in overrides from the working directory.
    """
    marked = read_marked_yaml(path, str(path))
    check_script(marked.data, schema, marked.source)
    notes: list[str] = []
    translate(marked, schema, notes)
    rename_old_keys(marked, schema, notes)
    whole, unusable = without_spaces(overrides)
    for text in whole:
        try:
            group = chosen_group_file((path.parent, base_dir / "configs"), text)
            if group is not None:
                unusable.extend(merge_group(marked, schema, *group, notes))
            else:
                apply_override(marked, schema, text, notes)
        except UserError as error:
            unusable.extend(error.problems)
    key, key_path = take_key_out(marked.data)
    _spell_out_sections(marked.data, schema)
    problems = [(line, f"{marked.source}:{line}: {text}") for line, text in marked.problems]
    context = {"base_dir": base_dir}
    config: C | None = None
    try:
        config = schema.model_validate(marked.data, context=context)
    except ValidationError as error:
        problems.extend(problem_lines(error, marked, schema, context))
    if unusable or problems or config is None:
        raise UserError(*dict.fromkeys(unusable + [text for _, text in sorted(problems, key=lambda problem: problem[0])]))
    if key is not None:
        moved = "is moved there for this run" if move_to_environment(key) else "is ignored: one is set there"
        notes.append(f"{marked.at(key_path)}: a key belongs into the environment ({KEY_VARIABLE}); this one {moved}")
    idle = _idle_folders(marked, config)
    notes.extend([*_path_notes(marked, resolved_dict(config), idle), *idle.values()])
    return config, notes, marked


def _spell_out_sections(data: dict[str, Any], schema: type[BaseModel]) -> None:
    """Sections left out become what their default says, so that it is validated too (paths in it count from the stage folder)."""
    for name, info in schema.model_fields.items():
        inner = section_of(info.annotation)
        if inner is None:
            continue
        if name not in data and info.default_factory is not None:
            data[name] = info.get_default(call_default_factory=True, validated_data={}).model_dump(exclude_unset=True)
        if isinstance(data.get(name), dict):
            _spell_out_sections(data[name], inner)


def _idle_folders(marked: MarkedData, config: Section) -> dict[KeyPath, str]:
    """A line for each folder of runs that was given where runs lie below a root instead."""
    root = getattr(config, "runs_root", None) or os.environ.get(RESULTS_ROOT_VARIABLE)
    notes: dict[KeyPath, str] = {}
    folders: list[KeyPath] = [("trainer", "checkpoint", "dirpath"), ("save_config", "checkpoint_dir")]
    for path in folders if root else ():
        given: Any = marked.data
        for key in path:
            given = given.get(key) if isinstance(given, dict) else None
        if given is not None:
            notes[path] = f"{dotted(path)}: {given} is without effect, since runs lie in {root}"
    return notes


def _path_notes(marked: MarkedData, resolved: dict[str, Any], idle: Collection[KeyPath]) -> list[str]:
    """A line for each path that was given relative, and is not idle: what it stands for."""

    def walk(given: Any, final: Any, path: KeyPath) -> list[str]:
        if path in idle:
            return []
        if isinstance(given, dict) and isinstance(final, dict):
            return [note for key in given if key in final for note in walk(given[key], final[key], (*path, key))]
        if isinstance(given, list) and isinstance(final, list):
            return [note for number, pair in enumerate(zip(given, final, strict=False)) for note in walk(*pair, (*path, number))]
        if isinstance(given, str) and isinstance(final, str) and given != final:
            return [f"{dotted(path)}: {given} is {final}"]
        return []

    return walk(marked.data, resolved, ())
