"""Who leads and who follows, told by the environment alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from common.followers import followed_run, follows, launched, leading, local_world_size, rank, refuse_launchers, world_size


def test_processes_that_the_first_one_starts_follow_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with leading(tmp_path):
        assert followed_run() is None and not follows() and (rank(), world_size()) == (0, 1)
        for name, value in {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}.items():  # as Lightning says it
            monkeypatch.setenv(name, value)
        assert followed_run() == tmp_path and follows() and not launched() and (rank(), world_size()) == (1, 2)
    assert followed_run() is None


def test_processes_of_a_launcher_are_numbered_over_all_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second_machine = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in second_machine.items():
        monkeypatch.setenv(name, value)
    with leading(tmp_path):
        assert followed_run() is None, "it has no part in what another start has left in the environment"
    assert launched() and follows() and (rank(), world_size(), local_world_size()) == (2, 4, 2)
    with pytest.raises(UserError, match="WORLD_SIZE is 4, but this command runs in one process"):
        refuse_launchers()
    monkeypatch.setenv("RANK", "0")
    assert launched() and not follows()
