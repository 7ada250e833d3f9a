"""SIGTERM and SIGINT, in a step and in a save; two processes that want one directory."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import common.resume
from common.run_lock import LOCK_FILE, locked
from tests.faults.runs import (
    INTERVAL,
    Models,
    Undisturbed,
    at_point,
    ended,
    goes_on,
    in_step,
    kill_itself,
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


@pytest.mark.parametrize(("stage", "what"), [("sft", "held"), ("ppo", "held"), ("regression", "further"), ("ppo", "further")])
def test_a_run_that_another_process_takes_up_in_between_is_left_alone(tmp_path: Path, models: Models, stage: str, what: str) -> None:
    """While a model loads, after the choice of the checkpoint, another process may take up the run, and may even have ended again."""
    config = write_config(stage, tmp_path, models)
    assert run(stage, config, prepare=in_step(stage, 3, kill_itself)).code == -signal.SIGKILL
    folder = run_dir(config)

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE}

    def saved_by_another(run_dir: Path) -> AbstractContextManager[None]:
        shutil.copytree(folder / "checkpoints" / "step-000002", folder / "checkpoints" / "step-000004")
        return locked(run_dir)

    before = content()
    if what == "held":
        with locked(folder):
            outcome = run(stage, config, "--resume", prepare=lambda: setattr(common.resume, "refuse_locked", lambda run_dir: None))
        problem = f"another process writes this run (process {os.getpid()}); wait for its end or stop it"
    else:
        outcome = run(stage, config, "--resume", prepare=lambda: setattr(common.resume, "locked", saved_by_another))
        before |= {path.replace("step-000002", "step-000004"): held for path, held in before.items()}
        problem = "another process has taken the run further in between; start this command again"
    assert outcome.code == 2, outcome
    assert outcome.problems == [f"{folder}: {problem}"]
    assert content() == before
