"""A run that ends before its first result leaves nothing behind, so that failed attempts do not fill the folder of runs."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Container, Iterator
from pathlib import Path

from common.run_lock import LOCK_FILE
from common.runs import CONFIG_FILE, LOG_FILE
from common.tracking import METRICS_CSV, METRICS_JSONL, TENSORBOARD_FOLDER, WANDB_FOLDER

_WRITTEN_AT_THE_START = frozenset({CONFIG_FILE, LOG_FILE, METRICS_JSONL, METRICS_CSV, LOCK_FILE, WANDB_FOLDER, TENSORBOARD_FOLDER})


@contextlib.contextmanager
def removed_if_unused(run_dir: Path, also: Container[str] = ()) -> Iterator[None]:
    """Remove the run directory where what is inside ends by an exception (a signal, too) and no metric, table or checkpoint was written.

    also: names of what else is written before there are results.
    """
    try:
        yield
    except BaseException:
        if is_unused(run_dir, also):
            shutil.rmtree(run_dir, ignore_errors=True)
            print(f"removed {run_dir}: the run ended before its first step", file=sys.stderr)
        raise


def is_unused(run_dir: Path, also: Container[str] = ()) -> bool:
    """Whether a directory holds nothing but what a run writes before its first figure, and what is called `also`."""
    metrics = run_dir / METRICS_JSONL
    logged = metrics.exists() and metrics.stat().st_size > 0
    return not logged and all(path.name in _WRITTEN_AT_THE_START or path.name in also for path in run_dir.iterdir())
