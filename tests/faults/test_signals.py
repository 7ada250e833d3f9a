"""SIGTERM and SIGINT, in a step and in a save; two processes that want one directory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import (
    INTERVAL,
    Models,
    Undisturbed,
    at_point,
    ended,
    goes_on,
    in_step,
    run,
    run_dir,
    start,
    steps_there,
    write_config,
)

Whole = Callable[[str], Undisturbed]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize(
    ("stage", "place", "number"),
    [
        ("sft", "step", signal.SIGINT),
        ("classification", "step", signal.SIGTERM),
        ("ppo", "step", signal.SIGTERM),
        ("regression", "save", signal.SIGINT),
        ("ppo", "save", signal.SIGINT),
        ("sft", "save", signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_exits_with_its_code(
    tmp_path: Path, models: Models, whole: Whole, stage: str, place: str, number: signal.Signals
) -> None:
    def send() -> None:
        os.kill(os.getpid(), number)

    config = write_config(stage, tmp_path, models)
    prepare = in_step(stage, 2, send) if place == "step" else at_point("weights written", 1, send)
    outcome = run(stage, config, prepare=prepare)
    assert outcome.code == CODES[number] and "--resume" in outcome.out + outcome.err, outcome
    assert "Traceback" not in outcome.err
    # The step that was in hand is made and saved; in a save it is that of the step before, or of the next one.
    assert steps_there(config)[-1] == 3 if place == "step" else steps_there(config)[-1] in (INTERVAL, INTERVAL + 1)
    goes_on(stage, config, whole(stage).left)


@pytest.mark.parametrize(("stage", "place"), [("sft", "save"), ("ppo", "save"), ("ppo", "step")])
def test_a_second_interrupt_leaves_at_once(tmp_path: Path, models: Models, whole: Whole, stage: str, place: str) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    config = write_config(stage, tmp_path, models)
    outcome = run(stage, config, prepare=in_step(stage, 3, twice) if place == "step" else at_point("weights written", 2, twice))
    assert outcome.code == 130, outcome
    assert INTERVAL <= steps_there(config)[-1] < 4 and not list((run_dir(config) / "checkpoints").glob(".*"))
    goes_on(stage, config, whole(stage).left)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, models: Models, whole: Whole) -> None:
    config = write_config("sft", tmp_path, models)
    first = start("sft", config, prepare=at_point("links moved", 1, lambda: time.sleep(100)))
    try:
        deadline = time.monotonic() + 60
        while not (run_dir(config) / "last").is_symlink() and time.monotonic() < deadline:
            time.sleep(0.02)
        second = write_config("sft", tmp_path / "second", models, trainer__checkpoint__dirpath=str(tmp_path / "models"))
        (tmp_path / "second" / "data.json").unlink()
        second.write_text(config.read_text())
        outcome = run("sft", second, "--resume")
        assert outcome.code == 2, outcome
        assert outcome.problems == [f"{run_dir(config)}: another process writes this run (process {first}); wait for its end or stop it"]
    finally:
        os.kill(first, signal.SIGKILL)
        ended(first, config)
    goes_on("sft", config, whole("sft").left)
