"""What PPO knows about other processes: rank, sums, gathered lists, barriers. One process needs no process group."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from common.errors import UserError
from common.followers import asked_leader, local_rank, met, world_size

T = TypeVar("T")
TIMEOUT_S = 600.0
"""Seconds that processes wait for one another, where no setting says."""
_TOGETHER_S = 3.0
"""How far apart processes may be that end for the same reason."""
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
        if world_size() > 1:
            raise UserError(f"WORLD_SIZE is {world_size()}, but this trainer is alone: give it a runtime, as Runtime.start makes them")
        return cls(device=torch.device(device) if device is not None else best_device())

    @classmethod
    @contextlib.contextmanager
    def start(cls, *, timeout_s: float = TIMEOUT_S) -> Iterator[Runtime]:
        """This process among those that were started with it; the device is the GPU of its local rank, or the CPU.

        Joins a process group that is there already (of Ray Train, say); else makes one where a launcher (torchrun, accelerate) set
        WORLD_SIZE and its companions, and destroys it at the end; else the process is alone. Other processes are waited for `timeout_s`
        seconds; where one of them is gone by then, UserError is raised in the others. A UserError that ends several of them is told by the
        main one alone, with all their problems.
        """
        made = not distributed.is_initialized() and world_size() > 1
        if not made and not distributed.is_initialized():
            yield cls(device=best_device())
            return
        device = _device_of_local_rank()
        try:
            if made:
                _make_group(device, timeout_s)
            met()
            yield cls(device, distributed.get_rank(), distributed.get_world_size())
        except UserError as error:
            if made and distributed.is_initialized() and not is_of_the_connection(error):
                _tell_together(error)
            raise
        except RuntimeError as error:
            if not is_of_the_connection(error):
                raise
            raise UserError(
                f"a process of this training ended, or did not answer within {timeout_s:g} seconds; --resume goes on from the last "
                f"checkpoint ({' '.join(str(error).split()).partition('. ')[0][:160]})"
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
    """Whether an error, or what caused it, says that other processes are gone or do not answer.

    Stores, NCCL and torch's own checks have classes for it. Gloo's errors are plain RuntimeErrors, which begin with where it was found.
    """
    cause = error.__cause__ or error
    return isinstance(cause, distributed.DistError) or (isinstance(cause, RuntimeError) and "gloo/transport/" in str(cause))


def _tell_together(error: UserError) -> None:
    """Give the main process the problems of those that end within moments of one another; the others then need not say theirs."""
    store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
    latest = time.monotonic() + _TOGETHER_S
    try:
        store.set(f"problems/{rank}", json.dumps(error.problems))
        if rank > 0:
            store.wait([f"told/{rank}"], timedelta(seconds=_TOGETHER_S))
            asked_leader(tells=True)
            return
        problems = list(error.problems)
        for other in range(1, distributed.get_world_size()):
            with contextlib.suppress(distributed.DistError):  # that one has not ended
                store.wait([f"problems/{other}"], timedelta(seconds=max(0.001, latest - time.monotonic())))
                problems += json.loads(store.get(f"problems/{other}"))
                store.set(f"told/{other}", "")
                store.get(f"told/{other}")  # the answer says that it was sent before this process ends
        error.problems = tuple(dict.fromkeys(problems))
    except distributed.DistError:
        asked_leader(tells=False)


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
        raise UserError(f"WORLD_SIZE is {world_size()}, but {' and '.join(missing)} is not set; start it with torchrun")
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
