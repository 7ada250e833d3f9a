from __future__ import annotations

import pytest

from common.disk import amount


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0.0 KiB"), (512, "0.5 KiB"), (1000 * 2**10, "1.0 MiB"), (12 * 2**20, "12.0 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_sizes_are_told_in_the_unit_that_suits_them(size: int, words: str) -> None:
    assert amount(size) == words
