"""YAML with line marks: the plain data of a file, and for every key the line it stands on. No objects, no code, no surprises.

Differences from PyYAML's SafeLoader: `1e-5` is a number (YAML 1.2), only `true` and `false` are booleans, a key may stand once only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


@dataclass
class MarkedData:
    """Plain data and where each key of it came from: a line of `source`, or an override (its text)."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """`FILE:LINE` of a key or of its nearest enclosing section, or the override that set it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overrides:
                return f"override {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return f"{self.source}:1"


def read_marked_yaml(path: Path, shown: str | None = None) -> MarkedData:
    """Read one YAML mapping. Raises UserError: no such file, directory, not UTF-8, empty, broken, duplicate keys, tags."""
    shown = shown or str(path)
    if path.is_dir():
        raise UserError(f"{shown}: is a directory, expected a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = sorted(found.name for found in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise UserError(f"{shown}: no such config file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}") from None
    marked = MarkedData(shown)
    root = _compose(text, shown)
    if root is None:
        raise UserError(f"{shown}:1: the config is empty, expected sections and keys")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{shown}:{root.start_mark.line + 1}: got {_kind(root)}, expected sections and keys")
    problems: list[str] = []
    marked.data = _plain(root, (), marked, problems, _Loader(""), ())
    marked.lines[()] = 1
    if problems:
        raise UserError(*problems)
    return marked


def parse_scalar_text(text: str, shown: str) -> Any:
    """The value of an override, read as YAML (`1e-5`, `[0, 11]`, `null`, `{name: x}`)."""
    root = _compose(text, shown)
    if root is None:
        return None
    problems: list[str] = []
    value = _plain(root, (), MarkedData(shown), problems, _Loader(""), ())
    if problems:
        raise UserError(*problems)
    return value


def _compose(text: str, shown: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "broken YAML").replace("\n", " ")
        if "'\\t'" in problem:
            problem = "a tab; YAML indents with spaces"
        raise UserError(f"{shown}:{line}: broken YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: broken YAML: {str(error).splitlines()[0]}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{shown}: broken YAML: {error or 'nested too deeply'}") from None


def _kind(node: yaml.Node) -> str:
    return {"scalar": "a single value", "sequence": "a list", "mapping": "keys and values"}.get(node.id, node.id)


def _plain(node: yaml.Node, path: KeyPath, marked: MarkedData, problems: list[str], loader: _Loader, parents: tuple[int, ...]) -> Any:
    line = node.start_mark.line + 1
    if id(node) in parents:
        problems.append(f"{marked.source}:{line}: an alias (*) inside the section it stands for")
        return None
    parents = (*parents, id(node))
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        problems.append(
            f"{marked.source}:{line}: {'.'.join(map(str, path)) or 'config'}: got the tag {node.tag}, expected plain YAML without tags"
        )
        return None
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, child in enumerate(node.value):
            marked.lines[(*path, number)] = child.start_mark.line + 1
            items.append(_plain(child, (*path, number), marked, problems, loader, parents))
        return items
    if isinstance(node, yaml.MappingNode):
        try:
            own = {id(key) for key, _ in node.value}
            loader.flatten_mapping(node)  # merge keys (<<): theirs come first, so a key of the mapping itself wins
        except yaml.MarkedYAMLError as error:
            problems.append(f"{marked.source}:{line}: broken YAML: {error.problem}")
            return {}
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{marked.source}:{key_line}: got {_kind(key_node)} as a key, expected a name")
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in seen and id(key_node) in own:
                problems.append(
                    f"{marked.source}:{key_line}: {'.'.join(map(str, here))}: stands twice, first in line {seen[key]}; keep one"
                )
                continue
            if id(key_node) in own:
                seen[key] = key_line
            marked.lines[here] = key_line
            result[key] = _plain(value_node, here, marked, problems, loader, parents)
        return result
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        problems.append(f"{marked.source}:{line}: {'.'.join(map(str, path))}: got {node.value!r}: {str(error).splitlines()[0]}")
        return None
