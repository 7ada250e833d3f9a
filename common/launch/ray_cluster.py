"""The Ray cluster that a training runs on: one of its own on this machine, or one to join. Only peers that show a token are answered."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc

from common.errors import UserError
from common.launch import ray_watchdog
from common.launch.signals import Stopped, StopSignals
from common.launch.workers import token_file
from common.parallel import cores
from common.run_lock import LOCK_FILE, hold, release, remove_if_left
from common.schema import LaunchSettings

_FOLDER = "rlhf-qa-ray-"
_LONGEST_BASE = 16  # below it lie sockets, whose paths have 107 bytes, of which folders of ours and Ray's take 90
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing big goes through it: workers read files
_PROBE_S = 10.0
# What Ray says in the workers' words: nothing but errors; the run says the rest.
_QUIET = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # would write into the log, too, what is printed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
}


@contextlib.contextmanager
def cluster(launch: LaunchSettings, signals: StopSignals) -> Iterator[Path]:
    """Inside, this process is connected to the cluster that `launch` names; yields a folder for what need not outlive the run.

    Raises UserError where the cluster cannot be joined, or would answer anyone; `Stopped` where a second SIGINT ends it.
    """
    os.environ.update(_QUIET, RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
    with scratch_folder() as folder:
        arguments = _own_cluster(folder) if launch.address is None else {"address": _checked_address(launch.address)}
        import ray  # reads its environment now

        ray._private.worker.print_to_stdstream = lambda *_, **__: None  # of lost workers, in a paragraph; the run has a line
        try:
            try:
                ray.init(**arguments, log_to_driver=False, logging_level="CRITICAL")
            except Exception as error:  # of any class: a start that takes too long is a plain one
                raise UserError(f"launch: no Ray cluster: {' '.join(str(error).split())[:300]}") from error
            finally:
                signals.install()
            try:
                yield folder
            finally:
                ray.shutdown()
        except SystemExit:  # of a second SIGINT, whose code Ray loses; or Ray's answer to a SIGTERM that comes while it starts
            raise Stopped(130 if signals.insisted else 143) from None


def _own_cluster(folder: Path) -> dict[str, object]:
    """Arguments of `ray.init` for a cluster on the loopback interface, with a token that nobody else can read."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before the file
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let everything else on the machine go first
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps loopback as it is; Ray would take an address that others reach
    return {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder / "ray"),  # Ray opens it to everyone; the folder above stays closed
        "num_cpus": cores(),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }


def _checked_address(address: str) -> str:
    """`HOST:PORT` of the cluster to join, which knows our token and refuses others. Raises UserError."""
    from ray._private.utils import read_ray_address

    given = (os.environ.get("RAY_ADDRESS") or read_ray_address()) if address == "auto" else address
    if not given:
        raise UserError("launch.address: got auto, but no cluster runs on this machine and RAY_ADDRESS is not set")
    if os.environ.get("RAY_USE_TLS") not in ("1", "true"):  # certificates would have to be shown to look
        _probe(given)
    return given


def _probe(address: str) -> None:
    """Ask a cluster for a sign of life, without our token and with it. Raises UserError where the former is answered, the latter not."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")

        def answer(metadata: list[tuple[str, str]]) -> grpc.StatusCode:
            try:
                ask(b"", timeout=_PROBE_S, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        code = answer([])
        if code is grpc.StatusCode.OK:
            raise UserError(
                f"launch.address: the cluster at {address} answers anyone; start it with RAY_AUTH_MODE=token (docs/ray.md has the commands)"
            )
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(f"launch.address: no Ray cluster answers at {address} ({code.name.lower()}); ray start --head starts one")
        if answer([("authorization", f"Bearer {_token()}")]) is not grpc.StatusCode.OK:
            raise UserError(f"launch.address: the cluster at {address} has another token than this machine's")


def _token() -> str:
    return os.environ.get("RAY_AUTH_TOKEN") or token_file().read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process alone. At its end, however that comes, a cluster that has it ends and it is removed.

    Those that an earlier process has left behind (the machine went down, say) are removed first.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) > _LONGEST_BASE:
        base = Path("/tmp")
    for left in base.glob(f"{_FOLDER}*"):
        if _is_own_folder(left):
            remove_if_left(left, left / LOCK_FILE, partial(shutil.rmtree, ignore_errors=True))
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=base)).resolve()  # as processes name the files that they write
    held = hold(folder / LOCK_FILE)
    command = [sys.executable, "-I", ray_watchdog.__file__, str(folder)]
    # in a session of its own, where no Ctrl-C reaches it
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield folder
    finally:
        ray_watchdog.end(folder)
        release(held)
        watchdog.communicate(ray_watchdog.ENDED)


def _is_own_folder(path: Path) -> bool:
    """Whether this is a folder, no link to one, that belongs to this user; anyone may make such names there."""
    with contextlib.suppress(OSError):  # another process removes it just now
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return False
