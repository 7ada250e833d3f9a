from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from common import provenance
from common.errors import UserError
from common.provenance import GitState, check_clean, code_state, git_state, host_facts, without_home


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, env=environment, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "kept.py").write_text("1\n")
    (tmp_path / ".gitignore").write_text("models/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_git_state_of_a_checkout_and_elsewhere(tmp_path: Path) -> None:
    assert git_state(tmp_path) == GitState() and git_state(tmp_path).clean is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == GitState()  # no commit yet
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    state = git_state(tmp_path)
    assert state.commit is not None and len(state.commit) == 40 and state.clean is True and state.diff is None
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") == GitState()


def test_the_diff_fingerprint_follows_what_differs(checkout: Path) -> None:
    (checkout / "models").mkdir()
    (checkout / "models" / "big").write_text("ignored")
    assert git_state(checkout).diff is None
    (checkout / "kept.py").write_text("2\n")
    changed = git_state(checkout)
    assert changed.changes == ("kept.py (changed)",) and changed.clean is False
    (checkout / "new ü.py").write_text("3\n")
    with_new = git_state(checkout)
    assert with_new.changes == ("kept.py (changed)", "new ü.py (untracked)")
    (checkout / "new ü.py").write_text("4\n")
    other_content = git_state(checkout)
    git(checkout, "add", "kept.py")  # staged or not: it differs from the commit
    assert git_state(checkout) == other_content
    assert len({changed.diff, with_new.diff, other_content.diff}) == 3
    (checkout / "new ü.py").rename(checkout / "renamed.py")
    assert git_state(checkout).diff != other_content.diff
    (checkout / "renamed.py").unlink()
    assert git_state(checkout) == changed


def test_of_large_untracked_files_size_and_name_count(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_HASHED_BYTES", 4)
    found = []
    for content in ("12345", "67890", "123456"):
        (checkout / "large").write_text(content)
        found.append(git_state(checkout).diff)
    assert found[0] == found[1] != found[2]


def test_odd_names_and_links_to_nothing_are_listed(checkout: Path) -> None:
    (checkout / "two\nlines").write_text("")
    (checkout / "link").symlink_to("nowhere")
    state = git_state(checkout)
    assert state.changes is not None and set(state.changes) == {"link (untracked)", "'two\\nlines' (untracked)"} and state.diff is not None


def test_the_state_of_the_code_is_that_of_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [GitState("first"), GitState("second")]
    code_state.cache_clear()
    monkeypatch.setattr(provenance, "git_state", lambda root: states.pop(0))
    try:
        assert [code_state().commit for _ in range(2)] == ["first", "first"]
    finally:
        code_state.cache_clear()


def test_a_clean_checkout_is_required_and_what_is_not_clean_is_named(checkout: Path) -> None:
    check_clean(git_state(checkout), checkout)
    (checkout / "kept.py").write_text("2\n")
    with pytest.raises(
        UserError, match=r"require_clean_git: got true, but 1 file is changed or untracked in .*: kept.py \(changed\); commit"
    ):
        check_clean(git_state(checkout), checkout)
    for number in range(7):
        (checkout / f"new{number}.py").write_text("")
    with pytest.raises(UserError, match=r"8 files are .*: kept.py \(changed\), new0.py \(untracked\), .*new3.py \(untracked\) and 3 more;"):
        check_clean(git_state(checkout), checkout)


def test_a_folder_without_commits_is_not_clean(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no git checkout with a commit"):
        check_clean(git_state(tmp_path), tmp_path)


def test_host_facts_name_nobody() -> None:
    facts = host_facts()
    assert {"system", "cores", "torch_threads"} <= facts.keys()
    words = set(re.findall(r"[\w.-]+", json.dumps(facts)))
    assert not words & ({socket.gethostname(), getpass.getuser()} - {"root"})


def test_paths_in_the_home_folder_do_not_name_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = {"a": "/home/ann/x", "b": ["/home/anna/x", "/data/home/ann/x", 3], "c": {"d": "/home/ann/y z"}}
    assert without_home(config) == {"a": "~/x", "b": ["/home/anna/x", "/data/home/ann/x", 3], "c": {"d": "~/y z"}}
