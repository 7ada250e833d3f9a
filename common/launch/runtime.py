"""What PPO knows about other processes: rank, sums, gathered lists, barriers. One process needs no process group."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from common.errors import UserError
from common.followers import local_rank, met

T = TypeVar("T")
TIMEOUT_S = 600.0
"""Seconds that processes wait for one another, where no setting says."""
_BUCKET = 2**23
"""Numbers that are summed over processes in one go."""
_LOOPBACK = ("127.", "localhost", "::1")


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
            raise UserError(f"WORLD_SIZE is {started}, but this trainer is alone: give it a runtime, as Runtime.start makes them")
        return cls(device=torch.device(device) if device is not None else best_device())

    @classmethod
    @contextlib.contextmanager
    def start(cls, *, timeout_s: float = TIMEOUT_S) -> Iterator[Runtime]:
        """This process among those that were started with it; the device is the GPU of its local rank, or the CPU.

        Joins a process group that is there already (of Ray Train, say); else makes one where a launcher (torchrun, accelerate) set
        WORLD_SIZE and its companions, and destroys it at the end; else the process is alone. Other processes are waited for `timeout_s`
        seconds; where one of them is gone by then, UserError is raised in the others.
        """
        made = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not made and not distributed.is_initialized():
            yield cls(device=best_device())
            return
        device = _device_of_local_rank()
        try:
            if made:
                _make_group(device, timeout_s)
            met()
            yield cls(device, distributed.get_rank(), distributed.get_world_size())
        except (RuntimeError, TimeoutError) as error:
            if not is_of_the_connection(error):
                raise
            raise UserError(
                f"a process of this training ended, or did not answer within {timeout_s:g} seconds; --resume goes on from the last "
                f"checkpoint ({' '.join(str(error).split())[:160]})"
            ) from error
        finally:
            if made and distributed.is_initialized():
                distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over processes; the argument stays as it is."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone().to(self.device)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """As `sum`, of many tensors at once, whose contents are replaced; many small ones travel together."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            bucket: list[Tensor] = []
            size = 0
            for tensor in [*(tensor for tensor in tensors if tensor.dtype == dtype), None]:
                if bucket and (tensor is None or size + tensor.numel() > _BUCKET):
                    total = self.sum(torch.cat([part.reshape(-1) for part in bucket]))
                    for part, summed in zip(bucket, total.split([part.numel() for part in bucket]), strict=True):
                        part.copy_(summed.view_as(part))
                    bucket, size = [], 0
                if tensor is not None:
                    bucket.append(tensor)
                    size += tensor.numel()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(float(flag))))

    def gather(self, rows: Sequence[T]) -> list[T]:
        """Everyone's rows (picklable objects, as many per process as there are), in rank order, on every process."""
        if self.world_size == 1:
            return list(rows)
        parts: list[list[T] | None] = [None] * self.world_size
        distributed.all_gather_object(parts, list(rows))
        return [row for part in parts for row in part or ()]

    def broadcast(self, value: T) -> T:
        """What the main process has (picklable), on every process."""
        if self.world_size == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            distributed.barrier()


def is_of_the_connection(error: BaseException) -> bool:
    """Whether an error says that other processes are gone or do not answer."""
    words = ("gloo", "nccl", "connection", "timeout", "timed out")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def _device_of_local_rank() -> torch.device:
    local, count = local_rank(), torch.cuda.device_count()
    if count == 0 or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if local >= count and distributed.is_initialized():
        local = torch.cuda.current_device()  # whoever made the group shows each process its own GPU alone
    elif here > count and not distributed.is_initialized():  # all of them find it, so that the one that speaks says it
        raise UserError(
            f"{here} processes were started on this machine, which has {count} GPU{'s' if count > 1 else ''}; "
            f"start {count} at most, or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _make_group(device: torch.device, timeout_s: float) -> None:
    """Meet the others, at MASTER_ADDR. Raises UserError where no launcher says which of them this is."""
    needed = ("RANK", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} is not set; start it with torchrun")
    if os.environ.setdefault("MASTER_ADDR", "127.0.0.1").startswith(_LOOPBACK):
        interface = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)  # left alone, torch listens where other machines reach it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_s))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use so far: allocated on a GPU, resident in the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
