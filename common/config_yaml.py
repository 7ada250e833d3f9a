"""YAML with line marks: the plain data of a file, and for every key the line it stands on. No objects, no code, no surprises.

Scalars are YAML 1.2's: `1e-5` is a number, only `true` and `false` are booleans (`yes` is text), `010` is ten, a date is text.
A key may stand once only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.config_secrets import is_secret
from common.errors import UserError
from common.schema_types import KeyPath, dotted

_TAG = "tag:yaml.org,2002:"
# Aliases can make a small file stand for an endless one.
_MAX_VALUES = 10_000


class _Loader(yaml.SafeLoader):
    """Composes nodes; plain scalars are told apart by the patterns below."""


_Loader.yaml_implicit_resolvers = {}
for _kind_name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind_name, re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass
class MarkedData:
    """Plain data and where each key of it came from: a line of `source` or of another file, or an override (its key)."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    files: dict[KeyPath, str] = field(default_factory=dict)  # of keys whose line is one of another file
    overrides: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)  # (line, what is wrong), found while reading

    def origin(self, path: KeyPath) -> tuple[str, int]:
        """(`FILE:LINE`, LINE) of a key or of its nearest enclosing section, or (the override that set it, 0)."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"override {self.overrides[path[:length]]}", 0
            if path[:length] in self.lines:
                source = self.files.get(path[:length], self.source)
                return f"{source}:{self.lines[path[:length]]}", self.lines[path[:length]]
        return f"{self.source}:1", 1

    def forget(self, path: KeyPath) -> None:
        """Drop what is known about a key and all below it, since another value takes its place."""
        for marks in (self.lines, self.files, self.overrides):
            for known in [known for known in marks if known[: len(path)] == path]:
                del marks[known]

    def at(self, path: KeyPath) -> str:
        """`FILE:LINE: key`, or `override KEY` (followed by the key where the override named an enclosing one)."""
        place, _ = self.origin(path)
        key = dotted(path)
        return place if not key or place == f"override {key}" else f"{place}: {key}"


def read_marked_yaml(path: Path, shown: str) -> MarkedData:
    """Read one YAML mapping, called `shown` in messages. What is wrong with single keys is left in `problems`.

    Raises UserError: no such file, directory, not UTF-8, empty, broken YAML, no mapping.
    """
    if path.is_dir():
        raise UserError(f"{shown}: is a directory, expected a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{shown}: no such config file (looked for {path.absolute()})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    root = _compose(text, shown, first_line=1)
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _TAG + "null"):
        raise UserError(f"{shown}:1: the config is empty, expected sections and keys")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{shown}:{root.start_mark.line + 1}: got {_kind(root)}, expected sections and keys")
    marked = MarkedData(shown)
    marked.data = _Plain(marked).value(root)
    marked.lines[()] = 1
    return marked


def parse_override_value(text: str, shown: str) -> Any:
    """The value of an override, read as YAML (`1e-5`, `[0, 11]`, `null`, `{name: x}`). Raises UserError that starts with `shown`."""
    root = _compose(text, shown, first_line=None)
    if root is None:
        return None
    marked = MarkedData(shown)
    value = _Plain(marked).value(root)
    if marked.problems:
        raise UserError(*(f"{shown}: {problem}" for _, problem in marked.problems))
    return value


def _compose(text: str, shown: str, first_line: int | None) -> yaml.Node | None:
    def place(line: int) -> str:
        return shown if first_line is None else f"{shown}:{line + first_line}"

    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        unclosed = "<stream end>" in (error.problem or "")  # then the place to mend is where it was opened
        mark = (error.context_mark if unclosed else None) or error.problem_mark or error.context_mark
        words = [error.context or ""] if (error.problem or "but").startswith("but") else []
        problem = " ".join(" ".join(["broken YAML:", *words, error.problem or ""]).split())
        if "'\\t'" in problem:
            problem = "a tab where spaces are expected; YAML indents with spaces"
        elif "mapping values are not allowed" in problem:
            problem += " (a colon too many, a missing quote, or wrong indentation)"
        raise UserError(f"{place(mark.line if mark else 0)}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n")
        raise UserError(f"{place(line)}: broken YAML: character {chr(error.character)!r} is not allowed") from None
    except (RecursionError, ValueError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{place(0)}: broken YAML: {problem}") from None


def _kind(node: yaml.Node) -> str:
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


class _Plain:
    """Turns nodes into plain data, marking lines and collecting problems as it goes."""

    def __init__(self, marked: MarkedData) -> None:
        self.marked = marked
        self.loader = _Loader("")
        self.count = 0

    def problem(self, node: yaml.Node, path: KeyPath, text: str) -> None:
        key = f"{dotted(path)}: " if path else ""
        self.marked.problems.append((node.start_mark.line + 1, key + text))

    def value(self, node: yaml.Node, path: KeyPath = (), parents: tuple[int, ...] = ()) -> Any:
        self.count += 1
        if id(node) in parents:
            self.problem(node, path, "an alias (*) inside the section it stands for")
            return None
        if self.count > _MAX_VALUES:
            if self.count == _MAX_VALUES + 1:
                self.problem(node, path, f"aliases (*) make more than {_MAX_VALUES:,} values of this config")
            return None
        if not node.tag.startswith(_TAG) or node.tag.removeprefix(_TAG) not in {"null", "bool", "int", "float", "str", "seq", "map"}:
            shown = "!!" + node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
            self.problem(node, path, f"got the tag {shown}, expected plain values without tags")
            return None
        parents = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, parents)
        if isinstance(node, yaml.SequenceNode):
            for number, child in enumerate(node.value):
                self.marked.lines[(*path, number)] = child.start_mark.line + 1
            return [self.value(child, (*path, number), parents) for number, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[int, ...]) -> dict[str, Any]:
        own = {id(key) for key, _ in node.value}
        try:
            self.loader.flatten_mapping(node)  # merge keys (<<): theirs come first, so a key of the mapping itself wins
        except yaml.MarkedYAMLError as error:
            self.problem(node, path, f"broken YAML: {error.problem}")
            return {}
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, path, f"got {_kind(key_node)} as a key, expected a name")
                continue
            key, line = str(key_node.value), key_node.start_mark.line + 1
            here = (*path, key)
            if id(key_node) in own:
                if key in seen:
                    self.problem(key_node, here, f"stands twice, in lines {seen[key]} and {line}; keep one")
                    continue
                seen[key] = line
            self.marked.lines[here] = line
            result[key] = self.value(value_node, here, parents)
        return result

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "null":
            return None
        if kind == "str" or is_secret(path):  # a key of digits alone stays as it was written
            return text
        try:
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 16) if text.startswith("0x") else int(text)
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except (ValueError, KeyError):
            self.problem(node, path, f"got {text[:40]!r}, expected a value that fits the tag !!{kind}")
            return None
