from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from common.notes import begin_notes, say
from common.provenance import REPOSITORY, GitState
from common.runs import (
    check_start,
    create_run_directory,
    next_free_index,
    publish_latest,
    replace_symlink,
    run_log,
    stage_runs_root,
    write_config,
    write_summary,
    write_text_atomically,
)
from common.schema import RunSettings


def test_runs_lie_in_the_checkpoint_folder_or_under_a_results_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESULTS_ROOT_DIR", raising=False)
    assert stage_runs_root(tmp_path / "models", None, "sft") == tmp_path / "models"
    assert stage_runs_root(tmp_path / "models", tmp_path / "results", "sft") == tmp_path / "results" / "sft"
    monkeypatch.setenv("RESULTS_ROOT_DIR", str(tmp_path / "environment"))
    assert stage_runs_root(tmp_path / "models", None, "sft") == tmp_path / "environment" / "sft"
    assert stage_runs_root(tmp_path / "models", tmp_path / "results", "sft") == tmp_path / "results" / "sft"


def test_auto_takes_the_number_after_the_largest_of_the_same_name(tmp_path: Path) -> None:
    assert create_run_directory(tmp_path / "deep" / "models", "run").name == "desc-run,index-0"
    root = tmp_path / "deep" / "models"
    for name in ("desc-run,index-7", "desc-run2,index-40", "desc-run,index-x", "latest"):
        (root / name).mkdir()
    assert next_free_index(root, "run") == 8
    assert create_run_directory(root, "run", "auto").name == "desc-run,index-8"


def test_a_taken_index_is_refused_with_the_next_free_one(tmp_path: Path) -> None:
    create_run_directory(tmp_path, "run", 3)
    with pytest.raises(UserError, match="next free index is 4"):
        create_run_directory(tmp_path, "run", 3)
    assert create_run_directory(tmp_path, "run", 1).name == "desc-run,index-1"


@pytest.mark.parametrize("desc", ["", "..", "a/b", "../up", "a b"])
def test_a_name_cannot_leave_its_root(tmp_path: Path, desc: str) -> None:
    with pytest.raises(UserError, match="desc"):
        create_run_directory(tmp_path / "root", desc)
    assert not (tmp_path / "root").exists()


def test_a_root_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(UserError, match="cannot make a run directory"):
        create_run_directory(tmp_path / "models", "run")


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(create_run_directory(tmp_path, "run"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in made) == sorted(f"desc-run,index-{number}" for number in range(16))


def test_a_number_that_another_run_took_in_between_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run_directory(tmp_path, "run")
    seen = iter([0, 0, 1])  # what was free when we looked, twice too late
    monkeypatch.setattr("common.runs.next_free_index", lambda root, desc: next(seen))
    assert create_run_directory(tmp_path, "run").name == "desc-run,index-1"


def test_latest_is_relative_follows_best_and_survives_moving_the_tree(tmp_path: Path) -> None:
    models = tmp_path / "models"
    run = create_run_directory(models, "run")
    for step in ("step-1", "step-2"):
        (run / "checkpoints" / step).mkdir(parents=True)
    replace_symlink(run / "best", run / "checkpoints" / "step-1")
    link = publish_latest(models, run / "best")
    assert os.readlink(link) == "desc-run,index-0/best"
    assert os.readlink(run / "best") == "checkpoints/step-1"
    replace_symlink(run / "best", run / "checkpoints" / "step-2")
    models.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest").resolve() == tmp_path / "moved" / "desc-run,index-0" / "checkpoints" / "step-2"
    assert not [path for path in (tmp_path / "moved").rglob(".*")]


def test_latest_works_through_a_symlinked_models_folder(tmp_path: Path) -> None:
    (tmp_path / "real" / "far").mkdir(parents=True)
    (tmp_path / "models").symlink_to(tmp_path / "real" / "far")
    run = create_run_directory(tmp_path / "models", "run")
    (run / "best").mkdir()
    publish_latest(tmp_path / "models", run / "best")
    assert (tmp_path / "models" / "latest").resolve() == (tmp_path / "real" / "far" / run.name / "best")


def test_a_real_folder_called_latest_is_never_replaced(tmp_path: Path) -> None:
    run = create_run_directory(tmp_path, "run")
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match="no symlink"):
        publish_latest(tmp_path, run)
    assert (tmp_path / "latest").is_dir() and not (tmp_path / "latest").is_symlink()


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_config_and_summary_read_back(tmp_path: Path) -> None:
    config = {"model_name": "模型", "trainer": {"params": {"max_epochs": 2}}}
    assert yaml.safe_load(write_config(tmp_path, config).read_text(encoding="utf-8")) == config
    assert json.loads(write_summary(tmp_path, {"path": tmp_path, "best": 0.5}).read_text()) == {"path": str(tmp_path), "best": 0.5}


def test_the_log_holds_what_is_printed_but_no_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    begin_notes()
    say("said before the run had a directory")
    with run_log(tmp_path):
        print("to stdout")
        print("to stderr", file=sys.stderr)
        sys.stderr.write("\r 50%|####    ")
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(RuntimeError), run_log(tmp_path):
        raise RuntimeError
    assert (sys.stdout, sys.stderr) == before
    note = "note: said before the run had a directory\n"
    assert (tmp_path / "log.txt").read_text() == f"{note}to stdout\nto stderr\n"
    captured = capsys.readouterr()
    assert captured.out == f"{note}to stdout\n" and captured.err == "to stderr\n\r 50%|####    "


def test_a_taken_index_and_a_checkout_that_is_not_clean_are_refused_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("common.runs.code_state", lambda: asked.append(1) or GitState("0" * 40, ("new.py (untracked)",), "1"))
    create_run_directory(tmp_path, "run", 3)
    check_start(RunSettings(desc="run", index="auto"), tmp_path)
    assert asked  # for the manifests, which record the code as it was now
    check_start(RunSettings(desc="run", index=2), tmp_path)
    check_start(RunSettings(desc="other", index=3), tmp_path / "none")
    with pytest.raises(UserError) as raised:
        check_start(RunSettings(desc="run", index=3, require_clean_git=True), tmp_path)
    taken = (
        f"index: {tmp_path / 'desc-run,index-3'} exists already; the next free index is 4 (or index: auto), --resume goes on with this one"
    )
    files = f"1 file is changed or untracked in {REPOSITORY}: new.py (untracked)"
    not_clean = f"require_clean_git: got true, but {files}; commit or ignore them"
    assert raised.value.problems == (taken, not_clean)
    with pytest.raises(UserError) as raised:  # to go on in a directory that is there
        check_start(RunSettings(desc="run", index=3, require_clean_git=True), None)
    assert raised.value.problems == (not_clean,)
    assert [path.name for path in tmp_path.iterdir()] == ["desc-run,index-3"]
