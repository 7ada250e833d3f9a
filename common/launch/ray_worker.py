"""What happens in a Ray worker: it meets the others, runs a stage's script as one of them, and reports to the process that started it."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch import distributed

from common.errors import UserError, user_problems
from common.launch.runtime import is_of_the_connection
from common.launch.signals import Stopped, request_stop
from common.launch.workers import WORKER_VARIABLE
from common.runs import tell_new_runs

_SEND_EVERY_S = 0.1


@dataclass(frozen=True)
class Order:
    """What a worker is to do: `main(argv)`, the stage's script, in the folder `cwd`.

    marker: a file that it sees where it sees the folder of runs.
    """

    main: Callable[[Sequence[str]], int]
    argv: tuple[str, ...]
    cwd: Path
    environment: dict[str, str]
    threads: int
    marker: Path
    mailbox: Any


class WorkerFailed(Exception):
    """How a worker ended that could not do its part. `lost`: because another one is gone."""

    def __init__(self, problems: Sequence[str], lost: bool) -> None:
        super().__init__(tuple(problems), lost)
        self.problems, self.lost = tuple(problems), lost


def work(config: dict[str, Order]) -> int:
    """One worker's part of a training; returns its exit code. Raises WorkerFailed where the user, or another worker, is the reason."""
    order, rank = config["order"], int(os.environ["RANK"])
    os.environ.update(order.environment)
    os.environ[WORKER_VARIABLE] = "1"
    os.environ["OMP_NUM_THREADS"] = str(order.threads)  # of processes that this one starts
    torch.set_num_threads(order.threads)
    threading.Thread(target=_await_stop, args=(order.mailbox,), daemon=True).start()
    with contextlib.ExitStack() as stack:
        if rank == 0:
            out: io.TextIOBase = stack.enter_context(_Sender(order.mailbox, "stdout"))
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(_Sender(order.mailbox, "stderr"))))
            tell_new_runs(lambda run_dir: ray.get(order.mailbox.send.remote("run", str(run_dir))))
        else:
            out = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(out))
        try:
            _check_files(order)
            os.chdir(order.cwd)
            return order.main(order.argv)
        except Stopped as stopped:
            return int(stopped.code or 0)
        except Exception as error:
            problems, lost = user_problems(error), is_of_the_connection(error)
            if problems is None and not lost:
                raise
            raise WorkerFailed(problems or [" ".join(str(error).split())], lost) from None


def _check_files(order: Order) -> None:
    if not order.marker.is_file():
        raise UserError(
            f"launch.storage_path: {order.marker.parent} of {socket.gethostname()} is not that of the machine that starts the run; "
            "choose a folder that all machines share"
        )


def _await_stop(mailbox: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        request_stop(ray.get(mailbox.stopped.remote()))


class _Sender(io.TextIOBase):
    """A stream whose text appears where the training was started, in whole lines: notes are known there by theirs."""

    def __init__(self, mailbox: Any, name: str) -> None:
        self._mailbox, self._name = mailbox, name
        self._text: list[str] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> _Sender:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ends.set()
        self._thread.join()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text.append(text)
        return len(text)

    def _send(self) -> None:
        ended, rest = False, ""
        while not ended:
            ended = self._ends.wait(_SEND_EVERY_S)
            count = len(self._text)
            text = rest + "".join(self._text[:count])
            del self._text[:count]
            whole = len(text) if ended else max(text.rfind("\n"), text.rfind("\r")) + 1
            text, rest = text[:whole], text[whole:]
            if text:
                ray.get(self._mailbox.send.remote(self._name, text))


@dataclass
class MeetingConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """The process group of the workers, on the network interface that has Ray's address, loopback in a cluster of one machine."""

    gpu: bool = False

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Meeting


class _Meeting(_TorchBackend):  # type: ignore[misc]
    """Ray's own would let torch listen on every interface, and what comes in there is unpickled."""

    def on_start(self, worker_group: Any, backend_config: MeetingConfig) -> None:
        host, port = worker_group.execute_single(0, _open_store)
        worker_group.execute(_prepare, host, port, backend_config.gpu)
        if len(worker_group) > 1:
            worker_group.execute(_join, host, port, backend_config)


_store: Any = None  # of the worker that holds it


def _open_store() -> tuple[str, int]:
    """Make the store that the workers meet at, listening where Ray does; returns host and port."""
    global _store
    host = ray.util.get_node_ip_address()
    bound = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port: int = bound.getsockname()[1]
    _store = distributed.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=bound.detach())  # type: ignore[attr-defined]
    return host, port


def _prepare(host: str, port: int, gpu: bool) -> None:
    """Say in the environment who this worker is, as torchrun does, and which interface its messages take."""
    _set_torch_distributed_env_vars()
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    own = ray.util.get_node_ip_address()
    interfaces = [name for name, found in psutil.net_if_addrs().items() if any(entry.address == own for entry in found)]
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interfaces:
            os.environ.setdefault(name, interfaces[0])
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _join(host: str, port: int, config: MeetingConfig) -> None:
    timeout = timedelta(seconds=config.timeout_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store if rank == 0 else distributed.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if config.gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
