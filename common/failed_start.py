"""A run that ends before its first result leaves nothing behind, so that failed attempts do not fill the folder of runs."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from common.runs import CONFIG_FILE, LOG_FILE
from common.tracking import METRICS_CSV, METRICS_JSONL, TENSORBOARD_FOLDER, WANDB_FOLDER

_WRITTEN_AT_THE_START = frozenset({CONFIG_FILE, LOG_FILE, METRICS_JSONL, METRICS_CSV, WANDB_FOLDER, TENSORBOARD_FOLDER})


@contextlib.contextmanager
def removed_if_unused(run_dir: Path) -> Iterator[None]:
    """Remove the run directory where what is inside ends by an exception (a signal, too) and no metric, table or checkpoint was written."""
    try:
        yield
    except BaseException:
        if is_unused(run_dir):
            shutil.rmtree(run_dir, ignore_errors=True)
            print(f"removed {run_dir}: the run ended before its first step", file=sys.stderr)
        raise


def is_unused(run_dir: Path) -> bool:
    """Whether a directory holds nothing but what a run writes before its first figure."""
    metrics = run_dir / METRICS_JSONL
    logged = metrics.exists() and metrics.stat().st_size > 0
    return not logged and all(path.name in _WRITTEN_AT_THE_START for path in run_dir.iterdir())
