"""Contenders in processes of their own, so that none finds another's memory, threads or patches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Unless threads stay on their cores and sleep while they wait, identical runs differ by factors on machines of few cores.
THREADS = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "passive"}


class ContenderFailed(SystemExit):
    """A process that measured nothing; the end of its errors is the message."""


def run_contender(command: Sequence[str], cwd: Path | None = None) -> dict[str, Any]:
    """The figures of a command's last `RESULT {json}` line. Raises ContenderFailed where it prints none."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **THREADS}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise ContenderFailed(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def try_contender(command: Sequence[str], cwd: Path | None = None) -> dict[str, Any] | None:
    """As `run_contender`; None, with the message on stderr, where it failed."""
    try:
        return run_contender(command, cwd)
    except ContenderFailed as failure:
        print(failure, file=sys.stderr)
        return None
