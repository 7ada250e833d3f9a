"""Answers to be scored, by their token ids or by states that were computed before, as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.cached_rows import CachedRows
from common.models.backbone import RewardBatch, RewardInput, States, collate_rewards


@dataclass(frozen=True)
class CachedStates:
    """What a readout reads of R answers: the upper `layers` of what a cache has."""

    rows: CachedRows
    layers: int


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer whose states are known, in the place of its token ids: number `row` of `states`, made of `length` tokens."""

    states: CachedStates
    row: int
    length: int


Answer = RewardInput | CachedAnswer


def collate_answers(answers: Sequence[Answer], pad_id: int, pad_to: int | None = None) -> RewardBatch | States:
    """Answers as a padded batch: their token ids, or their states where these are known. `pad_to`: tokens of all of them."""
    cached = [answer for answer in answers if isinstance(answer, CachedAnswer)]
    if not cached:
        return collate_rewards([answer for answer in answers if isinstance(answer, RewardInput)], pad_id, pad_to)
    assert len(cached) == len(answers), "all answers have their states, or none has"
    states = cached[0].states
    one_token = states.rows.facts.token != "all"
    values, mask = states.rows.gather([answer.row for answer in cached], layers=states.layers, pad_to=None if one_token else pad_to)
    return States(values, mask)
