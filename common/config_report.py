"""From what a schema refuses to lines for people: `FILE:LINE: key: got X, expected Y (did you mean Z?)`."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from common.config_keys import ALIASES
from common.config_secrets import may_hold_secret
from common.config_yaml import MarkedData
from common.lightning_arguments import ARGUMENTS
from common.schema import CommandLineValue, KeyedProblems
from common.schema_types import KeyPath, choices_of, dotted, section_of, type_at, type_words, walk_fields

_SHOWN_CHARACTERS = 60
_SHOWN_NAMES = 5
_SETTING = re.compile(r"[a-z]\w*(?:\.\w+|\[\d+\])*(?=:? )")
_BOOLEAN_WORDS = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}


@dataclass
class _Report:
    lines: list[tuple[int, str]] = field(default_factory=list)  # (line in the file, text)
    wrong: set[KeyPath] = field(default_factory=set)
    tainted: set[KeyPath] = field(default_factory=set)  # wrong keys, and what they may have been meant to be

    def add(self, marked: MarkedData, path: KeyPath, text: str) -> None:
        self.wrong.add(path)
        self.tainted.add(path)
        self.lines.append((marked.origin(path)[1], f"{marked.at(path)}: {text}"))

    def taints(self, section: KeyPath, names: list[str]) -> bool:
        """Whether one of the named fields, in that section or below, is wrong anyway."""
        return any(str(path[-1]) in names and path[: len(section)] == section for path in self.tainted if path)


def problem_lines(error: ValidationError, marked: MarkedData, schema: type[BaseModel], context: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(line, text) of every problem. What a wrong key keeps the schema from checking is checked without that key."""
    report = _Report()
    _report_fields(error, marked, schema, report)
    _report_relations(error, marked, schema, report)
    wrong_before: set[KeyPath] = set()
    while report.wrong != wrong_before:
        wrong_before = set(report.wrong)
        try:
            schema.model_validate(_without(marked.data, schema, report), context=dict(context))
        except ValidationError as again:
            _report_relations(again, marked, schema, report)
    return list(dict.fromkeys(report.lines))


def located(problem: str, marked: MarkedData, schema: type[BaseModel], final: Mapping[str, Any], base_dir: Path) -> str:
    """A problem found after the config was read. One that begins with a setting gets the file and line where that stands.

    `final`: the config as plain data. A problem that names what a relative path resolved to says what the path counts from.
    """
    begins = _SETTING.match(problem)
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", begins[0])) if begins else ()
    if begins is None or type_at(schema, path) is None:
        return problem
    place = marked.origin(path)[0]
    words = f"override {problem}" if place == f"override {begins[0]}" else f"{place}: {problem}"
    given, resolved = _value_at(marked.data, path), _value_at(final, path)
    if isinstance(given, str) and isinstance(resolved, str) and not given.startswith(("/", "~")) and given != resolved in problem:
        folder = f"the working directory {Path.cwd()}" if isinstance(given, CommandLineValue) else f"the stage folder {base_dir}"
        words += f" ({given} counts from {folder})"
    return words


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _report_fields(error: ValidationError, marked: MarkedData, schema: type[BaseModel], report: _Report) -> None:
    """Unknown, missing and refused values; branches of a union that all refused the same value are one problem."""
    missing: list[KeyPath] = []
    for problem in error.errors(include_url=False):
        path, value = _real_path(problem["loc"], marked.data)
        if problem["type"] == "missing" and path == problem["loc"]:
            missing.append(path)
        elif problem["type"] == "extra_forbidden":
            text, meant = _unknown(path, schema)
            report.add(marked, path, text)
            if meant is not None:
                report.tainted.add((*path[:-1], meant))
        elif problem["type"] != "value_error" and path not in report.wrong:
            report.add(marked, path, _refused(path, value, schema))
    for path in missing:
        if path not in report.tainted:  # else it is there, misspelt
            description = _field_description(schema, path)
            text = f"missing, expected {type_words(type_at(schema, path))}" + (f": {description}" if description else "")
            report.lines.append((marked.origin(path)[1], f"{marked.at(path)}: {text}"))


def _report_relations(error: ValidationError, marked: MarkedData, schema: type[BaseModel], report: _Report) -> None:
    """What validators of our own say, about one value or about several of a section."""
    for problem in error.errors(include_url=False):
        if problem["type"] != "value_error":
            continue
        path, _ = _real_path(problem["loc"], marked.data)
        cause = problem["ctx"]["error"]
        section = section_of(type_at(schema, path))
        if isinstance(cause, KeyedProblems):
            for below, text in cause.keyed.items():
                report.add(marked, (*path, *below), text)
        elif section is None:
            report.add(marked, path, str(cause))
        else:
            names = [word for word in re.findall(r"\w+", str(cause)) if word in section.model_fields]
            if not report.taints(path, names):
                place, line = _place_of_relation(marked, path, names)
                report.lines.append((line, ": ".join(part for part in (place, dotted(path), str(cause)) if part)))
            report.wrong.add(path)


def _place_of_relation(marked: MarkedData, path: KeyPath, names: Iterable[str]) -> tuple[str, int]:
    """Where the first of the named fields of a section stands, else the section."""
    for name in names:
        if (*path, name) in marked.overrides or (*path, name) in marked.lines:
            return marked.origin((*path, name))
    return marked.origin(path)


def _without(data: dict[str, Any], schema: type[BaseModel], report: _Report) -> dict[str, Any]:
    """A copy of the data without the wrong keys; one that its section cannot be without takes the section along."""
    data = copy.deepcopy(data)
    for wrong in report.wrong:
        path = wrong
        while path and (isinstance(path[-1], int) or _is_required(schema, path)):
            path = path[:-1]
        report.tainted.add(path)
        container: Any = data
        for part in path[:-1]:
            inside = isinstance(container, list) or (isinstance(container, dict) and part in container)
            container = container[part] if inside else None
        if path and isinstance(container, dict):
            container.pop(path[-1], None)
    return data


def _is_required(schema: type[BaseModel], path: KeyPath) -> bool:
    section = section_of(type_at(schema, path[:-1]))
    return section is not None and str(path[-1]) in section.model_fields and section.model_fields[str(path[-1])].is_required()


def _real_path(location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, Any]:
    """Pydantic's location without the names of union branches, and the value there."""
    path: KeyPath = ()
    for number, part in enumerate(location):
        if isinstance(data, dict) and part in data:
            path, data = (*path, part), data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data, path = data[part], (*path, part)
        elif isinstance(data, dict) and number == len(location) - 1:
            return (*path, part), None  # a missing key
    return path, data


def _field_description(schema: type[BaseModel], path: KeyPath) -> str:
    section = section_of(type_at(schema, path[:-1]))
    found = section.model_fields.get(str(path[-1])) if section is not None else None
    return (found.description or "").rstrip(".") if found is not None else ""


def _unknown(path: KeyPath, schema: type[BaseModel]) -> tuple[str, str | None]:
    """What to say of a key that its section does not have, and the name of the setting that was probably meant."""
    key = str(path[-1])
    if key.startswith("index-"):
        return f"a comma inside {{…}} begins a new entry; quote the path of the run: '…,{key}'", None
    section = section_of(type_at(schema, path[:-1]))
    names = list(section.model_fields) if section is not None else []
    places = [found for found, _ in walk_fields(schema)]
    meant = ALIASES.get(key, (key,))
    elsewhere = [dotted(found) for found in places if found[-1] in meant]
    if key in ARGUMENTS and ("trainer", "params") in places:
        elsewhere.append(f"trainer.params.{key}")
    if elsewhere:
        return f"unknown key here; it belongs to {' or '.join(elsewhere)}", meant[0]
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"unknown key; did you mean {close[0]}?", close[0]
    known = {found[-1]: dotted(found) for found in reversed(places)}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if close:
        return f"unknown key; did you mean {known[close[0]]}?", close[0]
    if len(names) > _SHOWN_NAMES:
        near = difflib.get_close_matches(key, names, n=_SHOWN_NAMES, cutoff=0)
        return f"unknown key; the nearest of the {len(names)} known ones: {', '.join(near)}", None
    return f"unknown key; expected one of {', '.join(names)}", None


def _refused(path: KeyPath, value: Any, schema: type[BaseModel]) -> str:
    annotation = type_at(schema, path)
    section = section_of(annotation)
    if section is not None and not isinstance(value, dict):
        keys = ", ".join([str(found[0]) for found, _ in walk_fields(section) if len(found) == 1][:4])
        return f"got {shown_value(value, path)}, expected a section with keys such as {keys}"
    expected = type_words(annotation) if annotation is not None else "another value"
    if isinstance(value, float) and not math.isfinite(value):
        expected = expected.replace("a number", "a finite number")
    hint = "" if may_hold_secret(path) else _hint(value, expected, choices_of(annotation))
    return f"got {shown_value(value, path)}, expected {expected}{hint}"


def _hint(value: Any, expected: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    if re.match(r"a list of (?!\d)", expected) and isinstance(value, str | int | float) and not isinstance(value, bool) and not close:
        return f" (a list of one: [{value}])" if len(str(value)) <= _SHOWN_CHARACTERS else ""
    if not isinstance(value, str):
        return ""
    if "true, false" in expected or "true or false" in expected:
        word = _BOOLEAN_WORDS.get(value.lower())
        if word is not None:
            return f" (write {word}, without quotes)"
    if "number" in expected and re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?", value):
        return " (remove the quotes)"
    return f" (did you mean {close[0]}?)" if close else ""


def shown_value(value: Any, path: KeyPath = ()) -> str:
    """A value as YAML has it, shortened; never one that may be a key."""
    if value is None:
        return "null"
    if may_hold_secret(path):
        return "a value that is not shown"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(str(value)) if isinstance(value, str) else repr(value) if not isinstance(value, int) else _shown_int(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _shown_int(value: int) -> str:
    return str(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
