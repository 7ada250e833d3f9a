"""One of two processes that train together is killed or stalls: the other ends, too, and none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import Models, steps_there, write_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

sys.path[0] = {root!r}
from common.errors import run_main
from reward_model.classification.module import PairModule
from reward_model.classification.train_reward import main

original = PairModule.training_step

def training_step(module, batch, batch_idx):
    rank = os.environ["LOCAL_RANK"]
    told = Path(__file__).parent / f"pid-{{rank}}"
    if not told.exists():  # once, long before any of them is killed
        told.write_text(str(os.getpid()))
    if module.trainer.global_step == 3 and rank == {rank!r}:
        {act}
    return original(module, batch, batch_idx)

PairModule.training_step = training_step
run_main(main)
"""
TIMEOUT_S = 60
"""Also of the meeting at the start, for which a process has to import torch."""


CASES = [
    ("1", "os.kill(os.getpid(), signal.SIGKILL)"),
    ("0", "os.kill(os.getpid(), signal.SIGKILL)"),
    ("1", "time.sleep(1000)"),
]
SOAK = bool(os.environ.get("FAULTS_RANDOM_KILLS"))


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "act"), CASES if SOAK else CASES[:1])
def test_all_end(tmp_path: Path, models: Models, rank: str, act: str) -> None:
    changes = {"trainer__params__devices": 2, "trainer__params__max_epochs": 3, "trainer__process_timeout_s": TIMEOUT_S}
    config = write_config("classification", tmp_path, models, **changes)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), rank=rank, act=act))
    result = subprocess.run(
        [sys.executable, str(script), "--config", str(config)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode != 0, result
    if rank == "1":
        assert result.returncode == 2 and "a process of this training ended, or did not answer within" in result.stderr, result
    pids = [int((tmp_path / f"pid-{number}").read_text()) for number in (0, 1)]
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_there, pids))
    assert steps_there(config) == [2]
