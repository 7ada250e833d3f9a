"""What a result came from: the code's commit and what was changed since, package versions, the machine. No secret, host or user name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "pytorch-lightning", "trl", "peft", "datasets", "accelerate", "pydantic"
)  # fmt: skip
SHOWN_CHANGES = 5
# Of larger untracked files the fingerprint holds name and size alone: it should cost no time.
_HASHED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class GitState:
    """A checkout: its commit, one `PATH (changed|untracked)` for each file that differs from it, and a SHA-256 of those differences.

    Elsewhere (no git, no checkout, somebody else's repository around this code) all are None; where nothing differs `diff` is.
    """

    commit: str | None = None
    changes: tuple[str, ...] | None = None
    diff: str | None = None

    @property
    def clean(self) -> bool | None:
        return None if self.changes is None else not self.changes


def git_state(root: Path) -> GitState:
    """The state of the checkout whose top level is `root`."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top).strip()).resolve() != root.resolve():
        return GitState()  # installed inside somebody else's repository: its commit would say nothing about this code
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changed = _git(root, "diff", "--name-only", "-z", "HEAD")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if commit is None or changed is None or untracked is None:
        return GitState(None if commit is None else commit.decode().strip())
    names = [(name, kind) for listed, kind in ((changed, "changed"), (untracked, "untracked")) for name in listed.split(b"\0") if name]
    changes = tuple(f"{_readable(name)} ({kind})" for name, kind in names)
    return GitState(commit.decode().strip(), changes, _diff_fingerprint(root, untracked.split(b"\0")) if names else None)


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _readable(name: bytes) -> str:
    text = os.fsdecode(name)
    return text if text.isprintable() else ascii(text)


def _diff_fingerprint(root: Path, untracked: Sequence[bytes]) -> str:
    digest = hashlib.sha256(_git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD") or b"")
    for name in sorted(filter(None, untracked)):
        path = root / os.fsdecode(name)
        digest.update(b"\0" + name + b"\0")
        with contextlib.suppress(OSError):  # a dangling link, say: its name counts
            size = path.stat().st_size
            digest.update(str(size).encode())
            if path.is_file() and size <= _HASHED_BYTES:
                digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def code_state() -> GitState:
    """The state of this code, as it was when a process first asked."""
    return git_state(REPOSITORY)


def check_clean(state: GitState, root: Path = REPOSITORY) -> None:
    """Raise UserError where files of the checkout at `root` are changed or untracked, or where there is no checkout at all."""
    if state.changes is None:
        raise UserError(f"require_clean_git: got true, but {root} is no git checkout with a commit, so that no commit can be recorded")
    if state.changes:
        count, more = len(state.changes), len(state.changes) - SHOWN_CHANGES
        listed = ", ".join(state.changes[:SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "")
        files = "1 file is" if count == 1 else f"{count} files are"
        raise UserError(f"require_clean_git: got true, but {files} changed or untracked in {root}: {listed}; commit or ignore them")


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that decide a run's numbers."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def host_facts() -> dict[str, Any]:
    """What kind of machine this is: system, processor, cores, memory, threads of torch, GPUs. Not which one, and not whose."""
    import torch

    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
    return {name: value for name, value in facts.items() if value is not None}


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or None


def _memory_gib() -> float | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def without_home(value: Any) -> Any:
    """Plain data in which paths below the user's home folder begin with `~`, so that they name nobody."""
    if isinstance(value, dict):
        return {key: without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_home(item) for item in value]
    home = str(Path("~").expanduser())
    return f"~{value.removeprefix(home)}" if isinstance(value, str) and len(home) > 1 and value.startswith(f"{home}{os.sep}") else value
