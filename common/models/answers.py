"""Answers to be scored, by their token ids, by states that were computed before, or by both, as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.cached_rows import CachedRows
from common.models.backbone import RewardBatch, RewardInput, States, collate_rewards


@dataclass(frozen=True)
class CachedStates:
    """What is read of R answers' states: the upper `layers` of what a cache has."""

    rows: CachedRows
    layers: int


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer whose states are known, in the place of its token ids: number `row` of `states`, made of `length` tokens."""

    states: CachedStates
    row: int
    length: int


@dataclass(frozen=True, slots=True)
class StartedAnswer:
    """An answer and the states that enter the lowest layer that trains: number `row` of `states`, of every token."""

    ids: RewardInput
    states: CachedStates
    row: int

    @property
    def length(self) -> int:
        return self.ids.length


Answer = RewardInput | CachedAnswer | StartedAnswer


def entering_states(answers: Sequence[StartedAnswer], lengths: Sequence[int], pad_to: int | None = None) -> Tensor:
    """States (B, S, D) that enter the lowest layer that trains, in B lines that have so many tokens of the answers, one after another."""
    states = answers[0].states.rows.gather([answer.row for answer in answers])[0][:, 0]  # (N, D)
    width = pad_to or max(lengths)
    lines = states.new_zeros(len(lengths), width, states.shape[-1])
    lines[torch.arange(width) < torch.tensor(lengths)[:, None]] = states
    return lines


def collate_answers(answers: Sequence[Answer], pad_id: int, pad_to: int | None = None) -> RewardBatch | States:
    """Answers as a batch: their token ids, padded, or their states where these are known. `pad_to`: tokens of all rows of ids."""
    started = [answer for answer in answers if isinstance(answer, StartedAnswer)]
    if started:
        batch = collate_rewards([answer.ids for answer in started], pad_id, pad_to)
        return batch._replace(entering=entering_states(started, [answer.length for answer in started], pad_to))
    cached = [answer for answer in answers if isinstance(answer, CachedAnswer)]
    if not cached:
        return collate_rewards([answer for answer in answers if isinstance(answer, RewardInput)], pad_id, pad_to)
    assert len(cached) == len(answers), "all answers have their states, or none has"
    states = cached[0].states
    return States(*states.rows.gather([answer.row for answer in cached], layers=states.layers))
