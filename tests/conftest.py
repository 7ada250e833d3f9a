"""Shared fixtures. The suite runs offline, on CPU, with tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch and transformers are imported by any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common.plots import plot_curves

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, or one of the processes that run tests would end long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
