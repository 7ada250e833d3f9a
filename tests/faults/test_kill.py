"""kill -9 at every named point of a save, and at random times: what is visible is whole, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from tests.faults.runs import MAINS, POINTS, Models, Undisturbed, at_point, ended, goes_on, kill_itself, run, start, write_config

Whole = Callable[[str], Undisturbed]
SOAK = int(os.environ.get("FAULTS_RANDOM_KILLS", "0"))
"""Kills at random times over all stages; 0: the short form."""


def kills() -> list[tuple[str, str, int]]:
    """(stage, point, the how many-th time): each point in turn with some stage; at length each in every stage, at every save."""
    if SOAK:
        return [(stage, point, count) for stage in MAINS for point in POINTS for count in (1, 2, 3)]
    return [(stage, point, 1 if point == "old checkpoint renamed" else 2) for point, stage in zip(POINTS, cycle(MAINS), strict=False)]


@pytest.mark.parametrize(("stage", "point", "count"), kills())
def test_killed_in_a_save(tmp_path: Path, models: Models, whole: Whole, stage: str, point: str, count: int) -> None:
    config = write_config(stage, tmp_path, models)
    outcome = run(stage, config, prepare=at_point(point, count, kill_itself))
    if point == "old checkpoint renamed" and outcome.code == 0:
        pytest.skip("fewer checkpoints than this were removed")
    assert outcome.code == -signal.SIGKILL, outcome
    goes_on(stage, config, whole(stage).left)


@pytest.mark.parametrize("number", range(SOAK or 4))
def test_killed_at_a_random_time(tmp_path: Path, models: Models, whole: Whole, number: int) -> None:
    stage = list(MAINS)[number % len(MAINS)]
    undisturbed = whole(stage)
    config = write_config(stage, tmp_path, models)
    pid = start(stage, config)
    time.sleep(random.Random(number).uniform(0.1, 1.0) * undisturbed.seconds)
    os.kill(pid, signal.SIGKILL)
    ended(pid, config)
    goes_on(stage, config, undisturbed.left)
