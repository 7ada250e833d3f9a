"""Ends the processes of a Ray cluster that was started for one run, however that run ends; as a program, when its parent is gone.

Ray's own processes notice for themselves that their cluster is gone, some of them after minutes. As a program this imports nothing of here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import psutil

_ENDS_BY_ITSELF_S = 3.0
_REMOVE_TRIES = 20
_KILL_TRIES = 20  # a process that waits for a device cannot be ended
ENDED = "ended"


def processes_of(folder: Path) -> list[psutil.Process]:
    """Other processes that write files below the folder, as all of a cluster write logs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone by now, or another user's
            written = (Path(file.path) for file in process.open_files() if getattr(file, "mode", "a") != "r")
            if process.pid != os.getpid() and any(path.is_relative_to(folder) for path in written):
                found.append(process)
    return found


def end(folder: Path) -> None:
    """End every process of a cluster, and remove its folder."""
    psutil.wait_procs(processes_of(folder), timeout=_ENDS_BY_ITSELF_S)
    for _ in range(_KILL_TRIES):  # what is killed may have started others just before
        left = processes_of(folder)
        if not left:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_ENDS_BY_ITSELF_S)
    for _ in range(_REMOVE_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.stdin.read() != ENDED:  # returns when the parent has ended, however that came
        with contextlib.suppress(OSError):  # nobody may read it any more
            print("error: the script was ended, or Ray was; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
    end(Path(sys.argv[1]))
