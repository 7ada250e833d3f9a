"""What the `launch` section asks for, against what runs. No torch."""

from __future__ import annotations

from common.errors import UserError
from common.schema import LaunchSettings


def check_number_of_workers(launch: LaunchSettings, running: int) -> None:
    """Raise UserError where another number of processes trains together than `launch` asks for."""
    asked = launch.num_training_workers
    if asked is not None and asked != running:
        raise UserError(
            f"launch.num_training_workers: got {asked}, but {running} process{'es train' if running > 1 else ' trains'}; start as many, "
            "set it to null, or let Ray start them (launch.engine: ray)"
        )


def idle_launch_settings(launch: LaunchSettings) -> list[str]:
    """Notes on settings of Ray under `engine: local`."""
    default = LaunchSettings()
    idle = [
        f"launch.{name}" for name in ("address", "resources_per_worker", "max_failures") if getattr(launch, name) != getattr(default, name)
    ]
    return [f"{', '.join(idle)}: without effect, since launch.engine is local"] if idle and launch.engine == "local" else []
