"""Answers to be scored, by their token ids, by states that were computed before, or by both, as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def entering_states(answers: Sequence[StartedAnswer], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """States (B, T, D) that enter the lowest layer that trains, and the mask (B, T) of real tokens."""
    values, mask = answers[0].states.rows.gather([answer.row for answer in answers], pad_to=pad_to)
    return values[:, 0], mask


def collate_answers(answers: Sequence[Answer], pad_id: int, pad_to: int | None = None) -> RewardBatch | States:
    """Answers as a padded batch: their token ids, or their states where these are known. `pad_to`: tokens of all of them."""
    started = [answer for answer in answers if isinstance(answer, StartedAnswer)]
    if started:
        batch = collate_rewards([answer.ids for answer in started], pad_id, pad_to)
        return batch._replace(entering=entering_states(started, pad_to)[0])
    cached = [answer for answer in answers if isinstance(answer, CachedAnswer)]
    if not cached:
        return collate_rewards([answer for answer in answers if isinstance(answer, RewardInput)], pad_id, pad_to)
    assert len(cached) == len(answers), "all answers have their states, or none has"
    states = cached[0].states
    one_token = states.rows.facts.token != "all"
    values, mask = states.rows.gather([answer.row for answer in cached], layers=states.layers, pad_to=None if one_token else pad_to)
    return States(values, mask)
