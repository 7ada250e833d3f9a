from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.failed_start import removed_if_unused
from common.runs import create_run_directory, run_log, write_config
from common.tracking import Tracker


def fails_after(root: Path, *logged: dict[str, float]) -> Path:
    run = create_run_directory(root, "run")
    with pytest.raises(UserError), removed_if_unused(run), run_log(run), Tracker.start(run, stage="sft", config={}) as tracker:
        write_config(run, {"seed": 1})
        print("about to fail")
        for metrics in logged:
            tracker.log(metrics, 1)
        raise UserError("no")
    return run


def test_a_run_that_fails_before_its_first_figure_leaves_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fails_after(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == f"removed {run}: the run ended before its first step\n"


def test_a_run_with_figures_or_checkpoints_stays(tmp_path: Path) -> None:
    assert (fails_after(tmp_path, {"train/loss": 1.0}) / "metrics.jsonl").exists()
    run = create_run_directory(tmp_path, "run")
    with pytest.raises(KeyboardInterrupt), removed_if_unused(run):
        (run / "checkpoints").mkdir()
        raise KeyboardInterrupt
    assert (run / "checkpoints").exists()
    run = create_run_directory(tmp_path, "run")
    with removed_if_unused(run):
        pass
    assert run.exists()
