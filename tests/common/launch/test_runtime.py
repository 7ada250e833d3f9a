from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.multiprocessing

from common.launch.runtime import Runtime


def test_alone_every_operation_is_the_identity() -> None:
    runtime = Runtime.local("cpu")
    assert (runtime.rank, runtime.world_size, runtime.is_main, runtime.device) == (0, 1, True, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(runtime.sum(values), values)
    assert runtime.gather(("a", 1)) == ["a", 1]
    runtime.barrier()


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=2)
        mine = torch.tensor([1.0, 10.0]) * (rank + 1)
        total = runtime.sum(mine)
        runtime.barrier()
        rows = runtime.gather([f"{rank}.{number}" for number in range(3 * rank)])  # none on rank 0
        (Path(folder) / str(rank)).write_text(f"{total.tolist()} {mine.tolist()} {rows} {runtime.is_main}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_add_up_and_gather_in_rank_order(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, args=(port, str(tmp_path)), nprocs=2)
    assert (tmp_path / "0").read_text() == "[3.0, 30.0] [1.0, 10.0] ['1.0', '1.1', '1.2'] True"
    assert (tmp_path / "1").read_text() == "[3.0, 30.0] [2.0, 20.0] ['1.0', '1.1', '1.2'] False"
