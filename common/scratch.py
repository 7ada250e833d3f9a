"""Numbers of all rows of a data set in temporary files that are mapped into memory.

A process holds nothing of them: the system keeps as many of their pages as it has room for. They go with the array, and with the process,
however it ends. What works on them takes a stretch at a time, and sorts in place.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

PLACE = np.dtype(np.uint32)
"""Of a row's place in its data set."""
MAPPED_BYTES = 2**20
"""Arrays up to this size are simply in memory."""
STRETCH = 2**16
"""Numbers that are worked on at once."""
_LOW = np.uint64(2**32 - 1)


def scratch(count: int, dtype: Any = PLACE) -> NDArray[Any]:
    """An array of `count` zeros. Raises UserError where the folder of temporary files has no room."""
    size = count * np.dtype(dtype).itemsize
    if size <= MAPPED_BYTES:
        return np.zeros(count, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found here, not by a signal when a page is written
            else:
                file.truncate(size)
            return np.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)
    except OSError as error:
        raise UserError(refusal(error)) from None


def refusal(error: OSError) -> str:
    """What is wrong with the folder of temporary files."""
    try:
        folder = tempfile.gettempdir()
    except OSError:
        folder = "no folder"
    return f"a temporary file of the rows cannot be written to {folder}: {error.strerror or error}; make room, or name another in TMPDIR"


def stretches(count: int) -> Iterator[slice]:
    """0 to `count` in parts that are worked on at once."""
    for start in range(0, count, STRETCH):
        yield slice(start, min(start + STRETCH, count))


class Column(Sequence[Any]):
    """N numbers that are read a stretch at a time: a slice of it is an array, an item of it a plain number."""

    def __init__(self, count: int, read: Callable[[slice], NDArray[Any]]) -> None:
        """`read`: those of a slice of `range(count)`, whose step is 1."""
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload  # type: ignore[override]
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> NDArray[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._count)
            assert step == 1
            return self._read(slice(start, max(start, stop)))
        row = range(self._count)[place]
        return self._read(slice(row, row + 1))[0].item()

    def __iter__(self) -> Iterator[Any]:
        for part in stretches(self._count):
            yield from self._read(part).tolist()


def copied(values: Column | NDArray[Any], dtype: Any) -> NDArray[Any]:
    """The same numbers in an array that may be changed."""
    copy = scratch(len(values), dtype)
    for part in stretches(len(copy)):
        copy[part] = values[part]
    return copy


def counted(count: int) -> NDArray[Any]:
    """0, 1, ... (N,), as places."""
    places = scratch(count)
    for part in stretches(count):
        places[part] = np.arange(part.start, part.stop)
    return places


def shuffled(count: int, generator: np.random.Generator) -> NDArray[Any]:
    """`generator.permutation(count)`, as places."""
    places = counted(count)
    generator.shuffle(places)
    return places


def distinct(values: Column | NDArray[Any]) -> NDArray[Any]:
    """The numbers among `values`, each once, in rising order: `np.unique`."""
    found = copied(values, values[:0].dtype)
    found.sort()
    count, before = 0, None
    for part in stretches(len(found)):
        stretch = found[part]
        new = stretch[np.concatenate([[before is None or stretch[0] != before], stretch[1:] != stretch[:-1]])]
        before = stretch[-1]
        found[count : count + len(new)] = new  # never beyond the stretch that was read
        count += len(new)
    return found[:count]


def first_places(values: Column | NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The distinct numbers, and where each of them stands first."""
    known = distinct(values)
    first = scratch(len(known))
    first.fill(len(values))
    for part in stretches(len(values)):
        np.minimum.at(first, np.searchsorted(known, values[part]), np.arange(part.start, part.stop, dtype=PLACE))
    return known, first


def numbered(values: Column | NDArray[Any]) -> NDArray[Any]:
    """(N,): a number for each of `values`, the same for equal ones, counted from 0 in the order in which they appear."""
    known, first = first_places(values)
    appeared, numbers = copied(first, PLACE), scratch(len(values))
    appeared.sort()
    for part in stretches(len(values)):
        numbers[part] = np.searchsorted(appeared, first[np.searchsorted(known, values[part])])
    return numbers


def grouped(places: NDArray[Any], groups: NDArray[Any]) -> NDArray[Any]:
    """Places, those of each group together and in their order: `places[np.argsort(groups[places], kind="stable")]`."""
    keys, together = scratch(len(places), np.uint64), scratch(len(places))
    for part in stretches(len(places)):
        keys[part] = groups[places[part]].astype(np.uint64) << np.uint64(32) | np.arange(part.start, part.stop, dtype=np.uint64)
    keys.sort()
    for part in stretches(len(places)):
        together[part] = places[(keys[part] & _LOW).astype(np.int64)]
    return together


def group_ends(groups: NDArray[Any]) -> NDArray[Any]:
    """Where each group ends among all rows, group by group: `np.cumsum(np.bincount(groups))`."""
    ends = scratch(int(groups.max()) + 1 if len(groups) else 0)
    for part in stretches(len(groups)):
        np.add.at(ends, groups[part], 1)
    return np.cumsum(ends, out=ends, dtype=PLACE)
