"""`train_ppo.py --dry_run`: every line is there, what can be counted is what the run then does, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # makes an empty folder among the temporary files when it is imported, and Lightning imports it
import yaml

from common.errors import UserError
from common.tracking import read_metrics
from rlhf.train_ppo import main
from tests.processes import as_launched
from tests.runs import contents

FIRST_WORDS = ["config", "data", "parameters", "models", "models", "steps", "measured", "time", "memory", "disk"]


@pytest.fixture
def config(tmp_path: Path, policy_dir: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config on a handful of prompts; whatever is written without a path of its own lands in `tmp_path`, too."""
    rows = [{"prompt": f"Is {'really ' * (number % 3)}{number} a number?"} for number in range(20)]
    (tmp_path / "prompts.json").write_text(json.dumps({"train": rows[:14], "val": rows[14:]}))
    settings: dict[str, Any] = {
        "data_config": {"data_file_path": str(tmp_path / "prompts.json"), "max_prompt_length": 40},
        "generation_config": {"max_new_tokens": 6},
        "ppo_config": {"model_name": str(policy_dir), "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "log_with": "tensorboard"},
        "reward_config": {"reward_model_name": str(reward_dir)},
        "evaluation": {"num_prompts": 4, "every_n_steps": 2},
        "save_config": {"checkpoint_dir": str(tmp_path / "models"), "save_interval": 1},
    }
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def reported(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    capsys.readouterr()
    assert main(["--config", str(path), "--dry_run", *overrides]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [[], ["ppo_config.critic=model"], ["ppo_config.advantage_estimator=grpo", "ppo_config.samples_per_prompt=2"], ["ppo_config.lora.r=2"]],
)
def test_it_says_what_the_run_takes_and_writes_nothing(
    overrides: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    out = reported(config, capsys, *overrides)
    assert contents(tmp_path) == before
    lines = [line for line in out.splitlines() if not line.startswith(("note:", " "))]
    assert [line.partition(":")[0] for line in lines] == [*FIRST_WORDS, "nothing was written; the run can start"]
    assert "data: 14 train, 4 evaluation rows" in out and "every answer of 6 tokens" in out
    assert "fits as reward model: prompt format qa, as the policy; the policy's vocabulary" in out


def test_what_can_be_counted_is_what_the_run_does(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reported(config, capsys)
    assert main(["--config", str(config)]) == 0
    run_dir = tmp_path / "models" / "desc-run,index-0"
    lines = read_metrics(run_dir)
    steps, evaluations = (sum(name in line for line in lines) for name in ("objective/kl", "eval/score"))
    assert f"steps: {steps} PPO steps of 4 answers, {evaluations} validations\n" in out
    [(total, trained)] = re.findall(r"model: ([\d,]+) parameters, ([\d,]+) of them train", (run_dir / "log.txt").read_text())
    assert f"parameters: {total}, of which {trained} train and " in out
    on_disk = sum(path.stat().st_size for path in (run_dir / "last").resolve().rglob("*"))
    assert float(re.findall(r"disk: ([\d.]+) KiB a checkpoint", out)[0]) * 1024 == pytest.approx(on_disk, rel=0.25)


def test_processes_with_sharded_weights_measure_together(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = reported(config, capsys)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    codes, out = as_launched(main, ["--config", str(config), "--dry_run"], tmp_path / "printed")
    assert codes == [0, 0], out
    assert "PPO steps of 8 answers" in out and out.count("processes: 2; the memory is that of the one with the most\n") == 1
    sizes, other = (re.findall(r"parameters: .* frozen;|disk: [\d.]+", text) for text in (alone, out))
    assert sizes == other and len(sizes) == 2
    assert not (tmp_path / "models").exists()


def test_what_does_not_fit_or_has_no_room_ends_it(config: Path, tmp_path: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "judge"
    shutil.copytree(reward_dir, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "prompt_format": "chat"}))
    with pytest.raises(UserError, match="was trained on prompt format chat"):
        main(["--config", str(config), "--dry_run", f"reward_config.reward_model_name={other}"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="checkpoints need"):
        main(["--config", str(config), "--dry_run"])
    assert not (tmp_path / "models").exists()
