from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common import closing
from common.closing import RunResult, closing_lines, finish_run, opening_lines
from common.runs import create_run_directory, replace_symlink
from common.tracking import Tracker


def finished(root: Path) -> tuple[Path, RunResult]:
    run = create_run_directory(root, "run")
    model = run / "checkpoints" / "step-000020"
    model.mkdir(parents=True)
    replace_symlink(run / "best", model)
    return run, RunResult(model, "val/loss", 0.5, {"val/loss": 0.5, "val/bleu": 12.345}, steps=30, seconds=61.0, peak_memory_gib=1.5)


def test_the_first_words() -> None:
    frozen, trained = torch.empty(138, 1000), torch.empty(1000, requires_grad=True)
    lines = opening_lines(Path("/runs/a"), parameters=[frozen, trained], rows={"train": 1200, "val": 60}, steps=90, batch="8 x 2 rows")
    assert lines == [
        "model: 139,000 parameters, 1,000 of them train",
        "data: 1,200 train, 60 val rows; 90 optimizer steps of 8 x 2 rows",
        "output: /runs/a",
    ]


@pytest.mark.usefixtures("picture")
def test_the_end_publishes_summarises_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, result = finished(tmp_path)
    with Tracker(run, stage="sft") as tracker:
        for step, loss in [(10, 0.75), (20, 0.5), (30, 0.625)]:
            tracker.log({"val/loss": loss, "train/loss": 0.0}, step)
        finish_run(tracker, result, runs_root=tmp_path, extra={"score_mean": 0.25})
    assert (tmp_path / "latest").resolve() == result.model
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_of_each"] == {"val/loss": {"value": 0.5, "step": 20}}
    assert (summary["stage"], summary["steps"], summary["best_value"], summary["score_mean"]) == ("sft", 30, 0.5, 0.25)
    assert (run / "curves.png").stat().st_size > 5000
    assert capsys.readouterr().out.splitlines() == [
        "done: 30 steps in 1 min 01 s, peak memory 1.50 GiB",
        "best val/loss 0.5 (val/bleu 12.35), step-000020",
        f"model:   {tmp_path / 'latest'} -> {result.model}",
        f"metrics: {run / 'metrics.csv'}, summary.json",
        f"curves:  {run / 'curves.png'}",
    ]


def test_a_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run_dir: Path) -> Path:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(closing, "plot_curves", fail)
    run, result = finished(tmp_path)
    finish_run(Tracker(run), result, runs_root=None)
    captured = capsys.readouterr()
    assert captured.err == "warning: no curves were drawn: no fonts\n"
    assert f"model:   {run / 'best'}" in captured.out.splitlines()
    assert not (tmp_path / "latest").exists()


def test_a_run_without_validation_or_without_progress_says_so(tmp_path: Path) -> None:
    def best(**facts: Any) -> str:
        return closing_lines(tmp_path, RunResult(tmp_path / "step-1", "eval/score", **facts), latest=None, curves=None)[1]

    assert best(best_value=None, validated=False).startswith("no validation ran, so no checkpoint is known to be the best; the last one")
    assert "no checkpoint is better than the start: eval/score 0.5 at" in best(best_value=0.25, start_value=0.5)
    assert best(best_value=0.75, start_value=0.5) == "best eval/score 0.75, step-1"


def test_a_model_that_is_no_better_than_the_start_is_published_with_a_word(tmp_path: Path) -> None:
    def model_line(best: float) -> str:
        result = RunResult(tmp_path / "step-1", "eval/score", best, start_value=0.5, started_from="/sft/latest")
        return closing_lines(tmp_path, result, latest=tmp_path / "latest", curves=None)[2]

    published = f"model:   {tmp_path / 'latest'} -> {tmp_path / 'step-1'}"
    ending = "the model it started from is /sft/latest)"
    assert model_line(0.25) == f"{published} (worse than the start: eval/score 0.25, it was 0.5; {ending}"
    assert model_line(0.5) == f"{published} (no better than the start: eval/score 0.5, it was 0.5; {ending}"
    assert model_line(0.75) == published


def test_a_run_without_a_finite_figure_says_so(tmp_path: Path) -> None:
    lines = closing_lines(tmp_path, RunResult(tmp_path / "step-1", "val/loss", None), latest=None, curves=None)
    assert lines[1] == "val/loss was never a finite number; the last checkpoint stands in for the best, step-1"
