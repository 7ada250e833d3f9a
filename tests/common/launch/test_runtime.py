from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from common.errors import UserError
from common.launch.runtime import Runtime


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


def two_processes(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
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


def test_two_processes_add_up_and_gather_in_rank_order(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(two_processes, args=(free_port(), str(tmp_path)), nprocs=2)
    same = "({'rank': 0}, True, False)"
    assert (tmp_path / "0").read_text() == f"[3.0, 30.0] [1.0, 10.0] ['1.0', '1.1', '1.2'] True {same}"
    assert (tmp_path / "1").read_text() == f"[3.0, 30.0] [2.0, 20.0] ['1.0', '1.1', '1.2'] False {same}"


def one_leaves(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        with Runtime.start(timeout_s=60) as runtime:
            runtime.barrier()
            if rank == 1:
                os._exit(0)
            runtime.sum(torch.ones(1))
    except UserError as error:
        (Path(folder) / str(rank)).write_text(str(error))


def test_a_process_that_ended_is_told_as_what_it_is(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_leaves, args=(free_port(), str(tmp_path)), nprocs=2)
    assert "a process of this training ended, or did not answer within 60 seconds" in (tmp_path / "0").read_text()
