"""The table of settings of a schema, for the documents (`make docs` puts it there)."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.schema_types import field_type, section_of, type_words, walk_fields


def settings_table(schema: type[BaseModel]) -> str:
    """A Markdown table with a row for every key: key, type, default, description."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for path, field in walk_fields(schema):
        name = f"`{'.'.join(path)}`"
        section = section_of(field.annotation) is not None
        words = "section" if section else re.sub(r"\ba (?=whole|number|list|mapping|path|model)", "", type_words(field_type(field)))
        cells = (f"**{name}**" if section else name, words, _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    assert default is not PydanticUndefined
    if isinstance(default, BaseModel):
        changed = default.model_dump(exclude_unset=True)
        return ", ".join(f"`{key}: {_yaml(value)}`" for key, value in changed.items())
    return f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    """A default as it would be written in a config."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f'"{item}"' if isinstance(item, str) else _yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
