"""Holds a Ray cluster as a run of one machine starts it, runs small functions in its workers, and tells what came of it.

    python -m tests.ray_holder FOLDER

Writes FOLDER/told.json, then keeps the cluster until it is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from common.errors import UserError
from common.launch.ray_cluster import cluster
from common.launch.signals import StopSignals
from common.schema import LaunchSettings, WorkerResources
from tests.ray_workers import add_up_and_wait, listening

LAUNCH = LaunchSettings(engine="ray", num_training_workers=2)


class StopWhenHeard(io.StringIO):
    """Keeps what is printed, and sends this process a SIGTERM once a worker says that it waits."""

    def write(self, text: str) -> int:
        if "waits" in text:
            os.kill(os.getpid(), 15)
        return super().write(text)


def family(secret: str) -> tuple[list[int], dict[str, list[str]], list[str]]:
    """Ids of the cluster's processes, where those and this one listen, and which have the secret in their arguments."""
    ids, places, showing = [], {}, []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has just ended
            places[f"{process.name()} {process.pid}"] = listening(process)
            showing += [process.name()] * any(secret in word for word in process.cmdline())
            ids.append(process.pid)
    return ids[1:], places, showing


def main(folder: Path) -> None:
    told: dict[str, object] = {}
    os.environ["RAY_AUTH_TOKEN"] = "of another cluster"
    with StopSignals(tells=False) as signals, cluster(LAUNCH, signals) as scratch:
        from common.launch import ray_driver

        def run(name: str, main: Callable[[Sequence[str]], int], launch: LaunchSettings, out: io.StringIO | None = None) -> None:
            out, err, problems, code = out or io.StringIO(), io.StringIO(), [], None
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = ray_driver.train(main, [str(folder)], launch, signals, scratch, root=folder / "runs", resumed=None, timeout_s=60)
                except UserError as error:
                    problems = list(error.problems)
            told[name] = {"code": code, "problems": problems, "out": out.getvalue(), "err": err.getvalue()}

        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        told["token"] = {"path": str(token), "mode": oct(token.stat().st_mode & 0o777), "folder": oct(token.parent.stat().st_mode & 0o777)}
        told["address"] = ray_driver.ray.get_runtime_context().gcs_address
        run("no room", add_up_and_wait, LAUNCH.model_copy(update={"num_training_workers": 1000}))
        run("no machine", add_up_and_wait, LAUNCH.model_copy(update={"resources_per_worker": WorkerResources(CPU=1000, GPU=1)}))
        run("stopped", add_up_and_wait, LAUNCH, StopWhenHeard())
        told["processes"], told["listening"], told["showing the token"] = family(token.read_text())
        told["usage"] = [str(path) for path in scratch.rglob("usage_stats.json")]
        (folder / "told.part").write_text(json.dumps(told))
        (folder / "told.part").rename(folder / "told.json")
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
