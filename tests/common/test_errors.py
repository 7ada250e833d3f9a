from __future__ import annotations

import errno
from pathlib import Path

import pytest

from common.errors import UserError, user_problems
from common.run_lock import locked
from common.training_state import STATE_FILES, read_training_state, write_training_state


def test_a_path_that_is_not_what_it_has_to_be_is_a_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(OSError) as raised, locked(tmp_path):
        pass
    assert user_problems(raised.value) == (f"{tmp_path}/.lock: Is a directory",)
    assert user_problems(OSError(errno.EBADF, "Bad file descriptor", "x")) is None  # ours


def test_a_state_that_is_no_mapping_is_damaged(tmp_path: Path) -> None:
    write_training_state(tmp_path, {"step": 1})
    (tmp_path / STATE_FILES[1]).write_text("[]")
    with pytest.raises(UserError, match="its state of the training is a list, expected its parts; the directory is damaged"):
        read_training_state(tmp_path)
