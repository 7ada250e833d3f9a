from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from common.errors import UserError
from common.followers import may_be_told_by_leader, tells_errors
from common.launch.runtime import Runtime, is_of_the_connection


def test_alone_every_operation_is_the_identity() -> None:
    runtime = Runtime.local("cpu")
    assert (runtime.rank, runtime.world_size, runtime.is_main, runtime.device) == (0, 1, True, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(runtime.sum(values), values)
    assert runtime.gather(("a", 1)) == ["a", 1]
    assert runtime.broadcast("a") == "a" and runtime.any(True) and not runtime.any(False)
    runtime.barrier()


def test_a_process_that_nobody_started_with_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in (None, "1"):
        if world_size is not None:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        with Runtime.start() as runtime:
            assert (runtime.rank, runtime.world_size) == (0, 1)
            assert not torch.distributed.is_initialized()


def test_what_a_launcher_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK and MASTER_PORT is not set"), Runtime.start():
        pass


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_of_more_processes_than_gpus_knows_it_before_they_meet(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"^3 processes were started on this machine, which has 2 GPUs; start 2 at most"), Runtime.start():
        pass


def two_processes(rank: int, folder: str) -> None:
    with Runtime.start(timeout_s=60) as runtime:
        with Runtime.start() as joined:  # the group is there already, and stays
            assert joined == runtime
        mine = torch.tensor([1.0, 10.0]) * (rank + 1)
        total = runtime.sum(mine)
        runtime.barrier()
        rows = runtime.gather([f"{rank}.{number}" for number in range(3 * rank)])  # none on rank 0
        shared = (runtime.broadcast({"rank": rank}), runtime.any(rank == 1), runtime.any(rank == 2))
        told = f"{total.tolist()} {mine.tolist()} {rows} {runtime.is_main} {shared}"
    assert not torch.distributed.is_initialized()
    (Path(folder) / str(rank)).write_text(told)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_processes(count: int, function: Callable[[int, str], None], folder: Path) -> None:
    """Run `function(rank, folder)` in so many processes that can meet, forked so that torch is imported once."""
    common = {"WORLD_SIZE": str(count), "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}

    def launched(rank: int) -> None:
        os.environ |= {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        function(rank, str(folder))

    torch.multiprocessing.start_processes(launched, nprocs=count, start_method="fork")


def test_two_processes_add_up_and_gather_in_rank_order(tmp_path: Path) -> None:
    in_processes(2, two_processes, tmp_path)
    same = "({'rank': 0}, True, False)"
    assert (tmp_path / "0").read_text() == f"[3.0, 30.0] [1.0, 10.0] ['1.0', '1.1', '1.2'] True {same}"
    assert (tmp_path / "1").read_text() == f"[3.0, 30.0] [2.0, 20.0] ['1.0', '1.1', '1.2'] False {same}"


def one_leaves(rank: int, folder: str) -> None:
    try:
        with Runtime.start(timeout_s=60) as runtime:
            runtime.barrier()
            if rank == 1:
                os._exit(0)
            runtime.sum(torch.ones(1))
    except UserError as error:
        (Path(folder) / str(rank)).write_text(str(error))


def test_a_process_that_ended_is_told_as_what_it_is(tmp_path: Path) -> None:
    in_processes(2, one_leaves, tmp_path)
    assert "a process of this training ended, or did not answer within 60 seconds" in (tmp_path / "0").read_text()


def each_fails(rank: int, folder: str) -> None:
    """The first and the third of three processes find the same, the second something else; the fourth finds nothing in time."""
    try:
        with Runtime.start(timeout_s=60) as runtime:
            runtime.barrier()
            if rank == 3:
                runtime.sum(torch.ones(1))
            raise UserError("own" if rank == 1 else "both")
    except UserError as error:
        said = error.problems if tells_errors() else ()
        (Path(folder) / str(rank)).write_text(f"{said} {may_be_told_by_leader()}")


def test_what_ends_several_processes_is_told_by_one(tmp_path: Path) -> None:
    in_processes(4, each_fails, tmp_path)
    told = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert told[:3] == ["('both', 'own') False", "() False", "() False"]
    assert "a process of this training ended" in told[3]


def one_fails(rank: int, folder: str) -> None:
    try:
        with Runtime.start(timeout_s=60) as runtime:
            runtime.barrier()
            if rank == 1:
                raise UserError("own")
            runtime.sum(torch.ones(1))
    except UserError as error:
        (Path(folder) / str(rank)).write_text(f"{error.problems if tells_errors() else ()} {may_be_told_by_leader()}")


def test_what_ends_one_process_is_told_by_it(tmp_path: Path) -> None:
    in_processes(2, one_fails, tmp_path)
    assert (tmp_path / "1").read_text() == "('own',) False"
    assert "a process of this training ended" in (tmp_path / "0").read_text()


@pytest.mark.parametrize("text", ["DataLoader timed out after 5 seconds", "CUDA error: unspecified launch failure in connection with NCCL"])
def test_errors_that_only_sound_like_it_are_none_of_the_connection(text: str) -> None:
    assert not is_of_the_connection(RuntimeError(text))
    assert is_of_the_connection(torch.distributed.DistBackendError(text))
