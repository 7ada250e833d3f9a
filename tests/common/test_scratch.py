"""Numbers in temporary files are those that numpy makes in memory, and a process holds a stretch of them at most."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common import scratch
from common.errors import UserError
from common.scratch import Column, copied, distinct, first_places, group_ends, grouped, numbered, shuffled

VALUES = {
    "many alike": np.random.default_rng(0).integers(0, 40, size=700).astype(np.uint64),
    "far apart": np.random.default_rng(1)
    .integers(2**62, 2**63, size=90)
    .astype(np.uint64)
    .repeat(3)[np.random.default_rng(2).permutation(270)],
    "negative": np.array([3, -7, 3, -(2**60), 0]),
    "one": np.array([5], dtype=np.uint64),
    "none": np.zeros(0, dtype=np.uint64),
}


@pytest.fixture(autouse=True, params=[1, 7, 2**16])
def small_stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "STRETCH", request.param)
    monkeypatch.setattr(scratch, "MAPPED_BYTES", 0)


def column(values: NDArray[Any]) -> Column:
    return Column(len(values), lambda part: values[part])


@pytest.mark.parametrize("name", VALUES)
def test_distinct_numbers_and_where_they_appear(name: str) -> None:
    values = VALUES[name]
    known, first, which = np.unique(values, return_index=True, return_inverse=True)
    for given in (values, column(values)):
        np.testing.assert_array_equal(distinct(given), known)
        np.testing.assert_array_equal(first_places(given)[0], known)
        np.testing.assert_array_equal(first_places(given)[1], first)
        np.testing.assert_array_equal(numbered(given), np.argsort(np.argsort(first))[which])
    np.testing.assert_array_equal(copied(column(values), values.dtype), values)


def test_order_and_groups() -> None:
    order = shuffled(700, np.random.default_rng(4))
    np.testing.assert_array_equal(order, np.random.default_rng(4).permutation(700))
    groups = numbered(VALUES["many alike"])
    np.testing.assert_array_equal(grouped(order, groups), order[np.argsort(groups[order], kind="stable")])
    np.testing.assert_array_equal(group_ends(groups), np.cumsum(np.bincount(groups)))


def test_a_column_is_read_as_a_list_of_plain_numbers() -> None:
    values = np.arange(20) / 7
    read = column(values)
    assert list(read) == values.tolist() and len(read) == 20 and [type(number) for number in read] == [float] * 20
    assert (read[3], read[-1]) == (3 / 7, 19 / 7) and read[4:9].tolist() == values[4:9].tolist() and read[9:4].tolist() == []
    with pytest.raises(IndexError):
        read[20]


def test_the_folder_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=f"a temporary file of the rows cannot be written to {tmp_path}: No space left"):
        scratch.scratch(10)


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("small_stretches", [1000], indirect=True)
def test_memory_holds_a_stretch_at_most(traced: None) -> None:
    rows = 200_000
    values = np.random.default_rng(0).integers(0, rows, size=rows).astype(np.uint64)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    groups = numbered(column(values))
    ends = group_ends(groups)
    together = grouped(shuffled(rows, np.random.default_rng(0)), groups)
    assert len(together) == ends[-1] == rows
    assert tracemalloc.get_traced_memory()[1] - before < rows  # a byte for each; one number of them takes four
