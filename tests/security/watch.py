"""What a command and the processes it starts can be seen doing from outside: their arguments, and what they listen on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PAUSE_S = 0.05


@dataclass
class Watched:
    """A finished command: what it printed, and what was seen of it and its children while it ran."""

    code: int
    output: str
    arguments: set[str] = field(default_factory=set)
    """Every argument of every process."""
    listening: set[str] = field(default_factory=set)
    """Internet addresses that a process waited at for others to connect."""


def watch(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Watched:
    """Run a command to its end."""
    process = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = Watched(0, "")
    reader = threading.Thread(target=lambda: setattr(seen, "output", process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    root = psutil.Process(process.pid)
    while process.poll() is None:
        _look(root, seen)
        time.sleep(PAUSE_S)
    reader.join()
    seen.code = process.returncode
    return seen


def _look(root: psutil.Process, seen: Watched) -> None:
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    for process in family:
        try:
            seen.arguments.update(process.cmdline())
            seen.listening.update(place.laddr.ip for place in process.net_connections("inet") if place.status == psutil.CONN_LISTEN)
        except psutil.Error:  # it has ended
            continue
