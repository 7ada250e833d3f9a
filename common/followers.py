"""Who is who among the processes of one training: one leads, the others follow it. No torch: it is known from the start.

They come from one of two places. The first process starts the others with its own command line (`trainer.params.devices`), and tells them
its run through the environment; or something else started all of them (`torchrun`, `accelerate launch`, Ray) and said in RANK, LOCAL_RANK,
WORLD_SIZE and LOCAL_WORLD_SIZE who they are. A follower does the same on its share of each batch; it says nothing and writes nothing.
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
_met = False
_leader_tells: bool | None = None


def rank() -> int:
    """This process's number in the whole training, on all machines; 0 leads."""
    return int(os.environ.get("RANK") or local_rank())


def world_size() -> int:
    """Processes of the whole training, on all machines; 1 in a process that has not started the others yet."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_world_size() -> int:
    """Processes on this machine, as what started them says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def launched() -> bool:
    """Whether something else than this project's own scripts started this process and gave it its rank."""
    return bool(os.environ.get("RANK") and os.environ.get("WORLD_SIZE"))


def follows() -> bool:
    """Whether another process leads this one: what all of them would say or write is its business."""
    return rank() > 0


def followed_run() -> Path | None:
    """The run directory of the process that started this one to follow it; None in any other process."""
    run = os.environ.get(_RUN_VARIABLE)
    return Path(run) if run and follows() and not launched() else None


@contextlib.contextmanager
def leading(run_dir: Path) -> Iterator[None]:
    """Processes that are started inside follow this one's run."""
    os.environ[_RUN_VARIABLE] = str(run_dir)
    try:
        yield
    finally:
        del os.environ[_RUN_VARIABLE]


def met() -> None:
    """The processes of the training have met: from here on each has errors of its own."""
    global _met
    _met = True


def asked_leader(tells: bool) -> None:
    """The process that leads knows how this one ends, and tells it, or does not: it ends in another way, or not at all."""
    global _leader_tells
    _leader_tells = tells


def may_be_told_by_leader() -> bool:
    """Whether the process that leads may be about to tell the error that this one ends with, and was not asked."""
    return follows() and launched() and _leader_tells is None


def tells_errors() -> bool:
    """Whether this process is to say why it ends: of several that a launcher started, one a machine, until they have met."""
    return not _leader_tells and (_met or not launched() or local_rank() == 0)


def end_with_leader() -> None:
    """Let the system end this process when the one that started it ends, however that happens (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def refuse_launchers() -> None:
    """Raise UserError in one of several processes that a launcher started, of a command that runs in one."""
    if launched() and world_size() > 1:
        raise UserError(f"WORLD_SIZE is {world_size()}, but this command runs in one process; start it with python")
