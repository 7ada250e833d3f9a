from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.launch.checkpointing import CheckpointKeeper
from common.training_state import read_training_state

Extra = Callable[[Path], None]


def save(directory: Path, metrics: dict[str, float], step: int, extra: Extra) -> None:
    directory.mkdir(parents=True)
    extra(directory)
    (directory / "step").write_text(str(step))


def keeper(run: Path, *, mode: str = "min", keep_last: int = 1) -> CheckpointKeeper:
    return CheckpointKeeper(run, save, monitor="val/loss", mode=mode, keep_last=keep_last)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def linked(run: Path, name: str) -> int:
    target = os.readlink(run / name)
    assert target.startswith("checkpoints/step-"), target
    return int((run / name / "step").read_text())


def test_best_and_newest_stay(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    seen = []
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0), (5, 4.0)]:  # an equal loss is no better one
        kept.save(step, {"val/loss": loss})
        seen.append((steps(tmp_path), linked(tmp_path, "best"), linked(tmp_path, "last")))
    assert seen == [([1], 1, 1), ([2], 2, 2), ([2, 3], 2, 3), ([2, 4], 2, 4), ([2, 5], 2, 5)]
    assert (kept.best_value, kept.best_metrics) == (1.0, {"val/loss": 1.0})


def test_more_newest_ones_and_the_other_direction(tmp_path: Path) -> None:
    kept = keeper(tmp_path, mode="max", keep_last=2)
    for step, value in [(1, 0.5), (2, 0.25), (3, 0.125), (1000000, 0.25)]:
        kept.save(step, {"val/loss": value})
    assert steps(tmp_path) == [1, 3, 1000000] and linked(tmp_path, "best") == 1


def test_nan_and_unvalidated_states_never_become_the_best(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(1, {"val/loss": math.nan})
    assert not (tmp_path / "best").exists()
    kept.save(2, {"val/loss": 1.0})
    kept.save(3, {"val/loss": -math.inf})
    kept.save(4)
    kept.close()
    assert linked(tmp_path, "best") == 2 and steps(tmp_path) == [2, 4]


def test_figures_that_are_not_finite_reach_no_manifest(tmp_path: Path) -> None:
    written: list[dict[str, float]] = []

    def noting(directory: Path, metrics: dict[str, float], step: int, extra: Extra) -> None:
        written.append(metrics)
        save(directory, metrics, step, extra)

    kept = CheckpointKeeper(tmp_path, noting, monitor="val/loss", mode="min", keep_last=1)
    kept.save(1, {"val/loss": 1.0, "val/pearson": math.nan, "val/mse": math.inf})
    assert written == [kept.best_metrics] == [{"val/loss": 1.0}]


def test_going_back_before_the_best_leaves_no_link_to_nothing(tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep_last=2)
    kept.save(1)
    kept.save(2, {"val/loss": 1.0})
    back = keeper(tmp_path, keep_last=2)
    back.load_state_dict(read_training_state(tmp_path / "checkpoints" / "step-000001")["keeper"], 1)
    assert back.best is None and not (tmp_path / "best").is_symlink()


def test_without_any_finite_value_the_last_stands_in(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(1, {"val/loss": math.nan})
    kept.save(2)
    kept.close()
    assert linked(tmp_path, "best") == 2 and kept.best_value is None


def test_the_old_one_goes_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    def failing(directory: Path, metrics: dict[str, float], step: int, extra: Extra) -> None:
        if step == 2:
            raise OSError("disk full")
        save(directory, metrics, step, extra)

    kept = CheckpointKeeper(tmp_path, failing, monitor="val/loss", mode="min", keep_last=1)
    kept.save(1, {"val/loss": 1.0})
    with pytest.raises(OSError, match="disk full"):
        kept.save(2, {"val/loss": 0.5})
    assert steps(tmp_path) == [1] and linked(tmp_path, "best") == linked(tmp_path, "last") == 1
    kept.save(3, {"val/loss": 2.0})
    assert linked(tmp_path, "best") == 1 and linked(tmp_path, "last") == 3


def test_a_state_is_written_once(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(1, {"val/loss": 1.0})
    assert kept.save(1) == tmp_path / "checkpoints" / "step-000001"  # save() would fail on an existing directory


def test_going_back_keeps_the_newest_until_last_and_forgets_a_best_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CheckpointKeeper(tmp_path, save, monitor="val/loss", mode="min", keep_last=9, keep_best=2)
    for step, loss in [(1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5), (5, 0.25)]:
        kept.save(step, {"val/loss": loss})
    (tmp_path / "summary.json").touch()
    state = read_training_state(tmp_path / "checkpoints" / "step-000003")["keeper"]
    (tmp_path / "checkpoints" / "step-000002").rename(tmp_path / "elsewhere")
    moved = []
    monkeypatch.setattr("common.launch.checkpointing.set_aside", lambda path: moved.append(path.name))
    back = keeper(tmp_path)
    back.load_state_dict(state, 3)
    assert moved == ["step-000005", "step-000004"] and not (tmp_path / "summary.json").exists()
    assert (back.best_value, back.best_metrics, linked(tmp_path, "best")) == (2.0, {}, 1)
