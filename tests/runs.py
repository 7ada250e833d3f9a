"""What a run leaves behind, and how it is stopped in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.tracking import read_metrics
from common.training_state import TENSORS_FILE, read_training_state

_OF_THIS_RUN_ALONE = {"seconds", "peak_memory_gib", "model", "best_of_each"}
_STATE = ("step", "epoch", "batches", "weights", "optimizers", "schedulers", "trainer", "reward", "skipped")


def left_by(run_dir: Path) -> dict[str, Any]:
    """Metrics, summary, weights, tables and state of a finished run, without times and paths: equal for runs that are the same."""
    summary = json.loads((run_dir / "summary.json").read_text())
    state = read_training_state(run_dir / "last")
    return {
        "metrics": [
            {name: value for name, value in line.items() if "perf/" not in name and "time" not in name} for line in read_metrics(run_dir)
        ],
        "summary": {name: value for name, value in summary.items() if name not in _OF_THIS_RUN_ALONE},
        "weights": {
            f"{link}/{file.name}/{name}": tensor.tolist()
            for link in ("best", "last")
            for file in sorted((run_dir / link / "").glob("*.safetensors"))
            if file.name != TENSORS_FILE
            for name, tensor in load_file(file).items()
        },
        "tables": {path.name: path.read_text() for path in sorted((run_dir / "tables").glob("*"))},
        "state": {name: repr(state[name]) for name in _STATE if name in state},
    }


def stop_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, comes: Callable[[Any], bool], number: signal.Signals = signal.SIGTERM
) -> None:
    """Send this process a signal in each call of a method before which `comes(self)` holds."""
    original = getattr(owner, method)

    def stopping(subject: Any, *arguments: Any, **options: Any) -> Any:
        if comes(subject):
            os.kill(os.getpid(), number)
        return original(subject, *arguments, **options)

    monkeypatch.setattr(owner, method, stopping)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder, with its time of change and size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def trap(what: str) -> Callable[..., Any]:
    """A function that must not be called."""

    def called(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{what} runs, though what it gives is known")

    return called
