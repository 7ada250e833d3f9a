"""A disk that fills up, is too small or read-only, a temporary folder that cannot be used, checkpoints that went bad."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common.disk import check_room, checkpoint_bytes
from common.errors import UserError
from common.runs import checkpoints_in
from tests.faults.runs import MAINS, Models, Undisturbed, at_point, goes_on, left_by, run, run_dir, write_config

Whole = Callable[[str], Undisturbed]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("stage", "limit"), [("sft", 9_000), ("ppo", 24_000)])
def test_disk_full_in_a_save(tmp_path: Path, models: Models, whole: Whole, stage: str, limit: int) -> None:
    """The second save does not fit, in its weights or in its state: one line with path, need and free; the first one loads."""
    config = write_config(stage, tmp_path, models)
    limited = at_point("staging made", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    outcome = run(stage, config, prepare=limited)
    assert outcome.code == 2, outcome
    [problem] = outcome.problems
    destination = run_dir(config) / "checkpoints" / "step-"
    assert problem.startswith(f"{destination}") and re.search(r": no space left .*: it needs about [\d.]+ KiB, [\d.]+ .iB are", problem)
    assert "are free on that disk" in problem and "Traceback" not in outcome.err
    assert [path.name for path in (run_dir(config) / "checkpoints").iterdir()] == ["step-000002"]
    goes_on(stage, config, whole(stage).left)


@pytest.mark.parametrize("stage", MAINS)
def test_too_little_space_is_refused_before_the_first_step(tmp_path: Path, models: Models, stage: str) -> None:
    config = write_config(stage, tmp_path, models)

    def small() -> None:
        shutil.disk_usage = lambda path: Usage(0, 0, 100 * 2**10)  # type: ignore[assignment]

    outcome = run(stage, config, prepare=small)
    assert outcome.code == 2, outcome
    [problem] = outcome.problems
    assert re.search(r"checkpoints need about \d+\.\d KiB \(4 of \d+\.\d KiB: .*, 100\.0 KiB are free", problem)
    assert not list((tmp_path / "models").glob("desc-*"))


def test_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 100, bias=False), torch.nn.Linear(100, 100, bias=False).requires_grad_(False))
    one = checkpoint_bytes(model)
    assert one == 4 * 40_000 + 40_000  # weights, the trained ones again, two moments of each
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 799_999))
    check_room(tmp_path / "not" / "there", one, 2, 100)
    check_room(tmp_path, one, 1000, 3)  # no more than are ever made
    with pytest.raises(UserError, match=r"4 of 195\.3 KiB: keep_last, keep_best and the one being written"):
        check_room(tmp_path, one, 3, 4)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "model").write_bytes(bytes(1))
    check_room(tmp_path, one, 3, 4, resumed=tmp_path)  # what is there already takes no more room


def test_a_read_only_place_is_refused_before_torch(tmp_path: Path, models: Models) -> None:
    config = write_config("sft", tmp_path, models)
    (tmp_path / "models").mkdir()
    real = os.access

    def read_only() -> None:
        os.access = lambda path, mode, **options: path != tmp_path / "models" and real(path, mode, **options)

    outcome = run("sft", config, "--validate", prepare=read_only)
    assert (outcome.code, outcome.problems) == (
        2,
        [f"{tmp_path}/models: cannot be written: {tmp_path}/models is read-only for this user; choose another folder"],
    )


@pytest.mark.parametrize("stage", ["classification", "ppo"])
def test_no_temporary_folder_is_needed(tmp_path: Path, models: Models, whole: Whole, stage: str) -> None:
    """TMPDIR may lie on another file system, be full or not be there."""
    config = write_config(stage, tmp_path, models)

    def nowhere() -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path / "nowhere")

    outcome = run(stage, config, prepare=nowhere)
    assert outcome.code == 0, outcome
    assert left_by(config) == whole(stage).left and not (tmp_path / "nowhere").exists()


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return f"{path}: {path.stat().st_size} bytes, expected"


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    return f"{path}: content differs from its checksum"


def remove(path: Path) -> str:
    path.unlink()
    return f"{path}: missing"


DAMAGE: dict[str, tuple[str, Callable[[Path], str]]] = {
    "sft": ("model.safetensors", truncate),
    "classification": ("training_state.safetensors", flip),
    "regression": ("training_state.json", remove),
    "ppo": ("value_head.safetensors", flip),
}


@pytest.mark.parametrize("stage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, models: Models, whole: Whole, stage: str) -> None:
    config = write_config(stage, tmp_path, models)
    assert run(stage, config).code == 0
    (run_dir(config) / "summary.json").unlink()  # as if it had been killed at its very end
    newest = checkpoints_in(run_dir(config) / "checkpoints")[-1]
    name, damage = DAMAGE[stage]
    reason = damage(newest / name)
    outcome = run(stage, config, "--resume")
    assert outcome.code == 0, outcome
    assert f"damaged, so passed over: {reason}" in outcome.out
    assert left_by(config) == whole(stage).left


def test_without_a_whole_checkpoint_each_reason_is_listed_and_nothing_begins_anew(tmp_path: Path, models: Models) -> None:
    config = write_config("sft", tmp_path, models)
    assert run("sft", config).code == 0
    (run_dir(config) / "summary.json").unlink()
    there = checkpoints_in(run_dir(config) / "checkpoints")
    damages: list[Any] = [truncate, flip, remove]
    reasons = [damages[number % 3](path / "model.safetensors") for number, path in enumerate(there)]
    before = sorted(path for path in tmp_path.rglob("*") if path.name not in {"out", "err"})
    outcome = run("sft", config, "--resume")
    assert outcome.code == 2, outcome
    *named, last = outcome.problems
    assert len(named) == len(reasons) >= 2 and all(line.startswith(reason) for line, reason in zip(named, reversed(reasons), strict=True))
    assert "no checkpoint is whole" in last
    assert sorted(path for path in tmp_path.rglob("*") if path.name not in {"out", "err"}) == before
