"""One process at a time writes a run directory, or another file that a lock stands for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

LOCK_FILE = ".lock"
_NEW_S = 60.0  # what is younger may not be held yet

_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, a data worker say: the lock is its parent's, and must not outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Held(NamedTuple):
    """A lock's open file. `alone`: nobody else can hold it, which is not so on a file system without locks."""

    descriptor: int
    alone: bool


def hold(path: Path, *, wait: bool = False) -> Held:
    """Hold a file's lock until `release`, or the end of the process, however that comes; the file is made.

    Another process that holds it is waited for, or, without `wait`, raises BlockingIOError. OSError where the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        release(Held(descriptor, False))
        raise
    except OSError:
        return Held(descriptor, False)
    return Held(descriptor, True)


def release(held: Held) -> None:
    """Let go of what `hold` gave; in a forked child it is gone already."""
    if held.descriptor in _held:
        _held.discard(held.descriptor)
        os.close(held.descriptor)


def remove_if_left(path: Path, lock: Path, remove: Callable[[Path], object]) -> None:
    """Remove what a process made a while ago that held `lock` as long as it lived, if none holds that now."""
    with contextlib.suppress(OSError):  # another process holds it, or removes it just now
        if time.time() - path.lstat().st_mtime > _NEW_S:
            held = hold(lock)
            try:
                if held.alone:
                    remove(path)
            finally:
                release(held)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises UserError where another process holds it."""
    held = _hold_run(run_dir)
    try:
        os.ftruncate(held.descriptor, 0)
        os.write(held.descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        release(held)


def refuse_locked(run_dir: Path) -> None:
    """Raise UserError where another process holds the directory now; this one holds nothing afterwards."""
    if (run_dir / LOCK_FILE).exists():
        release(_hold_run(run_dir))


def _hold_run(run_dir: Path) -> Held:
    try:
        return hold(run_dir / LOCK_FILE)
    except BlockingIOError:
        holder = (run_dir / LOCK_FILE).read_text(errors="replace").strip()
        raise UserError(
            f"{run_dir}: another process writes this run{f' (process {holder})' if holder else ''}; wait for its end or stop it"
        ) from None
