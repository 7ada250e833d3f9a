"""What the `launch` section asks for, against what runs. No torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError
from common.followers import launched, world_size
from common.schema import LaunchSettings, RunSettings, TrainingSettings

WORKER_VARIABLE = "RLHF_QA_RAY_WORKER"


def starts_ray(launch: LaunchSettings) -> bool:
    """Whether this process is to start Ray workers and leave the training to them; false in such a worker."""
    return launch.engine == "ray" and WORKER_VARIABLE not in os.environ


def check_launch(launch: LaunchSettings, *, dry_run: bool = False) -> None:
    """Raise UserError where accelerate started one process instead of several.

    Also where Ray is asked for and missing, cannot be told from torchrun, or would join a cluster without a token.
    """
    by_accelerate = any(name.startswith("ACCELERATE_") for name in os.environ)
    if by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; start them with torchrun "
            "--nproc_per_node N, or ask for one"
        )
    if not starts_ray(launch):
        return
    problems = []
    if dry_run:
        problems.append("command line: --dry_run measures without Ray; add launch.engine=local launch.num_training_workers=null")
    if find_spec("ray") is None:
        problems.append("launch.engine: got ray, which is not installed here; pip install -r requirements-ray.txt")
    if launched():
        problems.append("launch.engine: got ray, which starts its workers itself, but WORLD_SIZE is set; start the script with python")
    mode, address = os.environ.get("RAY_AUTH_MODE", "token"), launch.address
    if mode != "token":
        problems.append(f"RAY_AUTH_MODE is {mode}, so that whoever reaches the cluster may run code on it; unset it or set it to token")
    if address is not None and "://" in address:
        problems.append(f"launch.address: got {address}, expected HOST:PORT or auto; start the script on a machine of the cluster")
    elif address is not None and not (os.environ.get("RAY_AUTH_TOKEN") or token_file().is_file()):
        problems.append(f"launch.address: got {address}, but no token to join it with; RAY_AUTH_TOKEN_PATH names its file (docs/ray.md)")
    if problems:
        raise UserError(*problems)


def token_file() -> Path:
    """Where Ray looks for the token of a cluster to join, if RAY_AUTH_TOKEN is not set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def check_number_of_workers(launch: LaunchSettings, running: int) -> None:
    """Raise UserError where another number of processes trains together than `launch` asks for."""
    asked = launch.num_training_workers
    if asked is not None and asked != running:
        raise UserError(
            f"launch.num_training_workers: got {asked}, but {running} process{'es train' if running > 1 else ' trains'}; start as many, "
            "set it to null, or let Ray start them (launch.engine: ray)"
        )


def processes_to_train(config: RunSettings) -> int | None:
    """Processes that will train together; None where it depends on the GPUs that are here."""
    if starts_ray(config.launch):
        return config.launch.num_training_workers
    if launched() or not isinstance(config, TrainingSettings):
        return world_size()
    devices = config.trainer.params.get("devices", 1)
    return devices if type(devices) is int and devices > 0 and not getattr(config, "use_multi_gpu_if_available", False) else None


def idle_launch_settings(launch: LaunchSettings) -> list[str]:
    """Notes on settings of Ray under `engine: local`."""
    default = LaunchSettings()
    idle = [
        f"launch.{name}" for name in ("address", "resources_per_worker", "max_failures") if getattr(launch, name) != getattr(default, name)
    ]
    return [f"{', '.join(idle)}: without effect, since launch.engine is local"] if idle and launch.engine == "local" else []
