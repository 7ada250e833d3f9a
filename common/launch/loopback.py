"""Where the processes of one training meet: at a port of this machine that no other one reaches.

Left alone, torch listens on every interface, and what comes in there is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

_ADDRESS = "127.0.0.1"
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_stores: list[Any] = []  # process groups ask theirs until the very end of a process


@contextlib.contextmanager
def meeting_on_loopback() -> Iterator[None]:
    """Process groups that this process and those started by it make inside, by `env://`, meet on the loopback interface.

    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME keep what the user has set them to.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    bound = socket.socket()
    bound.bind((_ADDRESS, 0))
    port = bound.getsockname()[1]
    _stores.append(TCPStore(_ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=bound.detach()))
    interfaces = {name: os.environ.get(name, _INTERFACE) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    # The last one is what torchrun says: the store is there already, and no process is to make another one.
    settled = {**interfaces, "MASTER_ADDR": _ADDRESS, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    before = {name: os.environ.pop(name, None) for name in settled}
    os.environ.update(settled)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
