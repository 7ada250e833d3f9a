"""Configuration groups: `GROUP=NAME` on the command line merges the file `GROUP/NAME.yaml`, which lies beside the config, into it.

A group file is a piece of a config, with its sections. Key by key it takes the place of what the config says; a section with the
group's own name (`model_params.readout` of the group `readout`) is replaced whole, since settings of another choice would not fit it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.config_keys import rename_old_keys
from common.config_yaml import MarkedData, read_marked_yaml
from common.errors import UserError
from common.schema_types import KeyPath

_LONGEST_NAME = 255  # of a folder; the system refuses even to look for a longer one


def chosen_group_file(folders: Sequence[Path], text: str) -> tuple[str, Path] | None:
    """(GROUP, file) of `GROUP=NAME`, from the first folder that has the group; None where none has, so that it is an override.

    Raises UserError for a NAME that is no choice.
    """
    group, equals, name = (part.strip() for part in text.partition("="))
    if not equals or not group.replace("-", "_").isidentifier():
        return None
    if len(group) > _LONGEST_NAME:
        return None
    files = next(filter(None, ({file.stem: file for file in sorted((folder / group).glob("*.yaml"))} for folder in folders)), None)
    if files is None:
        return None
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        folder = next(iter(files.values())).parent
        raise UserError(f"override {group}: got {name!r}, expected a file of {folder}: one of {', '.join(files)}{meant}")
    return group, files[name]


def merge_group(marked: MarkedData, schema: type[BaseModel], group: str, file: Path, notes: list[str]) -> list[str]:
    """Merge a group file into the config, `notes` getting a line for each old name; returns the problems of its single keys.

    Raises UserError where the file cannot be read.
    """
    part = read_marked_yaml(file, str(file))
    _merge(marked, part, marked.data, part.data, (), group)
    rename_old_keys(marked, schema, notes)
    return [f"{part.source}:{line}: {problem}" for line, problem in part.problems]


def _merge(marked: MarkedData, part: MarkedData, old: dict[str, Any], new: dict[str, Any], path: KeyPath, group: str) -> None:
    for key, value in new.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(old.get(key), dict) and key != group:
            _merge(marked, part, old[key], value, here, group)
            continue
        old[key] = value
        marked.forget(here)
        for known, line in part.lines.items():
            if known[: len(here)] == here:
                marked.lines[known], marked.files[known] = line, part.source
