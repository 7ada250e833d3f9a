"""How often a training validates is counted as Lightning does it, and a last time after the last step."""

from __future__ import annotations

from typing import Any

import pytest

from common.launch.rehearsal import validations
from common.schema import TrainerSettings


@pytest.mark.parametrize(
    ("params", "batches", "steps", "expected"),
    [
        ({}, 10, 30, 3),  # after each of 3 epochs
        ({}, 10, 25, 3),  # 2, and the end
        ({"check_val_every_n_epoch": 2}, 10, 40, 2),
        ({"check_val_every_n_epoch": 2}, 10, 30, 2),  # 1, and the end
        ({"check_val_every_n_epoch": 2}, 10, 35, 2),
        ({"val_check_interval": 0.5}, 10, 20, 4),
        ({"val_check_interval": 3}, 10, 20, 7),  # 3 in each epoch, and the end
        ({"val_check_interval": 3}, 10, 16, 5),  # 3, and after 3 and 6 of the second epoch
        ({"val_check_interval": 3}, 10, 17, 6),  # the same, and the end
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 10, 20, 7),  # every 3 of 20, and the end
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, 10, 20, 4),
        ({"accumulate_grad_batches": 4}, 10, 6, 2),  # 3 steps an epoch
        ({"accumulate_grad_batches": 4, "val_check_interval": 4}, 10, 3, 3),  # after 4 and 8 batches, and the end
        ({"limit_train_batches": 5}, 10, 20, 4),
    ],
)
def test_validations_are_counted(params: dict[str, Any], batches: int, steps: int, expected: int) -> None:
    assert validations(TrainerSettings(params=params), batches, steps) == expected
