"""What a field's annotation says in plain words ("a whole number >= 1 or null"), and what lies under a key of it.

Error messages and the generated tables of settings share these words.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath = tuple[str | int, ...]

_PLURALS = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers", "a section": "sections"}


@dataclass(frozen=True)
class Words:
    """Put into `Annotated[…]` where a type's own words would say too little: what is expected, in words."""

    text: str


def dotted(path: KeyPath) -> str:
    """`section.key`, the way an override writes it, on one line."""
    text = ".".join(str(part) for part in path)
    return text if text.isprintable() else repr(text)


def field_type(field: FieldInfo) -> Any:
    """A field's annotation together with its constraints."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (typing.Union, types.UnionType) else [annotation]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation (`Section | None`, `Annotated[…]`), if there is one."""
    if get_origin(annotation) is Annotated:
        return section_of(get_args(annotation)[0])
    return next((member for member in alternatives(annotation) if is_section(member)), None)


def type_below(annotation: Any, key: str | int) -> Any | None:
    """The annotation of what lies under `key`; None where nothing can lie there."""
    if annotation is Any:
        return Any
    if is_section(annotation):
        if key in annotation.model_fields:
            return field_type(annotation.model_fields[key])
        return Any if annotation.model_config.get("extra") == "allow" else None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_below(arguments[0], key)
    if origin is dict:
        return arguments[1]
    if origin is list and isinstance(key, int):
        return arguments[0]
    if origin is tuple and isinstance(key, int) and key < len(arguments):
        return arguments[key]
    if len(members := alternatives(annotation)) > 1:
        return next((found for member in members if (found := type_below(member, key)) is not None), None)
    return None


def type_at(annotation: Any, path: KeyPath) -> Any | None:
    for key in path:
        annotation = type_below(annotation, key)
        if annotation is None:
            return None
    return annotation


def walk_fields(schema: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a schema with its path, required ones first, sections before what is in them; those in lists are not entered."""
    for name, field in sorted(schema.model_fields.items(), key=lambda named: not named[1].is_required()):
        yield (*path, name), field
        inner = section_of(field.annotation)
        if inner is not None:
            yield from walk_fields(inner, (*path, name))


def choices_of(annotation: Any) -> list[str]:
    """The words that may be chosen from, where the annotation is or contains a `Literal`."""
    if get_origin(annotation) is Annotated:
        return choices_of(get_args(annotation)[0])
    return [str(choice) for member in alternatives(annotation) if get_origin(member) is Literal for choice in get_args(member)]


def type_words(annotation: Any) -> str:
    """`a whole number >= 1 or null`, `qa, chat or null`, `a list of whole numbers` …"""
    words = list(dict.fromkeys(_words(annotation, ())))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(annotation: Any, metadata: tuple[Any, ...]) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for entry in arguments[1:] for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
        return _words(arguments[0], (*inner, *metadata))
    own = [item.text for item in metadata if isinstance(item, Words)]
    if own:
        return [own[-1]]
    if origin in (typing.Union, types.UnionType):
        return [word for member in sorted(arguments, key=lambda member: member is type(None)) for word in _words(member, metadata)]
    if origin is Literal:
        return [str(choice) for choice in arguments]
    if origin is list:
        return [f"a list of {_plural(type_words(arguments[0]))}"]
    if origin is tuple:
        return [f"a list of {len(arguments)} {_plural(type_words(arguments[0]))}"]
    if origin is dict or annotation is dict:
        return ["a mapping"]
    if is_section(annotation):
        return ["a section"]
    if annotation is Any:
        return ["any value"]
    return {
        bool: ["true", "false"],
        int: [f"a whole number{_bounds(metadata)}"],
        float: [f"a number{_bounds(metadata)}"],
        str: ["text"],
        type(None): ["null"],
    }[annotation]


def _plural(words: str) -> str:
    first = next((one for one in _PLURALS if words.startswith(one)), None)
    return words.replace(first, _PLURALS[first], 1) if first else words


def _bounds(metadata: tuple[Any, ...]) -> str:
    bounds = []
    for item in metadata:
        for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(item, kind):
                bounds.append(f"{sign} {getattr(item, name):g}")
    return " " + " and ".join(bounds) if bounds else ""
