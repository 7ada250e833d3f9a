"""Groups of rows of like length: worked by hand, and compared with every possible split."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import common.chunks as chunks_module
from common.chunks import length_chunks


def cost(groups: list[list[list[int]]], overhead: int) -> int:
    """Padded tokens and forwards of groups of rows (each a list of widths)."""
    return sum(len(group) * sum(max(column) for column in zip(*group, strict=True)) + overhead for group in groups)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(chunks_module.FORWARD_TOKENS, "cpu", 10)
    monkeypatch.setitem(chunks_module.CHUNK_TOKENS, "cpu", 60)
    return monkeypatch


def test_a_long_row_stands_alone_where_padding_to_it_costs_more_than_a_forward(limits: pytest.MonkeyPatch) -> None:
    """Together 3 * 20 + 10 = 70; apart 2 * 5 + 10 + 20 + 10 = 50."""
    assert [group.tolist() for group in length_chunks(torch.tensor([[5], [20], [4]]))] == [[2, 0], [1]]
    # 3 * 6 + 10 = 28 against 2 * 5 + 10 + 6 + 10 = 36
    assert [group.tolist() for group in length_chunks(torch.tensor([[5], [6], [4]]))] == [[2, 0, 1]]


def test_no_split_of_the_ordered_rows_is_cheaper(limits: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        widths = torch.randint(1, 30, (7, 2), generator=generator)
        chosen = [widths[group].tolist() for group in length_chunks(widths)]
        ordered = widths[widths.sum(1).argsort(stable=True)].tolist()
        costs = []
        for count in range(7):
            for ends in combinations(range(1, 7), count):
                groups = [ordered[begin:end] for begin, end in zip((0, *ends), (*ends, 7), strict=True)]
                if all(len(group) == 1 or cost([group], 0) <= 60 for group in groups):
                    costs.append(cost(groups, 10))
        assert cost(chosen, 10) == min(costs)


def test_every_row_is_in_one_group_within_the_bounds(limits: pytest.MonkeyPatch) -> None:
    widths = torch.tensor([[70], [3], [9], [9], [1], [0]])
    weights = torch.tensor([5, 1, 2, 2, 1, 0])
    for spared in (None, torch.zeros(6, dtype=torch.long), torch.tensor([0, 2, 2, 8, 0, 0])):
        groups = length_chunks(widths, weights=weights, most_weight=3, spared=spared)
        assert sorted(torch.cat(groups).tolist()) == list(range(6))
        assert all(len(group) == 1 or int(weights[group].sum()) <= 3 for group in groups)
    assert length_chunks(torch.zeros((0, 1), dtype=torch.long)) == []


def test_rows_that_are_not_padded_need_not_be_alike(limits: pytest.MonkeyPatch) -> None:
    widths = torch.tensor([[2], [40], [3]])
    assert len(length_chunks(widths)) == 2
    assert len(length_chunks(widths, spared=torch.zeros(3, dtype=torch.long))) == 1  # 45 tokens, not 120


def test_rows_that_are_not_padded_stay_beside_those_they_begin_alike_with(limits: pytest.MonkeyPatch) -> None:
    """110 tokens need two forwards of 60 at most; where the third row takes 18 tokens from the second, 30 + 20 + 2 are one of them."""
    widths = torch.tensor([[30], [20], [20], [40]])
    nothing, alike = torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 18, 0])
    assert [group.tolist() for group in length_chunks(widths, spared=nothing)] == [[0, 1], [2, 3]]
    assert [group.tolist() for group in length_chunks(widths, spared=alike)] == [[0, 1, 2], [3]]
