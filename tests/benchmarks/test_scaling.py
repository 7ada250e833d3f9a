"""The table of one process against two divides what it says, and its runs' configs are ones that the stages accept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from benchmarks import scaling
from benchmarks.scaling import (
    APART,
    LAUNCHERS,
    PLAIN,
    SPEED_HEAD,
    STAGES,
    START_HEAD,
    STARTS,
    Found,
    Memory,
    cases,
    environment,
    family,
    main,
    read,
    speed_rows,
    start_rows,
)
from common.config import load_config
from reward_model.config import ClassificationConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

SCHEMAS: dict[str, type[BaseModel]] = {"sft": SFTConfig, "pairs": ClassificationConfig, "ppo": PPORunConfig}


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_launcher_of_a_stage_has_a_config_that_it_accepts(stage: str, tmp_path: Path) -> None:
    config = STAGES[stage].write(tmp_path, "xs")
    for name in STARTS[stage]:
        shares = [f"{key}={value // LAUNCHERS[name].processes}" for key, value in STAGES[stage].halved.items()]
        assert all((scaling.ROOT / part).is_file() for part in LAUNCHERS[name].before if part.endswith(".yaml"))
        assert load_config(SCHEMAS[stage], config, [*shares, *LAUNCHERS[name].after])
    assert all(value % launcher.processes == 0 for value in STAGES[stage].halved.values() for launcher in LAUNCHERS.values())


def test_seconds_and_tokens_are_those_of_the_steps() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 0, "time": 107.0, "eval/score": 1.0},
        {
            "time": 112.0,
            "perf/rollout_seconds": 1.0,
            "perf/reward_seconds": 0.5,
            "perf/update_seconds": 2.5,
            "perf/tokens_per_second": 10.0,
        },
        {
            "time": 115.0,
            "perf/rollout_seconds": 1.0,
            "perf/reward_seconds": 0.5,
            "perf/update_seconds": 1.5,
            "perf/tokens_per_second": 12.0,
        },
    ]
    found = read(lines, STAGES["ppo"], 100.0, 119.0, [300.0])
    assert found == Found(start=8.0, end=4.0, steps=[4.0, 3.0], tokens=[40.0, 36.0], mib=[300.0])


def test_two_processes_are_compared_on_the_same_cores_and_to_one_thread_each() -> None:
    def found(seconds: float, start: float = 5.0, *mib: float) -> Found:
        return Found(start, 1.0, [99.0, seconds], [1.0, 600.0], list(mib) or [100.0])

    runs = {
        ("pairs", PLAIN, 1): [found(6.0)],
        ("pairs", PLAIN, 2): [found(4.0), found(4.0)],
        ("pairs", APART, 1): [found(8.0, 5.0, 130.0, 120.0)],
        ("pairs", "ddp", 1): [found(3.0, 9.0, 120.0, 110.0, 50.0, 25.0)],
    }
    assert speed_rows(runs) == [
        ["pairs", "1 x 1", "plain", "100", "0.67", "1.00", "100", "6.00"],
        ["pairs", "1 x 2", "plain", "150", "1.00", "0.75", "100", "4.00 4.00"],
        ["pairs", "2 x 1", "apart", "150", "1.00", "0.75", "130 120", "8.00"],
        ["pairs", "2 x 1", "ddp", "200", "1.33", "1.00", "120 110", "3.00"],
    ]
    assert start_rows(runs) == [
        ["pairs", "plain", "1", "5.0", "+0.0", "6.00", "1.0", "100", "0 (0)"],
        ["pairs", "ddp", "2", "9.0", "+4.0", "3.00", "1.0", "120 110", "75 (2)"],
    ]
    for head, rows in ((SPEED_HEAD, speed_rows(runs)), (START_HEAD, start_rows(runs))):
        assert {len(row) for row in rows} == {len(head)}


def test_each_launcher_is_started_once_where_speeds_do_not_start_it() -> None:
    speeds, once = cases(["ppo"], ["plain", "torchrun", "ray"])
    assert speeds == [("ppo", PLAIN, 1), ("ppo", PLAIN, 2), ("ppo", "torchrun", 1)]
    assert once == [("ppo", "ray", 1)]
    for name in ("ddp", APART):
        assert environment(LAUNCHERS[name], 1)["OMP_PROC_BIND"] == "false"  # both would take the first core
    assert environment(LAUNCHERS[PLAIN], 2)["OMP_NUM_THREADS"] == "2"


def test_memory_counts_what_a_process_starts() -> None:
    inner = "import time; held = bytearray(b'x' * 90_000_000); time.sleep(0.6)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer])
    with Memory(process.pid) as memory:
        process.wait()
    assert max(memory.peaks.values()) > 85
    assert os.getpid() in family(os.getpid())


def test_a_run_that_fails_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no luck')")
    broken = scaling.Stage(str(tmp_path / "broken.py"), lambda folder, size: folder, {}, ("perf/step_seconds",), "ddp")
    monkeypatch.setitem(scaling.STAGES, "sft", broken)
    assert main(["--stages", "sft", "--launchers", "plain", "--rounds", "1", "--empty", "0"]) == 1
    assert "no luck" in capsys.readouterr().err


def test_a_run_whose_processes_do_not_share_batches_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"plain": 8, "ddp": 16}

    def fake_run(stage: Any, launcher: scaling.Launcher, *_: Any) -> Found:
        return Found(1.0, 1.0, [1.0] * made["plain" if launcher.processes == 1 else "ddp"], [1.0] * 16, [1.0, 1.0])

    monkeypatch.setattr(scaling, "run", fake_run)
    monkeypatch.setitem(scaling.STAGES, "sft", scaling.Stage("", lambda folder, size: folder, {}, (), "ddp"))
    assert main(["--stages", "sft", "--launchers", "plain", "ddp", "--rounds", "1", "--empty", "0"]) == 1
    said = capsys.readouterr()
    assert "sft, ddp: made 16 steps instead of 8" in said.err
    assert "| ddp |" not in said.out


def test_an_empty_script_begins_in_every_process() -> None:
    assert 0 < scaling.empty_start(LAUNCHERS[PLAIN]) < 60
    [row] = scaling.empty_rows(["ddp", PLAIN], 1)  # ddp is no command of its own
    assert row[:2] == [PLAIN, "1"]
