"""One run of several processes: they meet, and the one that leads tells the others where the run is written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed

from common.disk import check_room
from common.errors import UserError
from common.followers import followed_run, follows, launched, leading, met, world_size
from common.launch.runtime import Runtime
from common.resume import ResumePoint, run_directory, writing
from common.runs import write_config
from common.schema import TrainingSettings

Train = TypeVar("Train", bound=Callable[..., Path])


def among_processes(train: Train) -> Train:
    """Let `train(config, …)` run in a group of all processes that a launcher started, within `trainer.process_timeout_s` of one another.

    The group is made first and destroyed at the end, unless it was there before. Processes that Lightning starts meet in its trainer.
    """

    @functools.wraps(train)
    def joined(config: TrainingSettings, *arguments: Any, **options: Any) -> Path:
        if not launched():
            return train(config, *arguments, **options)
        if options.get("dry_run") and world_size() > 1:
            raise UserError("--dry_run measures in one process, and counts trainer.params.devices of them; start it with python")
        with Runtime.start(timeout_s=config.trainer.process_timeout_s):
            return train(config, *arguments, **options)

    return joined  # type: ignore[return-value]


@contextlib.contextmanager
def shared_run(
    config: TrainingSettings, resolved: Mapping[str, Any], root: Path, resume: ResumePoint | None, checkpoint_bytes: int
) -> Iterator[Path]:
    """The directory of a run, in each of its processes: one below `root`, or that of `resume`.

    The process that leads makes it, writes the `resolved` config and holds the run's lock and log. Raises UserError where checkpoints of so
    many bytes do not fit.
    """
    if follows():
        run_dir = followed_run() or _from_leader(None)
        assert run_dir is not None, "the process that leads has told its run"
        met()
        yield run_dir
        return
    check_room(root, checkpoint_bytes, config.trainer.checkpoint.kept, None if resume is None else resume.run_dir)
    run_dir = run_directory(resume, root, config)
    with writing(run_dir, resume), leading(run_dir):
        if resume is None:
            write_config(run_dir, resolved)
        _from_leader(run_dir)
        yield run_dir


def _from_leader(run_dir: Path | None) -> Path | None:
    if not distributed.is_initialized():
        return run_dir
    with Runtime.start() as runtime:
        return runtime.broadcast(run_dir)
