"""Names stay names: no setting, file or link leads what is written, or what a foreign file makes us read, out of its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.checkpoint import read_manifest, verify_directory
from common.config import parse_command_line
from common.errors import UserError
from common.launch.checkpointing import CheckpointKeeper
from common.models.load import load_generator
from common.records import read_splits
from common.runs import create_run_directory, publish_latest
from common.tracking import Tracker
from rlhf.config import PPORunConfig
from sft.config import SFTConfig
from tests.security.conftest import Problem, change_json, unlisted

OUTSIDE = ["../../x", "../x", "/tmp/x", "a/b/c", "..", ".", "~", "x\0y", "a\nb", "", "..\\x"]
SFT = {"data": {"data_dir": "d.json"}, "model_name": "m"}
PPO = {"data_config": {"data_file_path": "d.json"}, "ppo_config": {"model_name": "m"}, "reward_config": {"reward_model_name": "m"}}


def parse(schema: Any, folder: Path, settings: dict[str, Any], *overrides: str) -> Any:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "c.yaml").write_text(yaml.safe_dump(settings))
    return parse_command_line(schema, folder, ["--config", str(folder / "configs" / "c.yaml"), *overrides], description="").config


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_a_run(name: str, tmp_path: Path, problem: Problem) -> None:
    for key in ("desc", "index"):
        assert f" {key}: got {name!r}, expected " in problem(lambda key=key: parse(SFTConfig, tmp_path, {**SFT, key: name}))  # type: ignore[misc]
    problem(lambda: create_run_directory(tmp_path / "runs", name, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


@pytest.mark.parametrize("name", [*OUTSIDE, "https://hub/user/model", "user/..", "user/model/more", "-x"])
def test_the_name_of_a_repository(name: str, tmp_path: Path, problem: Problem) -> None:
    assert "hf_hub_name: got " in problem(lambda: parse(PPORunConfig, tmp_path, {**PPO, "hf_hub_name": name}))
    assert parse(PPORunConfig, tmp_path, {**PPO, "hf_hub_name": "user/model-1.0"}).hf_hub_name == "user/model-1.0"


@pytest.mark.parametrize("name", [*OUTSIDE, "../c", "../readout/small"])
def test_the_name_of_a_config_group(name: str, tmp_path: Path, problem: Problem) -> None:
    group = tmp_path / "configs" / "readout"
    group.mkdir(parents=True)
    (group / "small.yaml").write_text("desc: small\n")
    (tmp_path / "configs" / "c.yaml").write_text("desc: outside\n")
    assert f"override readout: got {name!r}, expected a file of {group}" in problem(
        lambda: parse(SFTConfig, tmp_path, SFT, f"readout={name}")
    )
    for text in (f"../configs={name}", f"readout/..={name}", "..=c", "configs=c"):
        with pytest.raises(UserError):
            parse(SFTConfig, tmp_path, SFT, text)
    assert parse(SFTConfig, tmp_path, SFT, "readout=small").desc == "small"


def test_names_of_splits_and_of_tables(tmp_path: Path, problem: Problem) -> None:
    rows = [{"Question": "Is it?", "Answer": "It is."}]
    for name in OUTSIDE:
        (tmp_path / "data.json").write_text(json.dumps({"train": rows, name: rows}))
        problem(lambda: read_splits(str(tmp_path / "data.json"), "sft"))
    run = tmp_path / "run"
    run.mkdir()
    with Tracker(run) as tracker:
        for step, name in enumerate(OUTSIDE):
            tracker.table(name, ("a",), [(1,)], step)
    assert len(list((run / "tables").iterdir())) == len(OUTSIDE)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "data.json"}


def test_links_in_the_place_of_what_is_written_are_not_followed(tmp_path: Path, problem: Problem) -> None:
    """A run beside a planted link: taken names are refused or passed over, `latest`, `best` and `last` are replaced themselves."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "models"
    root.mkdir()
    for name in ("desc-run,index-0", "latest"):
        (root / name).symlink_to(elsewhere)
    (root / "desc-run,index-1").symlink_to(tmp_path / "dangling")
    assert "exists already; the next free index is 2" in problem(lambda: create_run_directory(root, "run", 1))
    run = create_run_directory(root, "run")
    assert run.name == "desc-run,index-2"
    for name in ("best", "last"):
        (run / name).symlink_to(elsewhere)

    def save(directory: Path, metrics: dict[str, float], step: int, extra: Callable[[Path], None]) -> None:
        directory.mkdir(parents=True)

    keeper = CheckpointKeeper(run, save, monitor="val/loss", mode="min", keep_last=1)
    keeper.save(1, {"val/loss": 1.0})
    assert publish_latest(root, run / "best").resolve() == run / "checkpoints" / "step-000001"
    assert os.readlink(root / "latest") == "desc-run,index-2/best"
    assert not list(elsewhere.iterdir()) and not (tmp_path / "dangling").exists()
    (root / "latest").unlink()
    (root / "latest").mkdir()
    assert "is no symlink" in problem(lambda: publish_latest(root, run / "best"))


def test_a_link_to_another_model_is_read_as_that_model(generator_dir: Path, tmp_path: Path) -> None:
    """`models/latest` is followed once, to what it points to when the config is read."""
    (tmp_path / "latest").symlink_to(generator_dir)
    assert parse(SFTConfig, tmp_path, {**SFT, "model_name": "latest"}).model_name == str(generator_dir.resolve())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x", ".."])
def test_a_manifest_names_files_of_its_own_directory(name: str, generator: Path, problem: Problem) -> None:
    change_json(generator / "manifest.json", files={name: {"size": 1, "sha256": ""}})
    assert f"{name} would lie outside of the directory" in problem(lambda: read_manifest(generator))
    assert verify_directory(generator) == [problem(lambda: read_manifest(generator))]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.bin", "sub/x.safetensors", 1])
def test_an_index_of_weights_names_files_of_its_own_directory(index: str, name: Any, generator: Path, problem: Problem) -> None:
    (unlisted(generator) / "model.safetensors").unlink()
    (generator / index).write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    assert problem(lambda: load_generator(str(generator))).endswith(f"{index} names weights outside of its folder: {name!r}")


@pytest.mark.parametrize("place", ["ABSOLUTE", "../secret.json", "data/../../secret.json", "data/*.json"])
def test_a_data_set_s_card_names_files_of_its_own_folder(
    place: str, tmp_path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card of a data set says which files are read; else it could have any of this machine read, and a model repeat it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for file in (tmp_path / "secret.json", folder / "data" / "rows.json"):
        file.write_text(json.dumps([{"Question": file.stem, "Answer": "x"}]))
    card = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": place.replace("ABSOLUTE", f"{tmp_path}/secret.json")}]}
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        if "*" in place:
            assert [record.prompt.question for record in read_splits(f"hf:{name}", "sft").train] == ["rows"]
        else:
            assert "secret.json, which is not part of the data set" in problem(lambda name=name: read_splits(f"hf:{name}", "sft"))  # type: ignore[misc]
