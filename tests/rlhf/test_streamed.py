"""PPO on prompts that stay in their file is PPO on prompts in memory, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common import json_stream, parallel, records
from common.tracking import read_metrics
from rlhf.config import PPORunConfig
from rlhf.inputs import read_prompts, training_prompts
from rlhf.train_ppo import main

JUDGE = """
def length(prompts, responses, topic, level):
    return [float(len(text) + (number or 0)) for text, number in zip(responses, level)]
"""


@pytest.fixture
def config(tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 500)
    monkeypatch.setattr(parallel, "STRETCH", 7)
    monkeypatch.setattr(parallel, "cores", lambda **_: 1)
    rows = [{"prompt": f"Is {n % 25} {'very ' * (n % 9)}a number?", **({"topic": n} if n % 3 else {"level": n})} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    settings: dict[str, Any] = {
        "data_config": {"data_file_path": str(tmp_path / "prompts.jsonl"), "max_prompt_length": 30, "validation_split_percentage": 20.0},
        "generation_config": {"max_new_tokens": 4},
        "ppo_config": {"model_name": str(policy_dir), "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 1, "steps": 3},
        "global_epochs": 3,
        "reward_config": {"pipeline": {"type": "function", "path": f"{tmp_path / 'judge.py'}:length"}},
        "evaluation": {"num_prompts": 4, "every_n_steps": 2},
        "save_config": {"checkpoint_dir": str(tmp_path / "models"), "save_interval": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(config: Path, desc: str, *overrides: str) -> tuple[Any, ...]:
    assert main(["--config", str(config), f"desc={desc}", *overrides]) == 0
    directory = config.parent / "models" / f"desc-{desc},index-0"
    lines = [{name: value for name, value in line.items() if not name.startswith(("perf/", "time"))} for line in read_metrics(directory)]
    return lines, load_file(directory / "last" / "model.safetensors")


@pytest.mark.parametrize("unique", ["true", "false"])
def test_figures_and_weights(config: Path, monkeypatch: pytest.MonkeyPatch, unique: str) -> None:
    found = []
    for desc, limit in (("memory", 2**30), ("streamed", 0)):
        monkeypatch.setattr(records, "STREAMED_BYTES", limit)
        found.append(run(config, desc, f"data_config.unique_prompts={unique}"))
    (lines, weights), (lines_streamed, weights_streamed) = found
    assert lines == lines_streamed and len(lines) > 3
    assert all(torch.equal(weights[name], weights_streamed[name]) for name in weights)
    assert len(list((config.parent / "models" / "token_cache").glob("*/manifest.json"))) == 1  # evaluation prompts are few


def test_what_is_said_and_read_beforehand(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said, read = [], []
    settings = PPORunConfig.model_validate(yaml.safe_load(config.read_text()))
    for limit in (2**30, 0):
        monkeypatch.setattr(records, "STREAMED_BYTES", limit)
        splits = read_prompts(settings)
        read.append([list(training_prompts(splits, settings.data_config)), list(splits.val)])
        capsys.readouterr()
        for how in ("--validate", "--dry_run"):
            assert main(["--config", str(config), how]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "token_cache" not in line]
        said.append([line for line in lines if not line.startswith(("measured", "time", "memory", "disk"))])
    assert read[0] == read[1] and list(read[0][0][0].columns) == list(read[1][0][0].columns)
    assert said[0] == said[1] and len(said[0]) > 10
