"""Where metrics go, and the classic `PPOTrainer.log_stats`."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.notes import say
from common.runs import create_run_directory
from common.schema import WandbSettings
from common.tracking import Tracker

if TYPE_CHECKING:
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer

MONITOR = "eval/penalised_score"
RUNS_FOLDER = "runs"


def start_tracker(
    config: PPOConfig,
    directory: Path,
    resolved: Mapping[str, Any],
    *,
    wandb: WandbSettings | None = None,
    tensorboard: bool = False,
) -> Tracker:
    """Metrics to files in `directory`; by `config.log_with` to wandb (with these settings) or TensorBoard too."""
    used: WandbSettings | None = None
    if config.log_with == "wandb":
        used = wandb or WandbSettings()
        if config.tracker_project_name is not None:
            used = used.model_copy(update={"project_name": config.tracker_project_name})
    return Tracker.start(
        directory,
        stage="rlhf",
        config=resolved,
        wandb=used,
        tensorboard=tensorboard or config.log_with == "tensorboard",
        directions={MONITOR: "max"},
        init_arguments=dict(config.tracker_kwargs.get("wandb", config.tracker_kwargs)),
    )


def own_tracker(config: PPOConfig, *, is_main: bool) -> Tracker | None:
    """The tracker of a trainer whose config asks for one, in a run directory of its own; closed when the process ends."""
    folder = config.project_kwargs.get("logging_dir") or config.project_kwargs.get("project_dir")
    if config.log_with is None and folder is None:
        return None
    if not is_main:
        return Tracker(Path(), is_main=False)
    directory = create_run_directory(Path(folder or RUNS_FOLDER).absolute(), config.exp_name)
    print(f"metrics: {directory}")
    tracker = start_tracker(config, directory, {"ppo_config": asdict(config)})
    atexit.register(tracker.finish)
    return tracker


def log_stats(
    trainer: PPOTrainer,
    stats: Mapping[str, Any],
    batch: Mapping[str, Sequence[Any]],
    rewards: Sequence[float] | Sequence[Tensor] | Tensor,
    columns_to_log: Iterable[str] = ("query", "response"),
) -> None:
    """Log what `step` returned, the rewards' `env/reward_mean`, `_std` and `_dist`, and the answers as the table `game_log`.

    `batch`: columns with one value per answer, those in `columns_to_log` enter the table beside `reward`. Everything goes into the files of
    a run (`config.project_kwargs`) and to `config.log_with`; distributions to the latter alone. Raises ValueError where columns are
    missing or differ in length.
    """
    columns = list(columns_to_log)
    if missing := [name for name in columns if name not in batch]:
        raise ValueError(f"log_stats: batch has no {', '.join(missing)}, there are {', '.join(map(str, batch))}; pass columns_to_log")
    own = [float(reward) for reward in rewards]
    for name in columns:
        if len(batch[name]) != len(own):
            raise ValueError(f"log_stats: {name} has {len(batch[name])} values for {len(own)} rewards")
    rows = trainer.runtime.gather([[*map(_plain, row)] for row in zip(*(batch[name] for name in columns), own, strict=True)])
    tracker, step = trainer.tracker, trainer.steps_done
    if tracker is None:
        if step <= 1:
            say("log_stats logs nothing: PPOConfig(log_with=…) names a tracker, project_kwargs={'logging_dir': FOLDER} a folder")
        return
    scores = torch.tensor([row[-1] for row in rows])
    figures = {name: float(value) for name, value in stats.items() if not isinstance(value, Tensor) or value.ndim == 0}
    figures["env/reward_mean"] = float(scores.mean())
    figures["env/reward_std"] = float(scores.std()) if len(scores) > 1 else 0.0
    tracker.log(figures, step)
    for name, value in {**stats, "env/reward_dist": scores}.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            tracker.histogram(name, value.tolist(), step)
    tracker.table("game_log", [*columns, "reward"], rows, step)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
