from __future__ import annotations

import pytest

from common.disk import amount, most_saves


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0.0 KiB"), (512, "0.5 KiB"), (1000 * 2**10, "1.0 MiB"), (12 * 2**20, "12.0 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes_are_told_in_the_unit_that_suits_them(size: int, words: str) -> None:
    assert amount(size) == words


@pytest.mark.parametrize(
    ("steps", "every", "validations", "most"),
    [(100, 10, 0, 11), (100, None, 4, 5), (100, 30, 2, 6), (3, 1, 3, 3), (3, 100, 0, 1)],
)
def test_a_run_saves_at_its_interval_where_it_validates_and_at_its_end(steps: int, every: int | None, validations: int, most: int) -> None:
    assert most_saves(steps, every, validations) == most
