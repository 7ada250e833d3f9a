"""`train_sft.py --dry_run`: every line is there, what can be counted is what the run then does, and nothing is written."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # makes an empty folder among the temporary files when it is imported, and Lightning imports it
import yaml

from common.errors import UserError
from common.tracking import read_metrics
from sft.train_sft import main
from tests.runs import contents

README = Path(__file__).resolve().parents[2] / "README.md"
FIRST_WORDS = ["config", "data", "parameters", "models", "steps", "measured", "time", "memory", "disk"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config on a handful of rows; whatever is written without a path of its own lands in `tmp_path`, too."""
    rows = [{"Question": f"What is {a} and {b}?", "Answer": f"It is {a + b}{', friend' * (b % 3)}."} for a in range(5) for b in range(5)]
    (tmp_path / "data.json").write_text(json.dumps({"train": rows[:19], "val": rows[19:]}))
    settings: dict[str, Any] = {
        "data": {"data_dir": str(tmp_path / "data.json"), "batch_size": 4, "max_length": 64},
        "model_init": {
            "model_type": "gpt_neo",
            "vocab_size": 280,
            "config": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 8},
        },
        "model_params": {"freeze_emb": True},
        "trainer": {
            "checkpoint": {"dirpath": str(tmp_path / "models")},
            "params": {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0},
        },
        "wandb": {"mode": "disabled"},
    }
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def reported(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    capsys.readouterr()
    assert main(["--config_file", str(path), "--dry_run", *overrides]) == 0
    return capsys.readouterr().out


def masked(line: str) -> str:
    """A line without its figures, durations and paths."""
    line = re.sub(r"(\d+ h )?(\d+ min )?\d+ s\b", "T", re.sub(r"(?<=in )\S*/\S*", "PATH", line))
    return re.sub(r"[\d.,e-]*\d( (KiB|MiB|GiB))?", "N", line)


def test_it_says_what_the_run_takes_and_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(tmp_path)
    out = reported(config, capsys, "trainer.params.accumulate_grad_batches=2", "data.batching=bucketed")
    assert contents(tmp_path) == before
    lines = [line for line in out.splitlines() if not line.startswith(("note:", " "))]
    assert [line.partition(":")[0] for line in lines] == [*FIRST_WORDS, "nothing was written; the run can start"]
    [shown] = re.findall(r"^config:\n((?:  .*\n)+)", out, flags=re.MULTILINE)
    assert yaml.safe_load(shown)["trainer"]["params"]["accumulate_grad_batches"] == 2
    assert "data: 19 train, 6 val rows" in out and "steps: 6 optimizer steps of 4 x 2 rows, 2 validations" in out


def test_what_can_be_counted_is_what_the_run_does(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.params.max_steps=7", "trainer.params.val_check_interval=3", "model_init.config.hidden_size=128"]
    out = reported(config, capsys, *short)
    assert main(["--config_file", str(config), *short]) == 0
    run_dir = tmp_path / "models" / "desc-run,index-0"
    validated = sum("val/loss" in line for line in read_metrics(run_dir))
    assert f"steps: 7 optimizer steps of 4 x 1 rows, {validated} validations" in out
    printed = (run_dir / "log.txt").read_text()
    [(total, trained)] = re.findall(r"model: ([\d,]+) parameters, ([\d,]+) of them train", printed)
    assert f"parameters: {total}, of which {trained} train and " in out
    on_disk = sum(path.stat().st_size for path in (run_dir / "last").resolve().rglob("*"))
    assert float(re.findall(r"disk: ([\d.]+) MiB a checkpoint", out)[0]) * 2**20 == pytest.approx(on_disk, rel=0.05)


def test_generated_answers_and_packed_rows_are_measured_too(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["model_params.do_compute_metrics=true", "evaluation.generate_params.max_new_tokens=4", "evaluation.num_generated=2"]
    assert "1 validation\n" in reported(config, capsys, "data.batching=packed", "trainer.params.max_epochs=1", *answers)
    assert "0 validations\n" in reported(config, capsys, "trainer.params.limit_val_batches=0")


def test_a_model_that_will_be_spread_is_measured_whole_and_that_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reported(config, capsys, "trainer.params.strategy=fsdp", "trainer.params.devices=2")
    assert "strategy: fsdp spreads weights, gradients and moments over 2 processes; measured with all of them in one\n" in out


def test_a_disk_that_is_too_small_ends_it(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100 * 1024))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'models'}: checkpoints need ") + r".* 100.0 KiB are free; .*keep_last"):
        main(["--config_file", str(config), "--dry_run"])
    assert not (tmp_path / "models").exists()


def test_a_model_that_does_not_fit_ends_it(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length"):
        main(["--config_file", str(config), "--dry_run", "model_init.config.max_position_embeddings=32"])
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("other", ["--resume", "--validate"])
def test_it_stands_alone(config: Path, other: str) -> None:
    with pytest.raises(UserError, match=rf"--dry_run .*{other} .*leave one of them out"):
        main(["--config_file", str(config), "--dry_run", other])


def test_the_readme_shows_its_words(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's example, figures and paths aside, is what it prints."""
    [example] = re.findall(r"^data: 6,216 train.*?(?=^```)", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    printed = reported(config, capsys, "model_params.freeze_emb=false")
    assert [masked(line) for line in printed[printed.index("\ndata: ") + 1 :].splitlines()] == [
        masked(line) for line in example.splitlines()
    ]
