"""A small function that Ray workers run in the place of a stage's script."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from common.launch.signals import Stopped, StopSignals

WAITING_S = 120.0


def listening(process: psutil.Process) -> list[str]:
    """Addresses that a process takes connections at."""
    return [entry.laddr.ip for entry in process.net_connections(kind="inet") if entry.status == psutil.CONN_LISTEN]


def add_up_and_wait(argv: Sequence[str]) -> int:
    """Add up the numbers of all workers, tell about oneself, then wait for a signal. argv: a folder."""
    import torch
    from torch import distributed

    rank, total = int(os.environ["RANK"]), torch.tensor(float(os.environ["RANK"]) + 1)
    distributed.all_reduce(total)
    told = {
        "sum": float(total),
        "who": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")],
        "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
        "cwd": os.getcwd(),
        "listening": listening(psutil.Process()),
        "wandb": os.environ.get("WANDB_MODE"),
    }
    Path(argv[0], f"worker-{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    print(f"worker {rank} waits", flush=True)
    print(f"worker {rank} waits", file=sys.stderr)
    signals, until = StopSignals(), time.monotonic() + WAITING_S
    while not signals.received and time.monotonic() < until:
        time.sleep(0.1)
    raise Stopped(signals.exit_code)
