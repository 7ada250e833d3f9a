"""Regenerates the tables of settings in the documents from the schema: `python -m common.schema_docs` (`--check`: only say what is stale).

A table stands between `<!-- settings:NAME -->` and `<!-- /settings -->` in any Markdown file of the repository's root, `docs/` or a stage.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.errors import UserError, run_main
from common.schema_types import field_type, section_of, type_words, walk_fields

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "sft", "reward_model", "rlhf")

# Marker -> schema, as `module:class`: nothing in `common` imports a stage, this command loads them by name.
SCHEMAS = {
    "sft": "sft.config:SFTConfig",
    "classification": "reward_model.config:ClassificationConfig",
    "regression": "reward_model.config:RegressionConfig",
    "ppo": "rlhf.config:PPORunConfig",
    "generation_test": "common.evaluation.config:GenerationTestConfig",
    "reward_test": "reward_model.config:RewardTestConfig",
}
_BLOCK = re.compile(r"(<!-- settings:(?P<name>[\w/]+) -->\n).*?(<!-- /settings -->)", re.DOTALL)


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


def load_schema(name: str) -> type[BaseModel]:
    """The schema of a marker; `reward_model/regression` is `regression`. Raises UserError for an unknown one."""
    target = SCHEMAS.get(name.rpartition("/")[2])
    if target is None:
        raise UserError(f"settings:{name}: unknown table, expected one of {', '.join(SCHEMAS)}")
    module, _, attribute = target.partition(":")
    schema = getattr(importlib.import_module(module), attribute)
    assert issubclass(schema, BaseModel)
    return schema


def with_tables(text: str) -> str:
    """A document with each table between markers replaced by the current one."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{settings_table(load_schema(match['name']))}\n{match[3]}", text)


def documents(root: Path = ROOT) -> Iterator[Path]:
    """Markdown files that may hold tables; what training wrote (model cards) is left out."""
    yield from sorted(root.glob("*.md"))
    for folder in FOLDERS:
        yield from sorted(path for path in (root / folder).rglob("*.md") if "models" not in path.relative_to(root).parts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    options = parser.parse_args(list(argv))
    stale = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            stale.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale; run python -m common.schema_docs' if options.check else 'updated'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    run_main(main)
