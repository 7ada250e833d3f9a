"""`GROUP=NAME` on the command line: what a group file replaces, what wins, and what a mistake in one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import load_config
from common.errors import UserError
from sft.config import SFTConfig

CONFIG = """\
data: {data_dir: a.json, columns: {Question: title}}
model_name: some/model
model_params:
  learning_rate: 0.5
  lora: {r: 4, lora_dropout: 0.5}
"""
GROUPS = {
    "lora/small": "model_params:\n  lora: {r: 2}\n  weight_decay: 0.25\n",
    "lora/wrong": "# a comment\nmodel_params:\n  lora:\n    r: 0\n    rank: 3\n",
    "lora/twice": "model_params:\n  lora: {r: 1, r: 2}\n",
    "lora/broken": "model_params: [\n",
    "lora/old": "trainer:\n  checkpoint: {log_obg: val_loss}\n",
    "files/other": "data: {data_dir: data/b.json, columns: {Answer: body}}\ntrainer: {params: {max_epochs: 3}}\n",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, text in {"c": CONFIG, **GROUPS}.items():
        path = tmp_path / "stage/configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "stage/configs/c.yaml"


def load(config: Path, *overrides: str) -> Any:
    return load_config(SFTConfig, config, overrides)


def problems(config: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load(config, *overrides)
    return [problem.replace(str(config.parent), "configs") for problem in raised.value.problems]


def test_a_choice_merges_and_replaces_the_section_of_the_groups_name(config: Path) -> None:
    params = load(config, "lora=small").model_params
    assert (params.lora.r, params.lora.lora_dropout) == (2, 0.0)  # the whole section, back to its defaults
    assert (params.learning_rate, params.weight_decay) == (0.5, 0.25)  # its neighbours stay or are set


def test_other_sections_are_merged_key_by_key_and_missing_ones_made(config: Path) -> None:
    loaded = load(config, "files=other")
    assert loaded.data.columns == {"Question": "title", "Answer": "body"}
    assert loaded.data.data_dir == str(config.parents[1] / "data/b.json")  # as paths in a config do, from the stage's folder
    assert loaded.trainer.params == {"max_epochs": 3}


def test_what_comes_later_wins(config: Path) -> None:
    assert load(config, "lora=small", "model_params.lora.r=9").model_params.lora.r == 9
    assert load(config, "model_params.lora.r=9", "lora=small").model_params.lora.r == 2
    assert load(config, "model_params.lora=null", "lora=small").model_params.lora.r == 2
    both = load(config, "files=other", "lora=small")
    assert (both.model_params.lora.r, both.trainer.params) == (2, {"max_epochs": 3})


def test_groups_of_the_stage_serve_a_config_that_lies_elsewhere(config: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(CONFIG)
    assert load_config(SFTConfig, mine, ["lora=small"], base_dir=config.parents[1]).model_params.lora.r == 2
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/small.yaml").write_text("model_params: {lora: {r: 3}}\n")
    assert load_config(SFTConfig, mine, ["lora=small"], base_dir=config.parents[1]).model_params.lora.r == 3


def test_an_unknown_choice_lists_them_all(config: Path) -> None:
    choices = "expected a file of configs/lora: one of broken, old, small, twice, wrong"
    assert problems(config, "lora=smal") == [f"override lora: got 'smal', {choices} (did you mean small?)"]
    assert problems(config, "lora=../c") == [f"override lora: got '../c', {choices}"]


def test_a_name_without_a_group_is_an_override(config: Path) -> None:
    assert load(config, "desc=small").desc == "small"
    [problem] = problems(config, "readout=small")
    assert problem.startswith("override readout: unknown key")
    [problem] = problems(config, "../configs=c")
    assert problem.startswith("override ../configs: ")
    assert problems(config, "=c") == ["override =c: expected section.key=value, got no key before ="]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            "wrong",
            ["configs/lora/wrong.yaml:4: model_params.lora.r: got 0, ", "configs/lora/wrong.yaml:5: model_params.lora.rank: unknown key"],
        ),
        ("twice", ["configs/lora/twice.yaml:2: model_params.lora.r: stands twice"]),
        ("broken", ["configs/lora/broken.yaml:2: broken YAML"]),
    ],
)
def test_a_mistake_in_a_group_file_is_named_with_file_and_line(config: Path, choice: str, expected: list[str]) -> None:
    found = problems(config, f"lora={choice}", "seed=-1")
    for start in [*expected, "override seed: got -1"]:
        assert any(problem.startswith(start) for problem in found), found


def test_what_comes_later_takes_the_blame(config: Path) -> None:
    [problem] = problems(config, "lora=small", "model_params.lora.r=0")
    assert problem.startswith("override model_params.lora.r: got 0")
    [problem] = problems(config, "model_params.lora.r=0", "model_params.learning_rate=-1", "lora=small")
    assert problem.startswith("override model_params.learning_rate: got -1")
    found = problems(config, "model_params.lora.r=9", "lora=wrong")
    assert any(problem.startswith("configs/lora/wrong.yaml:4: model_params.lora.r: got 0") for problem in found), found


def test_old_names_in_a_group_file_are_read(config: Path) -> None:
    assert load(config, "lora=old").trainer.checkpoint.monitor == "val_loss"
