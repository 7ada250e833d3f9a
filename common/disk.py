"""Room on the disk for the checkpoints of a run: told before the first step, and where it runs out. No torch."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.runs import CHECKPOINTS_FOLDER

if TYPE_CHECKING:
    from torch import nn

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def checkpoint_bytes(*modules: nn.Module) -> int:
    """About what a checkpoint of these takes: their weights, and of those that train a second copy with Adam's two moments."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return sum(parameter.numel() * parameter.element_size() * (4 if parameter.requires_grad else 1) for parameter in parameters)


def check_room(folder: Path, one: int, kept: int, saves: int, resumed: Path | None = None) -> None:
    """Refuse to train where the disk has no room for as many checkpoints as a run keeps, and for one more while it is written.

    folder: where the run will lie. one: bytes of a checkpoint. kept: `keep_last` + `keep_best`. saves: of the whole run, at most.
    resumed: the run that goes on, whose checkpoints are there already. Raises UserError.
    """
    there = min(kept + 1, saves)
    need, free = one * there, shutil.disk_usage(nearest(folder)).free
    if resumed is not None:
        need -= size_of(resumed / CHECKPOINTS_FOLDER)
    if need > free:
        raise UserError(
            f"{folder}: checkpoints need about {amount(need)} ({there} of {amount(one)}: keep_last, keep_best and the one being "
            f"written), {amount(free)} are free on that disk; make room, lower keep_last, or choose another disk"
        )


def most_saves(steps: int, every: int | None, validations: int) -> int:
    """How many checkpoints a run can make: at an interval, the best of its validations, one where it ends. At most one a step."""
    return min(steps, (0 if every is None else steps // every) + validations + 1)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be made, whether it is there yet or not. Raises UserError."""
    place = nearest(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: {place} is read-only for this user; choose another folder")


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or the limit on the size of files is exhausted."""
    if isinstance(error, OSError):
        return error.errno in _OUT_OF_SPACE
    # safetensors tells it in words alone
    return (found := re.search(r"os error (\d+)", str(error))) is not None and int(found[1]) in _OUT_OF_SPACE


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed; 0 where there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def amount(size: float) -> str:
    """Bytes in words: `0.5 KiB`, `12.0 MiB`, `1.50 GiB`."""
    unit, power, digits = next((entry for entry in (("KiB", 10, 1), ("MiB", 20, 1)) if size < 1000 * 2 ** entry[1]), ("GiB", 30, 2))
    return f"{size / 2**power:.{digits}f} {unit}"


def nearest(path: Path) -> Path:
    """The path, or the first of its parents that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
