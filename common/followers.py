"""Training on several devices: the first process starts the others with its own command line, and they follow it.

A follower does the same on its share of each batch; it says nothing and writes nothing. No torch: who follows is known from the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

_RUN_VARIABLE = "RLHF_QA_FOLLOWED_RUN"
_PR_SET_PDEATHSIG = 1


def followed_run() -> Path | None:
    """The run directory of the process that this one follows; None in a process that leads, or is alone."""
    run = os.environ.get(_RUN_VARIABLE)
    return Path(run) if run and local_rank() > 0 else None


def local_rank() -> int:
    """This process's number on its machine, 0 for the one that leads."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def leading(run_dir: Path) -> Iterator[None]:
    """Processes that are started inside follow this one's run."""
    os.environ[_RUN_VARIABLE] = str(run_dir)
    try:
        yield
    finally:
        del os.environ[_RUN_VARIABLE]


def end_with_leader() -> None:
    """Let the system end this process when the one that started it ends, however that happens (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def refuse_launchers() -> None:
    """Raise UserError in a process of several that something else than this project's own scripts started."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and followed_run() is None:
        raise UserError(
            f"WORLD_SIZE is {started}, but the script starts its processes itself (use_multi_gpu_if_available, trainer.params.devices); "
            "start it with python"
        )
