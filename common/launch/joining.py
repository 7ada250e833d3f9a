"""One run of several processes: they meet, and the one that leads tells the others where the run is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.disk import check_room
from common.followers import followed_run, follows, launched, leading
from common.launch.runtime import Runtime
from common.resume import ResumePoint, run_directory, writing
from common.runs import write_config
from common.schema import TrainingSettings


@contextlib.contextmanager
def shared_run(
    config: TrainingSettings, resolved: Mapping[str, Any], root: Path, resume: ResumePoint | None, checkpoint_bytes: int, saves: int
) -> Iterator[Path]:
    """The directory of a run, in each of its processes: one below `root`, or that of `resume`.

    Processes that a launcher started meet here, within `trainer.process_timeout_s` of one another; those that Lightning starts meet in its
    trainer. The process that leads makes the directory, writes the `resolved` config and holds the run's lock and log. Raises UserError
    where checkpoints of so many bytes do not fit; it saves so many of them at most.
    """
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(Runtime.start(timeout_s=config.trainer.process_timeout_s)) if launched() else None
        if follows():
            run_dir = followed_run() if runtime is None else runtime.broadcast(None)
            assert run_dir is not None, "the process that leads has told its run"
            yield run_dir
            return
        check_room(root, checkpoint_bytes, config.trainer.checkpoint.kept, saves, None if resume is None else resume.run_dir)
        run_dir = run_directory(resume, root, config)
        stack.enter_context(writing(run_dir, resume))
        stack.enter_context(leading(run_dir))
        if resume is None:
            write_config(run_dir, resolved)
        if runtime is not None:
            runtime.broadcast(run_dir)
        yield run_dir
