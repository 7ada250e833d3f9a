"""Which rows make a batch, on which rank, and what a batch's summed loss is divided by.

The order is a pure function of (seed, epoch) and does not depend on the number of ranks: N ranks with batches of B rows work through
the same rows, optimizer step by optimizer step, as one process with batches of N * B. Every row is used exactly once an epoch.
A plan holds a few bytes per row, and batches are made one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, repeat
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from common.lazy import Lazy
from common.scratch import PLACE, Column, counted, group_ends, grouped, numbered, scratch, shuffled

T = TypeVar("T")
Integers = NDArray[Any]
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
            Lengths and weights that are arrays are kept as they are, mapped files for instance, and so are questions in a `Column`.
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
        questions: Sequence[Hashable] | Column | None = None,
        limit: int | float | None = None,
    ) -> None:
        assert 0 <= rank < world_size and batch_size > 0 and accumulate > 0
        assert mode != "packed" or capacity is not None, "packing needs a capacity"
        assert mode != "by_question" or (questions is not None and len(questions) == len(lengths)), "each row needs its question"
        self.lengths = _numbers(lengths, np.int64)
        self.weights = np.broadcast_to(1.0, len(self.lengths)) if weights is None else _numbers(weights, np.float64)
        assert len(self.weights) == len(self.lengths), "each row needs a weight"
        assert not len(self.weights) or self.weights.min() > 0, "each row needs a weight above 0"
        self.batch_size, self.seed, self.mode, self.capacity = batch_size, seed, mode, capacity
        self.accumulate, self.world_size, self.rank = accumulate, world_size, rank
        self.questions, self.limit = questions, limit
        self._made: tuple[int, Sequence[Batch]] | None = None

    def batches(self, epoch: int) -> Sequence[Batch]:
        """This rank's micro-batches of an epoch, in order; each is made where it is asked for."""
        if self._made is None or self._made[0] != epoch:
            order = self._order(epoch)
            self._made = epoch, Lazy(partial(self._batch, order), range(len(order)))
        return self._made[1]

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return -(-limited(len(self.batches(epoch)), self.limit) // self.accumulate)

    def _batch(self, order: _Order, number: int) -> Batch:
        count = len(order)
        used = limited(count, self.limit)
        begin, end = (0, used) if number < used else (used, count)
        first = number - (number - begin) % self.accumulate
        window = [order.batch(place) for place in range(first, min(first + self.accumulate, end))]
        total = float(sum(self.weights[unit].sum() for units in window for unit in units))
        units = window[number - first]
        rows = [row for unit in self._own(units) for row in unit.tolist()]
        return Batch(rows or units[0][:1].tolist(), total / (self.world_size * self.accumulate), filler=not rows)

    def _own(self, units: list[Integers]) -> Sequence[Integers]:
        """This rank's part of a global batch: rows of like length in all, lines and parts of questions as they follow each other."""
        if self.world_size > 1 and self.mode in ("random", "bucketed"):
            own = shares([int(self.lengths[unit].sum()) for unit in units], self.world_size)[self.rank]
            return [units[number] for number in own]
        return _share(units, self.world_size, self.rank)

    def _order(self, epoch: int) -> _Order:
        """The batches of an epoch over all ranks; units that stay on one rank are rows, packed lines or a rank's part."""
        size, count = self.batch_size * self.world_size, len(self.lengths)
        if self.mode == "sequential":
            return _Order(counted(count), size)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        order = shuffled(count, generator)
        if self.mode == "random":
            return _Order(order, size)
        if self.mode == "bucketed":
            for start in range(0, count, POOL_BATCHES * size):
                pool = order[start : start + POOL_BATCHES * size]
                pool[:] = pool[np.argsort(self.lengths[pool], kind="stable")]
            return _Order(order, size, batches=shuffled(-(-count // size), generator))
        if self.mode == "by_question":
            by_group, ends = grouped(order, self._groups), group_ends(self._groups)
            drawn = (by_group[ends[place - 1] if place else 0 : ends[place]].tolist() for place in shuffled(len(ends), generator))
            batches = fill(drawn, repeat(size, -(-count // size)))
            parts = (fill(batch, _part_sizes(sum(map(len, batch)), self.world_size)) for batch in batches)
            return _Order.of(count, ([[row for group in part for row in group] for part in batch] for batch in parts))
        assert self.mode == "packed"
        rows, ends = self._lines
        return _Order(rows, size, ends, units=shuffled(len(ends), generator))

    @cached_property
    def _groups(self) -> Integers:
        """(N,): number of each row's question, in order of appearance."""
        assert self.questions is not None
        if isinstance(self.questions, Column):
            return numbered(self.questions)
        seen: dict[Hashable, int] = {}
        return np.array([seen.setdefault(question, len(seen)) for question in self.questions], dtype=PLACE)

    @cached_property
    def _lines(self) -> tuple[Integers, Integers]:
        """Packed lines, one behind the other, and where each ends.

        They are the same in every epoch: rows packed anew may take one line more or less, and the trainer counts batches once.
        """
        assert self.capacity is not None
        size, count = self.batch_size * self.world_size, len(self.lengths)
        mean = max(1.0, float(self.lengths.mean())) if count else 1.0
        pool_rows = max(1, round(POOL_BATCHES * size * self.capacity / mean))
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(0,))))  # no epoch's stream
        order = shuffled(count, generator)
        rows, ends = scratch(count), scratch(count)
        packed = lines = 0
        for start in range(0, count, pool_rows):
            for line in pack(order[start : start + pool_rows].tolist(), self.lengths, self.capacity):
                rows[packed : packed + len(line)] = line
                packed += len(line)
                ends[lines] = packed
                lines += 1
        return rows, ends[:lines]


@dataclass(frozen=True)
class _Order:
    """Batches of units of rows, as few numbers per row, mapped from temporary files where they are many.

    rows: unit after unit. size: units of a batch. ends: where each unit ends among the rows; None: each row is one. units: which of them
    comes when; None: as they are. stops: where each batch ends among the units; None: `size` units each. batches: as units.
    """

    rows: Integers
    size: int
    ends: Integers | None = None
    units: Integers | None = None
    stops: Integers | None = None
    batches: Integers | None = None

    @classmethod
    def of(cls, count: int, batches: Iterable[Sequence[Sequence[int]]]) -> _Order:
        """Batches of units of `count` rows."""
        rows, ends, stops = scratch(count), scratch(count), scratch(count)
        row = unit = number = 0
        for batch in batches:
            for part in batch:
                rows[row : row + len(part)] = part
                row += len(part)
                ends[unit] = row
                unit += 1
            stops[number] = unit
            number += 1
        return cls(rows, 0, ends[:unit], stops=stops[:number])

    def __len__(self) -> int:
        return -(-self._count // self.size) if self.stops is None else len(self.stops)

    @property
    def _count(self) -> int:
        """Units."""
        return len(self.rows) if self.ends is None else len(self.ends)

    def batch(self, number: int) -> list[Integers]:
        """The rows of each unit of a batch."""
        number = number if self.batches is None else int(self.batches[number])
        if self.stops is None:
            units = range(number * self.size, min((number + 1) * self.size, self._count))
        else:
            units = range(int(self.stops[number - 1]) if number else 0, int(self.stops[number]))
        return [self._unit(unit if self.units is None else int(self.units[unit])) for unit in units]

    def _unit(self, unit: int) -> Integers:
        if self.ends is None:
            return self.rows[unit : unit + 1]
        return self.rows[self.ends[unit - 1] if unit else 0 : self.ends[unit]]


def _numbers(values: Any, dtype: Any) -> NDArray[Any]:
    """Numbers of a data set's rows: an array stays as it is, mapped from a file, say."""
    return values if isinstance(values, np.ndarray) else np.asarray(values, dtype=dtype)


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


def fill(groups: Iterable[list[int]], sizes: Iterable[int]) -> Iterator[list[list[int]]]:
    """Groups of rows in batches of at most `sizes` rows: the next group that fits whole, else as many rows of the next one as fit.

    So every batch but the last is full, and a group is divided only where a batch is full. Batches without rows are left out.
    """
    coming = iter(groups)
    waiting: deque[list[int]] = deque()
    for size in sizes:
        batch: list[list[int]] = []
        room = size
        while room:
            waiting.extend(islice(coming, LOOKAHEAD - len(waiting)) if len(waiting) < LOOKAHEAD else ())
            if not waiting:
                break
            # a batch starts with the next group, however large, so that none waits for ever
            near = range(min(LOOKAHEAD, len(waiting))) if batch else ()
            place = next((place for place in near if len(waiting[place]) <= room), 0)
            group = waiting[place]
            del waiting[place]
            if group[room:]:
                waiting.appendleft(group[room:])
            batch.append(group[:room])
            room -= len(batch[-1])
        if batch:
            yield batch


def shares(weights: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers 0 … len(weights) - 1 in so many parts of like weight, as many numbers in each (give or take one), ascending.

    The heaviest that are left go, one to each part, to the part that has least.
    """
    order = sorted(range(len(weights)), key=lambda number: -weights[number])
    split: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for begin in range(0, len(order), parts):
        lightest = sorted(range(parts), key=lambda part: loads[part])
        for part, number in zip(lightest, order[begin : begin + parts], strict=False):
            split[part].append(number)
            loads[part] += weights[number]
    return [sorted(part) for part in split]


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
