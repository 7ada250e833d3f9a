"""Shared fixtures. The suite runs offline, on CPU, with tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch and transformers are imported by any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common.plots import plot_curves

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# What these look at takes long to make, and is made once in a process.
IN_ONE_PROCESS = {"tests/test_ray.py", "tests/security/test_runs.py", "tests/bad_input/test_bad_input.py", "tests/rlhf/ppo/test_sharded.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, or one of the processes that run tests would end long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes that run tests, one runs all of such a file. (Marks of groups are lost between pytest 9.2 and xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in IN_ONE_PROCESS else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_picture() -> Iterator[None]:
    """Drawing the curves takes longer than most trainings here; a test that looks at them has the fixture `picture`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.closing.plot_curves", lambda run_dir: run_dir)
        yield


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their curves after all."""
    monkeypatch.setattr("common.closing.plot_curves", plot_curves)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden numbers beside the repository; its tests are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} beside the repository")
    return SHARED
