"""Reward models of both kinds, in one process and in two, go on from where they were stopped with the bits of a run that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from reward_model.classification import train_reward as train_pairs
from reward_model.classification.module import PairModule
from reward_model.regression import train_reward as train_scores
from reward_model.regression.module import ScoreModule
from tests.processes import as_launched
from tests.runs import left_by, stop_at

ROOT = Path(__file__).resolve().parents[2]
MAINS: dict[str, Any] = {"pair": train_pairs.main, "score": train_scores.main}
MODULES: dict[str, type[pl.LightningModule]] = {"pair": PairModule, "score": ScoreModule}


FROZEN = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff")}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "pairs, two data workers": ("pair", {"data": {"num_workers": 2}, "model_params": {"dropout": 0.2}}, (1, 3)),
    "an ensemble by question": (
        "pair",
        {"data": {"batching": "by_question"}, "model_params": {"readout": {"name": "mean_pool", "ensemble": 2, "hidden_sizes": [4]}}},
        (2,),
    ),
    "scores with adapters": ("score", {"model_params": {"lora": {"r": 2}}}, (2, 5)),
    "pairs above frozen layers": (
        "pair",
        {"model_params": {**FROZEN, "layers_not_to_freeze": [-1], "cache_states": "float32"}},
        (3,),
    ),
    "scores on cached states": ("score", {"model_params": {"freeze_backbone": True, "readout": {"name": "mean_pool"}}}, (3,)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_with_the_same_bits(name: str, write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes, steps = CASES[name]
    config = write_config(kind, **changes)
    command = ["--config", str(config), "trainer.params.max_steps=6", "trainer.params.max_epochs=-1", "trainer.params.log_every_n_steps=1"]
    command += ["trainer.params.val_check_interval=2", "trainer.params.check_val_every_n_epoch=null", "data.batch_size=4"]
    assert MAINS[kind]([*command, "desc=whole"]) == 0
    models = config.parent / "models"
    expected = left_by(models / "desc-whole,index-0")
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            stop_at(patch, MODULES[kind], "training_step", lambda module, step=step: module.trainer.global_step == step)
            MAINS[kind]([*command, f"desc=stopped-{step}"])
        assert left.value.code == 143
        assert MAINS[kind]([*command, f"desc=stopped-{step}", "--resume"]) == 0
        assert left_by(models / f"desc-stopped-{step},index-0") == expected, step


@pytest.mark.slow
def test_two_processes_go_on_together(write_config: Any, tmp_path: Path) -> None:
    """One of two that the script starts is stopped; two that something else starts go on."""
    config = write_config("pair", model_params={"dropout": 0.2})
    argv = [f"--config={config}", "trainer.params.devices=2", "trainer.params.max_epochs=20", "trainer.params.log_every_n_steps=1"]
    argv += ["data.batch_size=4", "trainer.params.enable_progress_bar=true"]
    stopped = subprocess.Popen(
        [sys.executable, "reward_model/classification/train_reward.py", *argv, "desc=stopped"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    codes, printed = as_launched(MAINS["pair"], [*argv, "desc=whole"], tmp_path / "whole")
    assert codes == [0, 0], printed
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if line.startswith("step ") and "val/loss" in line:  # of 20
            stopped.send_signal(signal.SIGTERM)
            break
    assert stopped.communicate(timeout=300) and stopped.returncode == 143
    codes, printed = as_launched(MAINS["pair"], [*argv, "desc=stopped", "--resume"], tmp_path / "resumed")
    assert codes == [0, 0], printed
    models = config.parent / "models"
    assert left_by(models / "desc-stopped,index-0") == left_by(models / "desc-whole,index-0")
