"""Reward models learn from rows that stay in their file what they learn from rows in memory, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common import json_stream, parallel, records
from common.tracking import read_metrics
from reward_model.classification import train_reward as pairs
from reward_model.regression import train_reward as scores
from tests.reward_model.conftest import Write, toy_rows

MAIN = {"pair": pairs.main, "score": scores.main}


def data(tmp_path: Path, kind: str) -> Path:
    """Rows of which one is unusable, and the pairs of which some have several rejected answers and margins."""
    rows = toy_rows(kind, 28, 1)
    for number, row in enumerate(rows):
        if kind == "pair" and number % 3 == 0:
            row |= {"Answer": [row["Answer"], f"bad {number}"], "margin": number}
    rows.insert(9, {**rows[0], "Question": " "})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(config: Path, kind: str, desc: str, *overrides: str) -> tuple[Any, ...]:
    """What a run logged and found out about its scores, and its weights."""
    assert MAIN[kind](["--config_file", str(config), f"desc={desc}", *overrides]) == 0
    directory = config.parent / "models" / f"desc-{desc},index-0"
    lines = [{name: value for name, value in line.items() if not name.startswith(("perf/", "time"))} for line in read_metrics(directory)]
    manifest = json.loads((directory / "best" / "manifest.json").read_text())
    facts = [manifest[name] for name in ("data_fingerprint", "score_mean", "score_scale", "score_transform")]
    notes = [line for line in (directory / "log.txt").read_text().splitlines() if line.startswith("note: ") and "token_cache" not in line]
    return lines, facts, notes, load_file(directory / "best" / "model.safetensors")


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 500)
    monkeypatch.setattr(parallel, "STRETCH", 7)
    monkeypatch.setattr(parallel, "cores", lambda **_: 1)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("pair", ["data.batching=by_question", "model_params.margin_use=weigh", "model_params.margin_scale=0.1"]),
        ("pair", ["data.max_length=32", "data.num_workers=1"]),
        ("score", ["model_params.score_transform=standardize", "trainer.checkpoint.monitor=val/spearman", "trainer.checkpoint.mode=max"]),
    ],
)
def test_figures_weights_and_notes(
    tmp_path: Path, write_config: Write, monkeypatch: pytest.MonkeyPatch, kind: str, overrides: list[str]
) -> None:
    config = write_config(kind, data={"data_dir": str(data(tmp_path, kind)), "unusable_rows": "drop", "validation_split_percentage": 20.0})
    found = []
    for desc, limit in (("memory", 2**30), ("streamed", 0)):
        monkeypatch.setattr(records, "STREAMED_BYTES", limit)
        found.append(run(config, kind, desc, *overrides))
    (lines, facts, notes, weights), streamed = found
    assert streamed[:3] == (lines, facts, notes) and len(lines) > 1
    assert weights.keys() == streamed[3].keys() and all(torch.equal(weights[name], streamed[3][name]) for name in weights)
    assert len(list((tmp_path / "models" / "token_cache").glob("*/manifest.json"))) == 2


@pytest.mark.parametrize("kind", MAIN)
def test_a_frozen_backbone_and_a_dry_run(
    tmp_path: Path, write_config: Write, monkeypatch: pytest.MonkeyPatch, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(kind, data={"data_dir": str(data(tmp_path, kind)), "unusable_rows": "drop"})
    found, said = [], []
    for desc, limit in (("memory", 2**30), ("streamed", 0)):
        monkeypatch.setattr(records, "STREAMED_BYTES", limit)
        capsys.readouterr()
        assert MAIN[kind](["--config_file", str(config), "--dry_run"]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith(("data:", "  train ", "  val ", "steps:"))])
        found.append(run(config, kind, desc, "model_params.freeze_backbone=true")[:2])
    assert found[0] == found[1] and said[0] == said[1] and len(said[0]) == 6
