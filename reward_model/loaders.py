"""Rows of ids -> loaders of batches: shuffled with the denominators of the loss for training, each row once for validation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from common.batching import Batch, BatchPlan, PlanSampler
from common.followers import rank
from common.lazy import Lazy
from common.models.answers import Answer
from common.token_rows import StoredRows, lengths_of
from reward_model.config import RewardData


class Row(Protocol):
    """A row of either kind."""

    @property
    def answers(self) -> tuple[Answer, ...]: ...
    @property
    def question(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def weight(self) -> float: ...


class RowDataset(Dataset[Mapping[str, Any]]):
    """Rows of ids; asked for a planned batch, it collates exactly that batch."""

    def __init__(self, rows: Sequence[Row], collate: Callable[..., Mapping[str, Any]], pad_id: int, pad_to: int | None) -> None:
        self.rows = rows
        self.collate = collate
        self.pad_id = pad_id
        self.pad_to = pad_to

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, batch: Batch) -> Mapping[str, Any]:
        """The name under which a DataLoader asks for a whole batch."""
        rows = [self.rows[index] for index in batch.indices]
        return self.collate(rows, batch.indices, self.pad_id, batch.denominator, self.pad_to, not batch.filler)


def training_loader(
    rows: Sequence[Row],
    data: RewardData,
    pad_id: int,
    collate: Callable[..., Mapping[str, Any]],
    *,
    seed: int,
    accumulate: int,
    limit: int | float | None = None,
    processes: int = 1,
) -> DataLoader[Any]:
    """This process's batches, whose order is a function of seed and epoch.

    accumulate: micro-batches per step. limit: as in `BatchPlan`. processes: how many share each batch of `processes * batch_size` rows.
    """
    plan = BatchPlan(
        lengths_of(rows),
        weights=None if isinstance(rows, StoredRows) else [row.weight for row in rows],
        batch_size=data.batch_size,
        mode=data.batching,
        accumulate=accumulate,
        seed=seed,
        questions=rows.questions if isinstance(rows, StoredRows) else [row.question for row in rows],
        limit=limit,
        world_size=processes,
        rank=rank(),
    )
    return _loader(rows, plan, data, pad_id, collate)


def validation_loader(
    rows: Sequence[Row], data: RewardData, pad_id: int, collate: Callable[..., Mapping[str, Any]], processes: int = 1
) -> DataLoader[Any]:
    """This process's share of the rows, rows of like length together; all shares are every row once."""
    plan = BatchPlan(
        lengths_of(rows),
        batch_size=data.val_batch_size or data.batch_size,
        mode="bucketed",
        seed=0,
        world_size=processes,
        rank=rank(),
    )
    return _loader(rows, plan, data, pad_id, collate)


def answers_in(rows: Sequence[Row]) -> Sequence[Answer]:
    """The answers of all rows, one after another."""
    if not isinstance(rows, StoredRows):
        return [answer for row in rows for answer in row.answers]
    texts = rows.ids.columns["texts"]

    def answers_up_to(row: int) -> int:
        return int(texts[row]) - (row + 1)  # each row has a prompt beside them

    def answer(number: int) -> Answer:
        row = bisect_right(range(len(rows)), number, key=answers_up_to)
        found: Answer = rows[row].answers[number - (answers_up_to(row - 1) if row else 0)]
        return found

    return Lazy(answer, range(answers_up_to(len(rows) - 1)))


def _loader(
    rows: Sequence[Row], plan: BatchPlan, data: RewardData, pad_id: int, collate: Callable[..., Mapping[str, Any]]
) -> DataLoader[Any]:
    return DataLoader(
        RowDataset(rows, collate, pad_id, data.max_length if data.on_tpu else None),
        batch_sampler=PlanSampler(plan),
        collate_fn=_as_it_is,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
    )


def _as_it_is(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return batch
