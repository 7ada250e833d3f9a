"""Run directories: `desc-DESC,index-N`, made once, never overwritten, found again through symlinks that are replaced atomically."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from common.errors import UserError
from common.followers import follows
from common.notes import take_notes
from common.provenance import check_clean, code_state
from common.schema import RunSettings

RESULTS_ROOT_VARIABLE = "RESULTS_ROOT_DIR"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.txt"
CHECKPOINTS_FOLDER = "checkpoints"
LATEST = "latest"

_STEP_NAME = re.compile(r"step-(\d+)")
_RUN_NAME = re.compile(r"desc-(?P<desc>.+),index-(?P<index>\d+)")
_DESC = re.compile(r"[A-Za-z0-9._-]+")


def stage_runs_root(dirpath: str | Path, results_root: str | Path | None, stage: str) -> Path:
    """Folder that a stage's runs lie in: `ROOT/STAGE` where a results root is set (config, else RESULTS_ROOT_DIR), else `dirpath`."""
    root = results_root or os.environ.get(RESULTS_ROOT_VARIABLE)
    return Path(root).expanduser().absolute() / stage if root else Path(dirpath).absolute()


def check_start(settings: RunSettings, root: Path | None) -> None:
    """Refuse what `create_run_directory` would, and a checkout that is not clean where it has to be, before anything is loaded.

    root: where `stage_runs_root` says that the runs lie; None: the run goes on in a directory that is there. Raises UserError with every
    problem.
    """
    if follows():
        return
    state = code_state()  # now, since what manifests record is the code that was loaded
    problems: list[str] = []
    for refuse in (
        lambda: _refuse_taken(root, settings.desc, settings.index) if root is not None else None,
        lambda: check_clean(state) if settings.require_clean_git else None,
    ):
        try:
            refuse()
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)


def _refuse_taken(root: Path, desc: str, index: int | str) -> None:
    if index != "auto" and (root / run_name(desc, int(index))).exists():
        raise _taken(root, desc, int(index))


def _taken(root: Path, desc: str, index: int) -> UserError:
    free = next_free_index(root, desc)
    taken = root / run_name(desc, index)
    return UserError(f"index: {taken} exists already; the next free index is {free} (or index: auto), --resume goes on with this one")


def run_name(desc: str, index: int) -> str:
    return f"desc-{desc},index-{index}"


def is_run_name(name: str) -> bool:
    """Whether a folder of this name was made for a run."""
    return _RUN_NAME.fullmatch(name) is not None


def next_free_index(root: Path, desc: str) -> int:
    """One more than the largest index any run of this `desc` has, whatever state that run is in; 0 in an empty root."""
    matches = (_RUN_NAME.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return 1 + max((int(match["index"]) for match in matches if match and match["desc"] == desc), default=-1)


_told: list[Callable[[Path], object]] = []


def tell_new_runs(tell: Callable[[Path], object]) -> None:
    """Call `tell(directory)` from now on when this process has made a run directory."""
    _told.append(tell)


def create_run_directory(root: Path, desc: str, index: int | str = "auto") -> Path:
    """Make and return `ROOT/desc-DESC,index-N`; `auto` takes the next free N, also when several runs start at once.

    Raises UserError where an explicit index is taken (naming the next free one) or the root cannot be written.
    """
    if not _DESC.fullmatch(desc) or set(desc) <= {"."}:
        raise UserError(f"desc: got {desc!r}, expected letters, digits, dots, dashes and underscores")
    try:
        root.mkdir(parents=True, exist_ok=True)
        directory = _make_next(root, desc) if index == "auto" else _make_explicit(root, desc, int(index))
    except OSError as error:
        raise UserError(f"{root}: cannot make a run directory there: {error.strerror or error}") from None
    for tell in _told:
        tell(directory)
    return directory


def _make_next(root: Path, desc: str) -> Path:
    while True:
        directory = root / run_name(desc, next_free_index(root, desc))
        with contextlib.suppress(FileExistsError):  # another run took it since we looked
            directory.mkdir()
            return directory


def _make_explicit(root: Path, desc: str, index: int) -> Path:
    directory = root / run_name(desc, index)
    try:
        directory.mkdir()
    except FileExistsError:
        raise _taken(root, desc, index) from None
    return directory


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints `step-N` of a run's folder, whole or not, oldest first."""
    return sorted((path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)), key=step_of) if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def replace_symlink(link: Path, target: Path) -> None:
    """Point `link` at `target` by a relative path; at every instant the link names the old or the new target.

    Raises UserError where `link` is a real file or folder: those are never replaced.
    """
    if link.exists() and not link.is_symlink():
        raise UserError(f"{link}: is no symlink; move it away, its place is needed for a link to {target.name}")
    # The link's folder may itself be reached through a symlink, and the target may be one that should be followed later, not now.
    relative = os.path.relpath(target.parent.resolve() / target.name, link.parent.resolve())
    temporary = link.parent / f".{link.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.symlink_to(relative, target_is_directory=True)
    try:
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def publish_latest(models_dir: Path, target: Path) -> Path:
    """Make `models_dir/latest` a relative symlink to `target` (`RUN/best`, say), replaced atomically; returns the link."""
    assert target.exists(), f"{target} is not there to be published"
    link = Path(models_dir) / LATEST
    replace_symlink(link, Path(target))
    return link


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: readers see the old text or the new one, never a part."""
    temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_config(run_dir: Path, resolved: Mapping[str, Any]) -> Path:
    """Write the resolved configuration (secrets removed before) as `config.yaml`."""
    path = run_dir / CONFIG_FILE
    write_text_atomically(path, yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True, width=140))
    return path


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write `summary.json`: what a run ended with."""
    path = run_dir / SUMMARY_FILE
    write_text_atomically(path, json.dumps(summary, indent=2, default=str) + "\n")
    return path


class _Tee:
    """A stream that also writes to a log. What is redrawn in place (progress bars) stays out of the log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:
            self._log.write(text)
            self._log.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def run_log(run_dir: Path) -> Iterator[None]:
    """Copy what is printed inside (stdout and stderr) to `log.txt` of the run, appending; the notes said before come first."""
    with (run_dir / LOG_FILE).open("a", encoding="utf-8") as log:
        log.writelines(f"note: {note}\n" for note in take_notes())
        out, err = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err
