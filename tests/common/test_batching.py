"""Batches are a pure function of (seed, epoch), use every row once, and their denominators add up to one mean over all ranks."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from common import scratch
from common.batching import Batch, BatchPlan, PlanSampler, batch_loader, fill, pack, shares
from common.launch.lightning import total_optimizer_steps
from common.schema import CheckpointSettings, TrainerSettings
from common.scratch import Column

MODES = ["random", "bucketed", "packed", "by_question", "sequential"]
LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 30, size=103)]
QUESTIONS = [f"question {n}" for n in np.random.default_rng(3).integers(0, 40, size=103)]  # 1 to 7 rows each, scattered


def plan(mode: Any = "random", **changes: Any) -> BatchPlan:
    settings = {"batch_size": 4, "seed": 7, "mode": mode, "capacity": 40, "questions": QUESTIONS} | changes
    return BatchPlan(LENGTHS, **settings)


def used(batches: list[Batch]) -> list[int]:
    return [row for batch in batches if not batch.filler for row in batch.indices]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_used_exactly_once_and_ranks_keep_step(mode: str, world_size: int) -> None:
    for epoch in (0, 1):
        ranks = [plan(mode, world_size=world_size, rank=rank).batches(epoch) for rank in range(world_size)]
        assert sorted(row for batches in ranks for row in used(batches)) == list(range(len(LENGTHS)))
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch.indices for batches in ranks for batch in batches)


@pytest.mark.parametrize("mode", MODES)
def test_order_depends_on_seed_and_epoch_alone(mode: str) -> None:
    first = plan(mode)
    again = [first.batches(epoch) for epoch in (3, 0, 3)]
    assert again[0] == again[2] == plan(mode).batches(3)
    moved = (again[0] != again[1], again[0] != plan(mode, seed=8).batches(3))
    assert moved == ((False, False) if mode == "sequential" else (True, True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_of_one_large_process(mode: str, world_size: int) -> None:
    single = plan(mode, batch_size=4 * world_size).batches(5)
    ranks = [plan(mode, world_size=world_size, rank=rank).batches(5) for rank in range(world_size)]
    for number, batch in enumerate(single):
        shared = [row for batches in ranks for row in used([batches[number]])]
        assert Counter(shared) == Counter(batch.indices)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_are_of_like_number_and_weight(parts: int) -> None:
    weights = [(number * 37) % 100 for number in range(50)]
    split = shares(weights, parts)
    assert sorted(number for part in split for number in part) == list(range(50)) and all(part == sorted(part) for part in split)
    assert {len(part) for part in split} <= {50 // parts, -(-50 // parts)}
    loads = [sum(weights[number] for number in part) for part in split]
    assert max(loads) - min(loads) <= max(weights)
    assert shares([3], 2) == [[0], []]


@pytest.mark.parametrize("mode", ["random", "bucketed"])
def test_ranks_have_like_work_in_each_batch(mode: str) -> None:
    ranks = [plan(mode, world_size=2, rank=rank).batches(0) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        one, two = ([LENGTHS[row] for row in used([batch])] for batch in (first, second))
        assert abs(sum(one) - sum(two)) <= max(one + two) and abs(len(one) - len(two)) <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 3), (2, 4), (3, 2)])
def test_gradients_are_those_of_the_mean_over_the_whole_step(mode: str, world_size: int, accumulate: int) -> None:
    """Lightning divides each loss by `accumulate`, DDP averages over ranks: what is left is sum of losses / sum of weights."""
    weights = np.random.default_rng(1).integers(1, 9, size=len(LENGTHS)).astype(float)
    loss_of = np.random.default_rng(2).normal(size=len(LENGTHS))
    settings = {"weights": weights, "accumulate": accumulate, "world_size": world_size}
    ranks = [plan(mode, rank=rank, **settings).batches(0) for rank in range(world_size)]
    for start in range(0, len(ranks[0]), accumulate):
        windows = [batches[start : start + accumulate] for batches in ranks]
        seen = sum(
            sum(loss_of[row] for row in batch.indices) * (not batch.filler) / batch.denominator / accumulate
            for window in windows
            for batch in window
        )
        rows = [row for window in windows for row in used(window)]
        assert seen / world_size == pytest.approx(loss_of[rows].sum() / weights[rows].sum(), rel=1e-12)


def test_denominator_by_hand() -> None:
    """Three rows of 5, 1 and 4 answer tokens, two ranks of one row, two micro-batches a step: 10 / (2 * 2)."""
    settings: dict[str, Any] = {"batch_size": 1, "seed": 0, "weights": [5, 1, 4], "mode": "sequential", "accumulate": 2, "world_size": 2}
    assert BatchPlan([1, 1, 1], rank=0, **settings).batches(0) == [Batch([0], 2.5), Batch([2], 2.5)]
    assert BatchPlan([1, 1, 1], rank=1, **settings).batches(0) == [Batch([1], 2.5), Batch([2], 2.5, filler=True)]


def test_accumulation_takes_the_rows_of_one_large_batch() -> None:
    large = plan(batch_size=12).batches(1)
    small = plan(batch_size=4, accumulate=3)
    assert [used(small.batches(1)[start : start + 3]) for start in range(0, 26, 3)] == [batch.indices for batch in large]
    assert small.steps(1) == len(large) == 9


@pytest.mark.parametrize(("limit", "number"), [(4, 4), (0.2, 5), (99, 26), (None, 26)])
def test_a_step_that_the_limit_cuts_short_is_a_mean_over_what_is_left_of_it(limit: Any, number: int) -> None:
    weights = np.random.default_rng(1).integers(1, 9, size=len(LENGTHS)).astype(float)
    limited = plan(weights=weights, accumulate=3, limit=limit)
    everything = plan(weights=weights, accumulate=3).batches(0)
    assert [batch.indices for batch in limited.batches(0)] == [batch.indices for batch in everything]  # the rows stay where they are
    assert limited.steps(0) == -(-number // 3)
    for start in range(0, number, 3):
        window = limited.batches(0)[start : min(start + 3, number)]
        total = weights[[row for batch in window for row in batch.indices]].sum()
        assert [batch.denominator for batch in window] == [pytest.approx(total / 3)] * len(window)


def test_bucketed_batches_waste_less_padding() -> None:
    def padding(mode: str) -> int:
        lengths = [[LENGTHS[row] for row in batch.indices] for batch in plan(mode).batches(0)]
        return sum(max(row) * len(row) - sum(row) for row in lengths)

    assert padding("bucketed") < 0.15 * padding("random")


def test_packed_lines_are_full_and_fit() -> None:
    batches = plan("packed").batches(0)
    for batch in batches:
        lines, room = 0, 0
        for row in batch.indices:  # as the collator fills them
            if LENGTHS[row] > room:
                lines, room = lines + 1, 40
            room -= LENGTHS[row]
        assert lines <= 4
    assert sum(LENGTHS) / (40 * 4 * len(batches)) > 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 4), (2, 3)])
def test_every_epoch_has_the_same_number_of_batches(mode: Any, world_size: int, accumulate: int) -> None:
    """Many pools, where rows packed anew in each epoch take different numbers of lines: the trainer counts the batches only once."""
    lengths = np.random.default_rng(4).integers(5, 60, size=6000)
    shape: dict[str, Any] = {"batch_size": 1, "seed": 0, "mode": mode, "capacity": 128, "questions": [row // 3 for row in range(6000)]}
    ranks = [BatchPlan(lengths, accumulate=accumulate, world_size=world_size, rank=rank, **shape) for rank in range(world_size)]
    epochs = [[rank.batches(epoch) for rank in ranks] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(row for batches in epoch for row in used(batches)) == list(range(6000))
    assert len({len(batches) for epoch in epochs for batches in epoch}) == 1
    trainer = TrainerSettings(
        checkpoint=CheckpointSettings(monitor="val_loss"), params={"max_epochs": 4, "accumulate_grad_batches": accumulate}
    )
    assert total_optimizer_steps(trainer, len(PlanSampler(ranks[0]))) == sum(ranks[0].steps(epoch) for epoch in range(4))


@pytest.mark.parametrize("mode", MODES)
def test_arrays_give_the_batches_that_lists_give(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests stand for questions there, in eight bytes each, and what belongs to all rows lies in temporary files."""
    monkeypatch.setattr(scratch, "MAPPED_BYTES", 0)
    monkeypatch.setattr(scratch, "STRETCH", 10)
    hashes = np.array([hash(question) for question in QUESTIONS], dtype=np.int64)
    digests = Column(len(hashes), lambda part: hashes[part])
    shape: dict[str, Any] = {"batch_size": 4, "seed": 7, "mode": mode, "capacity": 40, "world_size": 2, "accumulate": 3}
    arrays = BatchPlan(np.array(LENGTHS, dtype=np.int32), questions=digests, weights=np.array(LENGTHS, dtype=np.int32), **shape)
    assert arrays.batches(2) == plan(**shape, weights=LENGTHS).batches(2)


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_of_many_rows_holds_none_of_them(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MAPPED_BYTES", 0)
    monkeypatch.setattr(scratch, "STRETCH", 1000)
    rows = 40_000
    numbers = np.arange(1, rows + 1, dtype=np.int32)
    shape: dict[str, Any] = {
        "batch_size": 4,
        "seed": 0,
        "accumulate": 2,
        "capacity": rows,
        "questions": Column(rows, lambda part: numbers[part] // 3),
    }
    tracemalloc.start()
    batches = BatchPlan(numbers, mode=mode, **shape).batches(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batches) >= rows // 8 and batches[:2] == list(batches)[:2]
    assert peak < 4 * rows


def test_pack_by_hand() -> None:
    assert pack([0, 1, 2, 3, 4], [6, 3, 5, 4, 2], capacity=10) == [[0, 3], [2, 1, 4]]


def test_pack_refuses_a_row_that_fits_nowhere() -> None:
    with pytest.raises(AssertionError, match="row 0 of 11 tokens"):
        pack([0], [11], capacity=10)


def test_no_rows_make_no_batches() -> None:
    for mode in MODES:
        assert BatchPlan([], batch_size=2, seed=0, mode=mode, capacity=8, questions=[]).batches(0) == []  # type: ignore[arg-type]


def test_fill_by_hand() -> None:
    """Room for 4: the next group, then the nearest one that fits whole, else a part of the next one; its rest comes first in the next."""
    groups = [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9, 10, 11]]
    assert list(fill(groups, [4, 4, 4])) == [[[0, 1, 2], [5]], [[3, 4], [6, 7]], [[8, 9, 10, 11]]]
    assert list(fill([[0], [1]], [1, 1, 0])) == [[[0]], [[1]]]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_a_question_is_divided_only_where_a_batch_is_full(world_size: int, accumulate: int) -> None:
    settings = {"batch_size": 8, "world_size": world_size, "accumulate": accumulate}
    for epoch in range(3):
        ranks = [plan("by_question", rank=rank, **settings).batches(epoch) for rank in range(world_size)]
        sizes = [sum(len(used([batches[place]])) for batches in ranks) for place in range(len(ranks[0]))]
        assert sizes == [8 * world_size] * (103 // (8 * world_size)) + [103 % (8 * world_size)]
        parts = [batch for batches in ranks for batch in batches if not batch.filler]
        homes = {
            question: [n for n, part in enumerate(parts) if question in {QUESTIONS[row] for row in part.indices}] for question in QUESTIONS
        }
        divided = [question for question, places in homes.items() if len(places) > 1]
        assert len(divided) <= len(parts) / 2  # where it stood in random order, nearly every question would be
        for batch in parts:  # and a question's rows are neighbours
            asked = [QUESTIONS[row] for row in batch.indices]
            assert len(set(asked)) == 1 + sum(a != b for a, b in pairwise(asked))


def test_questions_that_fill_batches_evenly_are_never_divided() -> None:
    questions = [row % 20 for row in range(60)]  # three rows each, twenty apart
    batches = BatchPlan([1] * 60, batch_size=6, seed=0, mode="by_question", questions=questions).batches(0)
    assert all(len(batch.indices) == 6 and len({questions[row] for row in batch.indices}) == 2 for batch in batches)


def collate(batch: Batch) -> tuple[torch.Tensor, float]:
    return torch.tensor(batch.indices), batch.denominator


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_follows_the_plan_from_any_place(num_workers: int) -> None:
    loader = batch_loader(plan(), collate, num_workers=num_workers)
    assert isinstance(loader.sampler, PlanSampler)
    for epoch, start in ((0, 0), (1, 0), (1, 20)):
        loader.sampler.set_epoch(epoch)
        loader.sampler.skip(start)
        expected = plan().batches(epoch)[start:]
        got = list(loader)
        assert len(got) == len(expected) and len(loader) == len(expected) + start
        assert [(rows.tolist(), denominator) for rows, denominator in got] == [(batch.indices, batch.denominator) for batch in expected]
