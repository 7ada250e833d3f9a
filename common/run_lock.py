"""One process at a time writes a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

LOCK_FILE = ".lock"

_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, a data worker say: the lock is its parent's, and must not outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process. The system lets go of it when the process ends, however that happens.

    Raises UserError where another process holds it. On a file system without locks nothing is held.
    """
    descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        _hold(descriptor, run_dir)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def refuse_locked(run_dir: Path) -> None:
    """Raise UserError where another process holds the directory now; this one holds nothing afterwards."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR)
        try:
            _take(descriptor, run_dir)
        finally:
            os.close(descriptor)


def _hold(descriptor: int, run_dir: Path) -> None:
    if _take(descriptor, run_dir):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())


def _take(descriptor: int, run_dir: Path) -> bool:
    """Take the lock; False on a file system without locks. Raises UserError where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 64).decode(errors="replace").strip()
        raise UserError(
            f"{run_dir}: another process writes this run{f' (process {holder})' if holder else ''}; wait for its end or stop it"
        ) from None
    except OSError:
        return False
    return True
