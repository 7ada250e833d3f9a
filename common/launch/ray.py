"""`launch.engine: ray`: a stage's script, checked here, then run by workers of a Ray cluster through Ray Train.

The workers call the same script with the same command line, each as one of several processes, as under torchrun. What this adds: the
cluster, a way for words and signals between them and this process, and a new start from the last checkpoint where a worker was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.launch.ray_cluster import cluster
from common.launch.signals import StopSignals
from common.schema import LaunchSettings


def train_on_ray(
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    launch: LaunchSettings,
    *,
    root: Path,
    resumed: Path | None,
    timeout_s: float,
) -> int:
    """Run `main(argv)`, a function of a module, in as many workers as `launch` says; returns the exit code.

    root: the folder that runs lie in. resumed: the run that goes on. timeout_s: how long workers wait for one another.
    Raises UserError where the cluster has no room or the workers find a problem; `Stopped` where a second SIGINT ends them without a save.
    """
    with StopSignals() as signals, cluster(launch, signals) as scratch:
        from common.launch import ray_driver  # Ray reads its environment when it is imported

        return ray_driver.train(main, argv, launch, signals, scratch, root=root, resumed=resumed, timeout_s=timeout_s)
