"""Several processes that train together, forked from a test as a launcher would start them: torch is imported once."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common.errors import run_main

ROOT = Path(__file__).resolve().parents[1]


def as_launched(main: Callable[[list[str]], int | None], argv: list[str], folder: Path, *, processes: int = 2) -> tuple[list[int], str]:
    """Run a script's `main(argv)` in each of several processes of one machine, which `torchrun` might have started.

    Returns their exit codes, and all that they printed, which is also in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)

    def launched(rank: int) -> None:
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in there.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = ["script", *argv]
        run_main(main)

    children = [_forked(partial(launched, rank), folder / f"printed-{rank}") for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, "".join((folder / f"printed-{rank}").read_text() for rank in range(processes))


def as_typed(folder: Path, words: Sequence[str], log: Path) -> tuple[int, str]:
    """Run `cd folder && python words…`. Returns its exit code and all that it printed, which is also in the file `log`."""

    def typed() -> None:
        os.chdir(folder)
        # As Python would: the script's folder, and the libraries, but not the repository. That is for the script to find.
        sys.path[:] = [str(folder), *(place for place in sys.path if Path(place or ".").resolve() not in (ROOT, folder))]
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")

    child = _forked(typed, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def _forked(work: Callable[[], None], log: Path) -> int:
    """The id of a child that does the work and exits with its code; what it prints goes into the file `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.settrace(None)  # what it covers would go nowhere
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        work()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
