"""Which rows make a batch, on which rank, and what a batch's summed loss is divided by.

The order is a pure function of (seed, epoch) and does not depend on the number of ranks: N ranks with batches of B rows work through
the same rows, optimizer step by optimizer step, as one process with batches of N * B. Every row is used exactly once an epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

T = TypeVar("T")
Mode = Literal["random", "bucketed", "packed", "by_question", "sequential"]

# Rows that are sorted by length or packed together come from stretches of this many batches of the shuffled rows.
POOL_BATCHES = 64
# So many of the next questions are looked through for one that fits whole into what is left of a batch.
LOOKAHEAD = 64


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch.

    The summed loss of the batch is divided by `denominator`; after Lightning's division by the number of accumulated batches and DDP's
    mean over ranks, the gradient is that of (sum of losses) / (sum of weights) over the whole optimizer step on all ranks.
    `filler`: the rank had no row left; its row is there to keep ranks in step and counts nothing.
    """

    indices: list[int]
    denominator: float
    filler: bool = False


class BatchPlan:
    """The batches of each epoch for one rank; every rank and every epoch gets the same number of them.

    Args:
        lengths: tokens of each row.
        batch_size: rows per micro-batch and rank; in `packed` mode lines of `capacity` tokens.
        weights: what each row counts in the mean (answer tokens or pairs); default: 1 each.
        mode: `random` order; `bucketed`: rows of like length together; `packed`: rows one after another in lines of `capacity`,
            which are made once by `seed` and stand in a new order in each epoch;
            `by_question`: rows with the same question together; `sequential`: rows as they are, the same in each epoch.
        questions: what each row asks, for `by_question`; rows with equal ones need not be neighbours.
        accumulate: micro-batches per optimizer step.
        limit: batches of an epoch that are used, a number or a share of all, as Lightning's `limit_train_batches`; those after them are
            still listed. A step that the limit cuts short is a mean over what is left of it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        mode: Mode = "random",
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        capacity: int | None = None,
        questions: Sequence[Hashable] | None = None,
        limit: int | float | None = None,
    ) -> None:
        assert 0 <= rank < world_size and batch_size > 0 and accumulate > 0
        assert mode != "packed" or capacity is not None, "packing needs a capacity"
        assert mode != "by_question" or (questions is not None and len(questions) == len(lengths)), "each row needs its question"
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.weights = np.ones(len(self.lengths)) if weights is None else np.asarray(weights, dtype=np.float64)
        assert len(self.weights) == len(self.lengths) and bool((self.weights > 0).all()), "each row needs a weight above 0"
        self.batch_size, self.seed, self.mode, self.capacity = batch_size, seed, mode, capacity
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.questions, self.limit = questions, limit
        self._made: tuple[int, list[Batch]] | None = None

    def batches(self, epoch: int) -> list[Batch]:
        """This rank's micro-batches of an epoch, in order."""
        if self._made is None or self._made[0] != epoch:
            self._made = epoch, self._make(epoch)
        return self._made[1]

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return -(-limited(len(self.batches(epoch)), self.limit) // self.accumulate)

    def _make(self, epoch: int) -> list[Batch]:
        together = self._global_batches(epoch)
        used = limited(len(together), self.limit)
        batches = []
        for window in (*_chunks(together[:used], self.accumulate), *_chunks(together[used:], self.accumulate)):
            total = float(sum(self.weights[row] for units in window for unit in units for row in unit))
            denominator = total / (self.world_size * self.accumulate)
            for units in window:
                mine = _share(units, self.world_size, self.rank)
                rows = [row for unit in mine for row in unit]
                batches.append(Batch(rows or list(units[0][:1]), denominator, filler=not rows))
        return batches

    def _global_batches(self, epoch: int) -> list[list[list[int]]]:
        """Batches over all ranks; each is a list of units that stay on one rank: rows, packed lines or a rank's part."""
        size = self.batch_size * self.world_size
        if self.mode == "sequential":
            return _chunks([[row] for row in range(len(self.lengths))], size)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        order = generator.permutation(len(self.lengths)).tolist()
        if self.mode == "random":
            return _chunks([[row] for row in order], size)
        if self.mode == "bucketed":
            batches = []
            for pool in _chunks(order, POOL_BATCHES * size):
                by_length = sorted(pool, key=lambda row: int(self.lengths[row]))
                batches += _chunks([[row] for row in by_length], size)
            return [batches[place] for place in generator.permutation(len(batches))]
        if self.mode == "by_question":
            assert self.questions is not None
            rows_of: dict[Hashable, list[int]] = {question: [] for question in self.questions}
            for row in order:
                rows_of[self.questions[row]].append(row)
            groups = list(rows_of.values())
            shuffled = [groups[place] for place in generator.permutation(len(groups))]
            return [
                [[row for group in part for row in group] for part in fill(batch, _part_sizes(sum(map(len, batch)), self.world_size))]
                for batch in fill(shuffled, [size] * -(-len(order) // size))
            ]
        assert self.mode == "packed"
        return _chunks([self._lines[place] for place in generator.permutation(len(self._lines))], size)

    @cached_property
    def _lines(self) -> list[list[int]]:
        """Packed lines, the same in every epoch: rows packed anew may take one line more or less, and the trainer counts batches once."""
        assert self.capacity is not None
        size = self.batch_size * self.world_size
        mean = max(1.0, float(self.lengths.mean())) if len(self.lengths) else 1.0
        pool_rows = max(1, round(POOL_BATCHES * size * self.capacity / mean))
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(0,))))  # no epoch's stream
        order = generator.permutation(len(self.lengths)).tolist()
        return [line for pool in _chunks(order, pool_rows) for line in pack(pool, self.lengths, self.capacity)]


def limited(count: int, limit: int | float | None) -> int:
    """How many of `count` batches Lightning uses under a limit: so many at most, or that share of them (a float), rounded down."""
    if limit is None:
        return count
    return int(count * limit) if isinstance(limit, float) else min(count, limit)


def pack(rows: Sequence[int], lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Rows in few lines of at most `capacity` tokens: longest first, each into the line that it leaves the least room in."""
    lines: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, number of the line), sorted
    for row in sorted(rows, key=lambda row: -int(lengths[row])):
        length = int(lengths[row])
        assert length <= capacity, f"row {row} of {length} tokens does not fit into {capacity}"
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            lines.append([row])
            insort(rooms, (capacity - length, len(lines) - 1))
        else:
            room, line = rooms.pop(place)
            lines[line].append(row)
            insort(rooms, (room - length, line))
    return lines


def fill(groups: Sequence[list[int]], sizes: Sequence[int]) -> list[list[list[int]]]:
    """Groups of rows in batches of at most `sizes` rows: the next group that fits whole, else as many rows of the next one as fit.

    So every batch but the last is full, and a group is divided only where a batch is full. Batches without rows are left out.
    """
    waiting = [list(group) for group in reversed(groups)]  # the next one last
    batches = []
    for size in sizes:
        batch: list[list[int]] = []
        room = size
        while room and waiting:
            # a batch starts with the next group, however large, so that none waits for ever
            near = range(1, min(LOOKAHEAD, len(waiting)) + 1) if batch else ()
            place = next((place for place in near if len(waiting[-place]) <= room), 1)
            group = waiting.pop(-place)
            if group[room:]:
                waiting.append(group[room:])
            batch.append(group[:room])
            room -= len(batch[-1])
        if batch:
            batches.append(batch)
    return batches


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _share(units: Sequence[T], world_size: int, rank: int) -> Sequence[T]:
    """One rank's part of a global batch: consecutive units, the parts as equal as can be."""
    sizes = _part_sizes(len(units), world_size)
    start = sum(sizes[:rank])
    return units[start : start + sizes[rank]]


def _part_sizes(count: int, parts: int) -> list[int]:
    """`count` things in parts as equal as can be, the larger ones first."""
    small, larger = divmod(count, parts)
    return [small + (part < larger) for part in range(parts)]


class PlanSampler(Sampler[Batch]):
    """Yields the batches of a plan in the epoch set last, for a DataLoader with `batch_size=None`; `len` is that of a whole epoch."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.same_batches = False
        self._behind = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; with `same_batches` it is always the first one's order."""
        self.epoch = 0 if self.same_batches else epoch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next pass: they are behind us already."""
        self._behind = batches

    def __iter__(self) -> Iterator[Batch]:
        behind, self._behind = self._behind, 0
        yield from self.plan.batches(self.epoch)[behind:]

    def __len__(self) -> int:
        return len(self.plan.batches(self.epoch))


class BatchDataset(Dataset[Any]):
    """Makes the tensors of a `Batch` where the data worker asks for them."""

    def __init__(self, collate: Callable[[Batch], Any]) -> None:
        self.collate = collate

    def __getitem__(self, batch: Batch) -> Any:
        return self.collate(batch)


def batch_loader(plan: BatchPlan, collate: Callable[[Batch], Any], *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
    """A DataLoader over a plan: `collate` turns a `Batch` into what the training step gets. Its `sampler` has `set_epoch`."""
    return DataLoader(
        BatchDataset(collate),
        batch_size=None,
        sampler=PlanSampler(plan),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
