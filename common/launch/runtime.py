"""What PPO knows about other processes: rank, sums, gathered lists, barriers. One process needs no process group."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from common.errors import UserError

T = TypeVar("T")


def best_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Runtime:
    """One process's place among `world_size`, and the few collective operations that algorithms need.

    Every operation must be called by all processes in the same order; alone it is the identity.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @classmethod
    def local(cls, device: torch.device | str | None = None) -> Runtime:
        """The single process of a plain start. Raises UserError where a launcher started several."""
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise UserError(f"WORLD_SIZE is {started}, but PPO runs in one process: each of them would train alone; start it with python")
        return cls(device=torch.device(device) if device is not None else best_device())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over processes; the argument stays as it is."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, rows: Sequence[T]) -> list[T]:
        """Everyone's rows (picklable objects, as many per process as there are), in rank order, on every process."""
        if self.world_size == 1:
            return list(rows)
        parts: list[list[T] | None] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, list(rows))
        return [row for part in parts for row in part or ()]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            torch.distributed.barrier()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on a GPU, resident in the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
