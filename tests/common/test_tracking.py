from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from common import tracking
from common.errors import UserError
from common.schema import WandbArgs, WandbSettings
from common.tracking import Tracker, WandbSink, best_values, better, csv_text, markdown_table, read_metrics, wandb_mode

CANARY = "canary0123456789abcdef0123456789abcdef01"


def test_every_line_has_step_and_time_and_lands_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log({"train/loss": 1.5, "train/lr": 1e-5}, 10)
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # nothing was closed or flushed by us
    assert list(line)[:2] == ["step", "time"]
    assert {name: value for name, value in line.items() if name != "time"} == {"step": 10, "train/loss": 1.5, "train/lr": 1e-5}
    tracker.finish()


def test_a_value_that_is_not_finite_becomes_null_so_that_lines_stay_json(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"a": math.nan, "b": math.inf, "c": 1}, 1)
    line = read_metrics(tmp_path)[0]
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_continued_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with Tracker(tmp_path) as tracker:
            tracker.log({"x": float(step)}, step)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_an_unfinished_last_line_is_passed_over_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x"')
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x"\n{"step": 2, "x": 1.0}\n')
    with pytest.raises(UserError, match="its lines are no metrics any more"):
        read_metrics(tmp_path)


def test_csv_has_one_row_per_step_and_the_later_value_wins() -> None:
    lines = [
        {"step": 5, "time": 1.0, "train/loss": 2.0},
        {"step": 10, "time": 2.0, "train/loss": 1.0},
        {"step": 5, "time": 3.0, "val/loss": 2.5},
        {"step": 10, "time": 4.0, "train/loss": 0.5, "val/loss": None},
    ]
    assert csv_text(lines) == "step,time,train/loss,val/loss\n5,3.0,2.0,2.5\n10,4.0,0.5,\n"


def test_finish_writes_csv_and_summary_once(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log({"val/loss": 0.25}, 3)
        tracker.finish({"best_value": 0.25})
    with (tmp_path / "metrics.csv").open() as file:
        assert [(row["step"], row["val/loss"]) for row in csv.DictReader(file)] == [("3", "0.25")]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"best_value": 0.25}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Tracker.start(tmp_path, stage="sft", config={}, wandb=WandbSettings(), tensorboard=True, is_main=False) as tracker:
        tracker.log({"x": 1.0}, 1)
        tracker.table("t", ("a",), [(1,)], 1)
        tracker.finish({"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_tables_become_one_object_per_row_in_a_file_that_stays_in_its_folder(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.table("../val/answers", ("question", "answer"), [("Warum?", "Darum.\n"), ("为什么", "ü")], 20)
    (path,) = (tmp_path / "tables").iterdir()
    assert path.name == "val_answers-step-000020.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"question": "Warum?", "answer": "Darum.\n"},
        {"question": "为什么", "answer": "ü"},
    ]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val/loss", "min"),
        ("val/perplexity", "min"),
        ("val/accuracy", "max"),
        ("val/token_accuracy", "max"),
        ("val/accuracy_large_margin", "max"),
        ("val/rougeL_fmeasure", "max"),
        ("val/score_mean", None),
        ("train/loss", None),
        ("objective/score_mean", None),
        ("eval/kl", None),
        ("loss", None),
    ],
)
def test_which_direction_is_better(name: str, direction: str | None) -> None:
    assert better(name) == direction


def test_best_values_are_the_first_best_and_skip_null() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "time": 0.0, "val/loss": None, "val/accuracy": 0.5, "val/tokens": 9.0},
        {"step": 2, "time": 0.0, "val/loss": 0.5, "val/accuracy": 0.75, "val/tokens": 1.0},
        {"step": 3, "time": 0.0, "val/loss": 0.5, "val/accuracy": 0.625},
    ]
    assert best_values(lines) == {"val/loss": {"value": 0.5, "step": 2}, "val/accuracy": {"value": 0.75, "step": 2}}
    assert best_values(lines, {"val/tokens": "min"})["val/tokens"] == {"value": 1.0, "step": 2}


@pytest.mark.parametrize(
    ("mode", "key", "variable", "expected"),
    [
        ("auto", None, None, "offline"),
        ("auto", CANARY, None, "online"),
        ("auto", CANARY, "offline", "offline"),
        ("auto", CANARY, "disabled", "disabled"),
        ("auto", "text", None, "offline"),
        ("online", None, None, "offline"),
        ("online", CANARY, "offline", "online"),
        ("offline", CANARY, None, "offline"),
        ("disabled", CANARY, "online", "disabled"),
    ],
)
def test_wandb_goes_online_only_with_a_key(
    monkeypatch: pytest.MonkeyPatch, mode: Any, key: str | None, variable: str | None, expected: str
) -> None:
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", variable)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert wandb_mode(WandbSettings(mode=mode)) == expected


class BrokenSink:
    """Fails at one kind of call."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise ConnectionError("the network is gone\nand more")

    def log(self, metrics: Any, step: int) -> None:
        self._call("log")

    def table(self, name: str, columns: Any, rows: Any, step: int) -> None:
        self._call("table")

    def histogram(self, name: str, values: Any, step: int) -> None:
        self._call("histogram")

    def artifact(self, directory: Path, name: str) -> None:
        self._call("artifact")

    def finish(self, summary: Any, exit_code: int) -> None:
        self._call("finish")


@pytest.mark.parametrize("at", ["log", "table", "histogram", "artifact", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str) -> None:
    with Tracker(tmp_path) as tracker:
        broken, whole = BrokenSink(at), BrokenSink("never")
        tracker._sinks = {"wandb": broken, "TensorBoard": whole}
        for step in (1, 2):
            tracker.log({"x": float(step)}, step)
            tracker.table("t", ("a",), [(1,)], step)
            tracker.histogram("h", [1.0, math.nan], step)
            tracker.histogram("nothing", [math.inf], step)
            tracker.artifact(tmp_path)
    assert whole.calls == ["log", "table", "histogram", "artifact"] * 2 + ["finish"]
    assert broken.calls.count(at) == 1 and broken.calls[-1] == at  # left alone after its failure
    assert [line["x"] for line in read_metrics(tmp_path)] == [1.0, 2.0]
    assert capsys.readouterr().err.splitlines() == [
        "warning: wandb failed (the network is gone); going on without it, metrics.jsonl has everything"
    ]


@pytest.mark.parametrize("sink", ["WandbSink", "TensorBoardSink"])
def test_a_tracker_that_cannot_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sink: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise ImportError("not installed")

    monkeypatch.setattr(tracking, sink, fail)
    wandb = WandbSettings() if sink == "WandbSink" else None
    with Tracker.start(tmp_path, stage="sft", config={}, wandb=wandb, tensorboard=sink == "TensorBoardSink") as tracker:
        tracker.log({"x": 1.0}, 1)
    assert read_metrics(tmp_path)[0]["x"] == 1.0
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RuntimeError("x"), 1), (SystemExit(143), 143)])
def test_an_exception_ends_the_trackers_as_failed(tmp_path: Path, error: BaseException | None, code: int) -> None:
    seen = []

    class Sink(BrokenSink):
        def finish(self, summary: Any, exit_code: int) -> None:
            seen.append(exit_code)

    def run() -> None:
        with Tracker(tmp_path) as tracker:
            tracker._sinks = {"sink": Sink("never")}
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert seen == [code]
    assert (tmp_path / "metrics.csv").exists()


def test_wandb_offline_keeps_its_files_in_the_run_and_the_key_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["train.py", f"wandb.api={CANARY}"])
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    run = tmp_path / "desc-run,index-0"
    run.mkdir()
    settings = WandbSettings(mode="offline", args=WandbArgs(group="g", name="n"))
    with Tracker.start(run, stage="sft", config={"seed": 1}, wandb=settings, tensorboard=True) as tracker:
        tracker.log({"train/loss": 1.0, "val/loss": 2.0}, 1)
        tracker.table("val/answers", ("a",), [("x",)], 1)
        tracker.histogram("val/lengths", [1.0, 2.0, 2.0], 1)
        identity = (run / "wandb" / "run-id.txt").read_text()
        assert tracker._sinks.keys() == {"wandb", "TensorBoard"}
        wandb_sink = tracker._sinks["wandb"]
        assert isinstance(wandb_sink, WandbSink)
        assert (wandb_sink._run.name, wandb_sink._run.group, wandb_sink._run.job_type) == ("n", "g", "sft")
        assert wandb_sink._defined == {"train/step", "val/step", "train/loss", "val/loss", "val/answers", "val/lengths"}
    assert "WANDB_CACHE_DIR" not in os.environ
    assert list((run / "wandb").glob("offline-run-*/*.wandb")) and list((run / "tensorboard").iterdir())
    assert len(identity.strip()) == 16
    assert not (tmp_path / "home").exists()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    captured = capfd.readouterr()
    assert CANARY not in captured.out + captured.err
    assert "warning" not in captured.err


def test_wandb_that_cannot_be_reached_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    modes: list[str] = []

    class Run:
        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}

        def finish(self, exit_code: int) -> None: ...

    def init(**arguments: Any) -> Run:
        modes.append(arguments["mode"])
        assert arguments["dir"] == str(tmp_path)
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return Run()

    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr(wandb, "init", init)
    with Tracker.start(
        tmp_path, stage="sft", config={}, wandb=WandbSettings(mode="online"), init_arguments={"tags": ["a"], "dir": "/elsewhere"}
    ) as tracker:
        assert "wandb" in tracker._sinks
    assert modes == ["online", "offline"]
    assert "wandb sync" in capsys.readouterr().err


def test_cells_cannot_break_a_markdown_table() -> None:
    assert markdown_table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n|---|---|\n| x\\|y | 1<br>2 |"


def test_a_run_that_goes_on_takes_back_what_it_logs_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker.start(tmp_path, stage="sft", config={}, tensorboard=True) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
        position = tracker.position
        tracker.log({"train/loss": 9.0}, 2)
    with Tracker.start(tmp_path, stage="sft", config={}, tensorboard=True) as tracker:
        tracker.go_back(position, 1)
        tracker.log({"train/loss": 2.0}, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("content", [b"x" * 40, b"\xff\n" * 20, b"x\n" * 20])
def test_metrics_that_are_none_any_more_are_told_before_a_run_goes_on(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    tracker = Tracker(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: its lines are no metrics any more"):
        tracker.go_back(40, 1)
