"""Reward functions that raise, hang, or return what is no score; a tracker that is down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import common.tracking
from common.tracking import read_metrics
from tests.faults.runs import Models, Undisturbed, goes_on, left_by, run, run_dir, steps_there, write_config

Whole = Callable[[str], Undisturbed]

FUNCTION = """
import math
import time
from pathlib import Path

def reward(prompts, responses):
    scores = [float(len(response)) for response in responses]
    calls = Path(__file__).with_name("calls")
    made = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(made))
    if made == {call}:
        {fault}
    return scores
"""
FAULTS = {
    "raises": ("raise ValueError('no more words')", "failed on 4 answers: ValueError: no more words (reward.py:"),
    "hangs": ("time.sleep(1000)", "took longer than timeout_s 0.3 for 4 answers"),
    "not a number": ("scores[2] = math.nan", "returned nan, expected a finite number, for answer 2 (to 'What is "),
    "too few": ("scores.pop()", "returned 3 numbers for 4 answers"),
}


def with_function(folder: Path, models: Models, fault: str = "pass", call: int = 0) -> Path:
    """PPO with a reward function; evaluations (before training, after steps 3 and 6) call it, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(FUNCTION.format(call=call, fault=fault))
    pipeline = {"type": "function", "path": f"{folder / 'reward.py'}:reward", "timeout_s": 0.3}
    return write_config("ppo", folder, models, reward_config={"pipeline": pipeline})


@pytest.fixture(scope="module")
def by_function(tmp_path_factory: pytest.TempPathFactory, models: Models) -> dict[str, Any]:
    """What an undisturbed run with the function leaves."""
    config = with_function(tmp_path_factory.mktemp("by_function"), models)
    assert run("ppo", config).code == 0
    return left_by(config)


@pytest.mark.parametrize("name", FAULTS)
def test_a_reward_function_fails(tmp_path: Path, models: Models, by_function: dict[str, Any], name: str) -> None:
    """In step 4, which is the 6th call: the steps made are saved first, so that none is lost."""
    fault, message = FAULTS[name]
    config = with_function(tmp_path, models, fault, 6)
    outcome = run("ppo", config)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    [problem] = outcome.problems
    assert problem.startswith("PPO step 4: reward function ") and message in problem
    assert problem.count("data.json: train row ") == (1 if name == "not a number" else 4)
    assert steps_there(config)[-1] == 3
    with_function(tmp_path, models)
    resumed(config, by_function)


def test_a_reward_function_fails_in_an_evaluation(tmp_path: Path, models: Models, by_function: dict[str, Any]) -> None:
    """That after step 3, which is the 5th call: it is made up for."""
    config = with_function(tmp_path, models, "raise KeyError('x')", 5)
    outcome = run("ppo", config)
    assert outcome.code == 2 and outcome.problems[0].startswith("PPO step 3: "), outcome
    assert steps_there(config)[-1] == 3
    with_function(tmp_path, models)
    resumed(config, by_function)


def resumed(config: Path, expected: dict[str, Any]) -> None:
    goes_on("ppo", config, expected)


class BrokenSink:
    """A tracker that is reached at first, and then no more."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.calls = 0

    def log(self, metrics: Any, step: int) -> None:
        self.calls += 1
        if self.calls > 2:
            raise ConnectionError("no route to the tracker")

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def test_a_tracker_that_is_down_ends_nothing(tmp_path: Path, models: Models, whole: Whole) -> None:
    def prepare() -> None:
        common.tracking.WandbSink = BrokenSink  # type: ignore[assignment, misc]

    config = write_config("sft", tmp_path, models, wandb__mode="offline")
    outcome = run("sft", config, prepare=prepare)
    assert outcome.code == 0, outcome
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: wandb failed (no route to the tracker); going on without it, metrics.jsonl has everything"]
    assert left_by(config) == whole("sft").left and len(read_metrics(run_dir(config))) > 3
