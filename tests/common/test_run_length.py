"""Intervals between checkpoints against the length of a run, as far as the rows tell it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from common.config import Invocation
from common.errors import UserError
from common.run_length import check_save_interval, check_training_length
from sft.config import SFTConfig


def invocation(params: dict[str, Any], every: int | None = None, overridden: tuple[tuple[str, ...], ...] = ()) -> Invocation[SFTConfig]:
    trainer = {"params": params, "checkpoint": {"every_n_train_steps": every}}
    config = SFTConfig.model_validate({"data": {"data_dir": "a"}, "model_name": "m", "trainer": trainer})
    return Invocation(config, Path("c"), Path(), None, validate_only=False, options=argparse.Namespace(), overridden=overridden)


@pytest.mark.parametrize(
    ("params", "steps"),
    [
        ({}, 3),  # 10 rows in batches of 4, one epoch
        ({"max_epochs": 5}, 15),
        ({"max_epochs": 5, "accumulate_grad_batches": 2}, 10),
        ({"max_epochs": 5, "max_steps": 7}, 7),
        ({"max_steps": 70}, 70),
        ({"max_epochs": -1, "max_steps": 70}, 70),
        ({"max_epochs": 5, "limit_train_batches": 2}, 10),
        ({"max_epochs": 5, "overfit_batches": 1}, 5),
    ],
)
def test_an_interval_beyond_the_last_step_is_refused(params: dict[str, Any], steps: int) -> None:
    assert check_training_length(invocation(params, steps), rows=10, batch_size=4) == []
    with pytest.raises(UserError) as caught:
        check_training_length(invocation(params, steps + 1), rows=10, batch_size=4)
    assert caught.value.problems == (
        f"trainer.checkpoint.every_n_train_steps: got {steps + 1}, but the run has {steps} steps: nothing would be saved before its end; "
        "lower it (null: at each validation)",
    )


def test_a_short_trial_of_a_config_gets_a_note() -> None:
    words = "trainer.checkpoint.every_n_train_steps: got 9, but the run has 2 steps: nothing would be saved before its end"
    setting = ("trainer", "checkpoint", "every_n_train_steps")
    for overridden in (("trainer", "params", "max_steps"), ("trainer", "params"), ("trainer",), ("data", "data_dir")):
        trial = invocation({"max_steps": 2}, 9, (overridden,))
        if overridden == ("trainer",):  # which holds the interval, too
            with pytest.raises(UserError):
                check_training_length(trial, 10, 4)
        else:
            assert check_training_length(trial, 10, 4) == [words]
    for overridden in ((("seed",),), (("trainer", "params", "max_steps"), setting)):
        with pytest.raises(UserError):
            check_training_length(invocation({"max_steps": 2}, 9, overridden), 10, 4)
    assert check_save_interval(invocation({}), "seed", None, 1, instead="", length=()) == []


def test_a_batch_larger_than_the_data_is_told() -> None:
    assert check_training_length(invocation({"fast_dev_run": True}, 100), rows=3, batch_size=4) == [
        "data.batch_size 4 exceeds the number of training rows, 3: a batch holds all of them"
    ]
