"""Several processes that train together, forked from a test as a launcher would start them: torch is imported once."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from common.errors import run_main


def as_launched(main: Callable[[list[str]], int | None], argv: list[str], folder: Path, *, processes: int = 2) -> tuple[list[int], str]:
    """Run a script's `main(argv)` in each of several processes of one machine, which `torchrun` might have started.

    Returns their exit codes, and all that they printed, which is also in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = [_forked(main, argv, folder / f"printed-{rank}", rank, processes, port) for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, "".join((folder / f"printed-{rank}").read_text() for rank in range(processes))


def _forked(main: Callable[[list[str]], int | None], argv: list[str], log: Path, rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in there.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = ["script", *argv]
        run_main(main)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
