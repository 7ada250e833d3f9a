"""docs/llm_on_ray.md tells the truth: its settings exist, its files are there, its commands are understood, its tables are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from common.convert import TARGETS, _parser
from common.lightning_arguments import ARGUMENTS
from common.llm_on_ray import _FIXED, KEYS
from common.schema_types import type_at
from docs.tables import SCHEMAS, regenerate

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/llm_on_ray.md").read_text(encoding="utf-8")
STAGES = {"sft": "sft", "reward": "classification", "ppo": "ppo"}
SETTING = re.compile(
    r"^((?:data|data_config|model_params|trainer|launch|ppo_config|reward_config|generation_config|save_config)\.[\w.]+)(?:: .+)?$"
)


def test_tables_are_current_and_hold_every_key() -> None:
    assert regenerate(TEXT) == TEXT
    for key in KEYS:
        section, _, name = key.partition(".")
        assert f"| `{name if section in ('General', 'Dataset', 'Training') else key}` |" in TEXT


def test_every_setting_exists_somewhere() -> None:
    named = {match[1] for text in re.findall(r"`([^`\n]+)`", TEXT) if (match := SETTING.match(text))}
    assert len(named) > 40
    missing = [
        name
        for name in named
        if not any(type_at(SCHEMAS[schema], tuple(name.split("."))) is not None for schema in STAGES.values())
        or (name.startswith("trainer.params.") and name.split(".")[2] not in ARGUMENTS)
    ]
    assert missing == []


def test_their_keys_that_are_named_in_the_text_are_known() -> None:
    named = set(re.findall(r"`((?:General|Dataset|Training)\.\w+)[=`]", TEXT))
    assert named and named <= KEYS.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_what_their_code_fixed_is_told(stage: str) -> None:
    for name, value in _FIXED[stage].items():  # type: ignore[index]
        assert type_at(SCHEMAS[STAGES[stage]], tuple(name.split("."))) is not None
        shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
        assert f"`{name}: {shown}`" in TEXT or name == "data_config.unusable_rows"


def test_conversions_are_commands_that_are_understood() -> None:
    commands = re.findall(r"`python -m common\.convert ([^`]+)`", TEXT)
    assert len(commands) == 5
    for command in commands:
        options = _parser().parse_args(shlex.split(command))
        assert options.to in TARGETS and options.source.startswith("hf:")


def test_files_and_commands_are_there() -> None:
    for name in re.findall(r"`((?:tests|examples|sft|rlhf|reward_model)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
    scripts = re.findall(r"^\+python (\S+) +--config_path", TEXT, flags=re.MULTILINE)
    assert len(scripts) == 3 and all((ROOT / script).is_file() for script in scripts)
