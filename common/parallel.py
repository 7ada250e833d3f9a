"""Work on stretches of many rows by several processes, with the results in the order of the rows."""

from __future__ import annotations

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any, TypeVar

from common.errors import UserError
from common.followers import end_with_leader, local_world_size

T = TypeVar("T")

STRETCH = 1000
"""Rows that a process works on at once, at most."""
STRETCH_BYTES = 2**20
"""Bytes of the rows that a process works on at once, where their sizes are known and it is more than one row."""
_AHEAD = 3  # stretches per process that are begun before the first one's result is taken

# As the process was started: OpenMP binds its first thread to one of them when torch is imported (OMP_PROC_BIND), and workers inherit that.
_AFFINITY = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))

_work: Callable[[Sequence[Any]], Any]
_rows: Sequence[Any]


def cores(*, others_wait: bool = False) -> int:
    """Processors that this process may use: its share where several processes of a training run here, all if the others wait for it."""
    return len(_AFFINITY) if others_wait else max(1, len(_AFFINITY) // local_world_size())


def in_stretches(
    work: Callable[[Sequence[Any]], T],
    rows: Sequence[Any],
    processes: int | None = None,
    *,
    sizes: Iterable[int] | None = None,
    others_wait: bool = False,
) -> Iterator[T]:
    """`work(stretch)` of each stretch of rows, in order. `processes`: how many work; default: one per core (`cores`).

    sizes: bytes of each row. An exception of `work` is raised here. Raises UserError where a process ends before its work is done.
    """
    parts = list(_stretches(len(rows), sizes))
    processes = min(processes or cores(others_wait=others_wait), len(parts))
    if processes <= 1:
        for part in parts:
            yield work(rows[part])
        return
    gc.freeze()  # looking for garbage writes to each object, and what is written to is shared by the processes no more
    pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(work, rows))
    try:
        begun: deque[Future[T]] = deque()
        for part in parts:
            begun.append(pool.submit(_stretch, part))
            if len(begun) > _AHEAD * processes:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    except BrokenProcessPool:
        raise UserError("a process that was to read rows of the data has ended early; was there too little memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _stretches(count: int, sizes: Iterable[int] | None) -> Iterator[slice]:
    """Parts of `count` rows that are worked on at once."""
    start = held = 0
    for row, size in enumerate(repeat(0, count) if sizes is None else sizes):
        if row - start == STRETCH or (row > start and held + size > STRETCH_BYTES):
            yield slice(start, row)
            start, held = row, 0
        held += size
    if count > start:
        yield slice(start, count)


def _begin(work: Callable[[Sequence[Any]], Any], rows: Sequence[Any]) -> None:
    global _work, _rows
    end_with_leader()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _AFFINITY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that began this one ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work, _rows = work, rows


def _stretch(part: slice) -> Any:
    return _work(_rows[part])
