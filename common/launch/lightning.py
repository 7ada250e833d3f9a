"""Lightning's trainer as this project uses it: the stage builds a module, two loaders and a way to save; this does the rest.

total_steps = total_optimizer_steps(config.trainer, len(train_loader))
trainer = build_trainer(config.trainer, run_dir=run_dir, tracker=tracker, seed=config.seed, save=save,
                        choices=config.monitored, total_steps=total_steps)
result = fit(trainer, module, train_loader, val_loader)
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader

from common.batching import limited
from common.closing import RunResult
from common.errors import UserError
from common.followers import follows, launched, local_rank, local_world_size, world_size
from common.launch.callbacks import (
    Checkpoints,
    ProgressReport,
    SetEpoch,
    StatelessDropout,
    TrackerLogger,
    TrainingMetrics,
    plan_sampler,
)
from common.launch.checkpointing import BEST, CheckpointKeeper, SaveFn
from common.launch.loopback import meeting_on_loopback
from common.launch.runtime import Runtime, is_of_the_connection, peak_memory_gib
from common.launch.sharded_strategy import ShardedStrategy
from common.launch.sharding import Sharding, accelerate_precision, accelerate_problems, fully_sharded, is_set, zero3
from common.launch.signals import Stopped, StopSignals
from common.resume import ResumePoint, refuse_other_processes
from common.schema import DataSettings, TrainerSettings
from common.tracking import Tracker
from common.training_state import check_start_weights, frozen_weights, load_trained_weights, weights_digest

SHARDINGS: dict[str, Callable[[Runtime], Sharding]] = {"fsdp": fully_sharded, "deepspeed": zero3}
"""Strategies under which no process has the whole model."""
STRATEGIES = ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", *SHARDINGS)
FLOAT16 = frozenset({16, "16", "16-mixed", "16-true"})
NOT_FLOAT32 = frozenset({"bf16-true", 64, "64", "64-true"})
"""Weights that train are of that type; DeepSpeed would train float32 copies of them."""


class LaunchedEnvironment(TorchElasticEnvironment):
    """Processes that a launcher started and told who they are, in RANK, LOCAL_RANK and WORLD_SIZE."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """`check_processes` has done so; machines of a Ray cluster may have different numbers of them."""


def trainer_params(settings: TrainerSettings) -> dict[str, Any]:
    """Arguments of `pl.Trainer` with this project's defaults: one epoch, on a GPU where there is one, one process or as many as a launcher
    started.

    `overfit_batches` becomes a limit of training batches (a number, not a share, limits validation too): Lightning would put a sampler of
    its own in place of the batch plan.
    """
    params = {"accelerator": "auto", "devices": 1, "enable_model_summary": False}
    if launched():
        params |= {"devices": local_world_size(), "num_nodes": max(1, world_size() // local_world_size())}
    params |= settings.params
    if launched() and params["devices"] in ("auto", -1, "-1"):
        params["devices"] = local_world_size()
    if params.get("log_every_n_steps") is None:
        params["log_every_n_steps"] = 50
    if overfit := params.pop("overfit_batches", 0):
        params["limit_train_batches"] = overfit
        if isinstance(overfit, int):
            params["limit_val_batches"] = overfit
    if params.get("max_epochs") is None and params.get("max_steps") in (None, -1):
        params["max_epochs"] = 1
    if params.get("strategy") in (None, "auto") and _all_processes(params) > 1:
        params["strategy"] = "ddp"
    return params


def batch_limit(settings: TrainerSettings) -> int | float | None:
    """Training batches of an epoch that Lightning uses, a number or a share of all; None: all of them."""
    params = trainer_params(settings)
    if fast := params.get("fast_dev_run"):
        return int(fast)
    limit: int | float | None = params.get("limit_train_batches")
    return limit


def _overfits(settings: TrainerSettings) -> bool:
    return bool(settings.params.get("overfit_batches"))


def on_cpu(params: Mapping[str, Any]) -> bool:
    accelerator = str(params.get("accelerator", "auto")).lower()
    if accelerator in {"auto", "gpu"}:
        return not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return accelerator == "cpu"


def training_device(settings: TrainerSettings) -> torch.device:
    """Where this process trains."""
    params = trainer_params(settings)
    if on_cpu(params):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        return torch.device("mps")
    devices = params["devices"]
    chosen = devices if isinstance(devices, list) and devices else range(torch.cuda.device_count())
    return torch.device("cuda", chosen[local_rank() % len(chosen)])  # a launcher may show each process its own GPU alone


def autocast_dtype(settings: TrainerSettings) -> torch.dtype | None:
    """The shorter type that `precision` lets a forward compute in; None: that of the weights."""
    precision = str(trainer_params(settings).get("precision"))
    return {"16": torch.float16, "16-mixed": torch.float16, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16}.get(precision)


def avoids_padding(settings: TrainerSettings, data: DataSettings) -> bool:
    """Whether models read batches without padding, where they can: on a GPU each row would start kernels of its own."""
    params = trainer_params(settings)
    return data.padding_free and on_cpu(params) and not data.on_tpu and params.get("strategy") not in SHARDINGS  # they run in step


def check_trainer(settings: TrainerSettings) -> None:
    """Refuse what Lightning would take silently or fail on late; call it before a model is loaded.

    Raises UserError with every problem found.
    """
    params = trainer_params(settings)
    problems = []
    if on_cpu(params) and params.get("precision") in FLOAT16:
        problems.append(f"trainer.params.precision: got {params['precision']!r}, which a CPU cannot train in; use bf16-mixed or 32")
    if str(params["accelerator"]).lower() in {"gpu", "cuda"} and on_cpu(params):
        problems.append(f"trainer.params.accelerator: got {params['accelerator']!r}, but there is no GPU here; use cpu or auto")
    elif not on_cpu(params):
        problems.extend(_device_problems(params["devices"]))
    if params.get("max_epochs") == -1 and params.get("max_steps") in (None, -1):
        problems.append("trainer.params.max_epochs: got -1 (no end); the learning-rate schedule needs an end, set max_steps")
    if problems:
        raise UserError(*problems)
    lightning_trainer({**params, "strategy": "ddp"} if params.get("strategy") in SHARDINGS else params)


def processes_of(settings: TrainerSettings) -> int:
    """Processes that train together, on all machines."""
    return _all_processes(trainer_params(settings))


def _all_processes(params: Mapping[str, Any]) -> int:
    return world_size() if launched() else _processes(params["devices"], on_cpu(params))


def batch_words(settings: TrainerSettings, batch_size: int) -> str:
    """The rows of an optimizer step, in words."""
    accumulate, processes = trainer_params(settings).get("accumulate_grad_batches", 1), processes_of(settings)
    return f"{batch_size} x {accumulate} rows" + (f" on each of {processes} devices" if processes > 1 else "")


def check_processes(settings: TrainerSettings, dry_run: bool = False) -> None:
    """Refuse other processes than the settings ask for, and what they could not do together. Raises UserError."""
    params = trainer_params(settings)
    devices, nodes = _processes(params["devices"], on_cpu(params)), int(params.get("num_nodes", 1))
    if launched() and world_size() > 1 and dry_run:
        raise UserError("--dry_run measures in one process, and counts trainer.params.devices of them; start it with python")
    if launched():
        machines = max(1, world_size() // local_world_size())
        problems = []
        if devices != local_world_size():
            problems.append(
                f"trainer.params.devices: got {params['devices']}, but {local_world_size()} processes were started on this machine; "
                "remove it, or start as many"
            )
        if nodes != machines:
            problems.append(f"trainer.params.num_nodes: got {nodes}, but processes were started on {machines}; remove it")
        problems += _accelerate_problems(params)
        if problems:
            raise UserError(*problems)
    elif nodes > 1:
        raise UserError(
            f"trainer.params.num_nodes: got {nodes}; to train on several machines, start the script on each of them with torchrun "
            f"(--nnodes {nodes} --nproc_per_node {devices} --rdzv_endpoint HOST:PORT)"
        )
    strategy = params.get("strategy")
    if processes_of(settings) > 1 and strategy not in STRATEGIES:
        raise UserError(f"trainer.params.strategy: got {strategy!r}, expected auto or one of {', '.join(STRATEGIES)}")
    if strategy in SHARDINGS:
        _check_sharding(strategy, params)


def _accelerate_problems(params: Mapping[str, Any]) -> list[str]:
    """A line for each thing that `accelerate launch` asks for and the trainer's settings do not: they are what counts."""
    problems = accelerate_problems()
    for variable, strategy in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")):
        if is_set(variable) and params.get("strategy") != strategy:
            problems.append(f"trainer.params.strategy: got {params.get('strategy')}, but accelerate asks for {strategy}; set it")
    precision, own = accelerate_precision(), str(params.get("precision") or 32)
    if precision != "no" and not own.startswith(precision.removeprefix("fp")):
        problems.append(
            f"trainer.params.precision: got {own}, but accelerate's mixed_precision is {precision}; set it, or let accelerate have no"
        )
    return problems


_MORE = "set trainer.params.devices (Ray: launch.num_training_workers) to 2 or more, or use auto"


def _check_sharding(strategy: str, params: Mapping[str, Any]) -> None:
    problems = []
    if _all_processes(params) == 1:
        problems.append(f"trainer.params.strategy: got {strategy}, but the run is one process; {_MORE}")
    if params.get("precision") in (FLOAT16 | NOT_FLOAT32 if strategy == "deepspeed" else FLOAT16):
        problems.append(f"trainer.params.precision: got {params['precision']!r}, expected bf16-mixed or 32 under strategy {strategy}")
    if params.get("gradient_clip_val") and params.get("gradient_clip_algorithm") == "value":
        problems.append(f"trainer.params.gradient_clip_algorithm: got value, expected norm under strategy {strategy}")
    if problems:
        raise UserError(*problems)


def on_all_gpus(settings: TrainerSettings) -> TrainerSettings:
    """The settings with every GPU of this machine, where it has several, `accelerator` takes them and no launcher has chosen."""
    count = torch.cuda.device_count()
    if count < 2 or launched() or on_cpu(trainer_params(settings)):
        return settings
    return settings.model_copy(update={"params": {**settings.params, "devices": count}})


def _processes(devices: Any, cpu: bool) -> int:
    """Processes per machine that a value of `devices` stands for."""
    if devices in ("auto", -1, "-1"):
        return 1 if cpu else torch.cuda.device_count()
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()]) if "," in devices else int(devices) if devices.isdigit() else 1
    return len(devices) if isinstance(devices, (list, tuple)) else int(devices)


def _device_problems(devices: Any) -> list[str]:
    present = torch.cuda.device_count()
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip().isdigit()]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, int) and devices > present:
        return [f"trainer.params.devices: got {devices}, but only {present} GPU(s) are present"]
    if isinstance(devices, list) and any(index >= present for index in devices):
        return [f"trainer.params.devices: got {devices}, but the {present} GPU(s) present are numbered 0 to {present - 1}"]
    return []


def total_optimizer_steps(settings: TrainerSettings, batches_per_epoch: int) -> int:
    """Optimizer steps of the whole training, for the learning-rate schedule; equals Lightning's own count.

    `batches_per_epoch` is the length of the training loader (per process). Raises UserError where no batch would be left.
    """
    params = trainer_params(settings)
    limit = batch_limit(settings)
    batches = limited(batches_per_epoch, limit)
    if params.get("fast_dev_run"):
        accumulate: int = params.get("accumulate_grad_batches", 1)
        return math.ceil(batches / accumulate)
    if batches < 1:
        name = "overfit_batches" if _overfits(settings) else "limit_train_batches"
        raise UserError(f"trainer.params.{name}: {limit} of {batches_per_epoch} training batches leaves none to train on")
    interval = params.get("val_check_interval")
    if type(interval) is int and interval > batches and params.get("check_val_every_n_epoch", 1) is not None:
        raise UserError(
            f"trainer.params.val_check_interval: got {interval}, but an epoch has {batches} batches; "
            "lower it, or set check_val_every_n_epoch: null to count batches across epochs"
        )
    per_epoch = math.ceil(batches / params.get("accumulate_grad_batches", 1))
    max_steps = params.get("max_steps", -1)
    by_epochs = math.inf if params.get("max_epochs") in (None, -1) else per_epoch * params["max_epochs"]
    total = min(by_epochs, math.inf if max_steps in (None, -1) else max_steps)
    assert total != math.inf, "check_trainer refuses a training without an end"
    return int(total)


def build_trainer(
    settings: TrainerSettings,
    *,
    run_dir: Path,
    tracker: Tracker,
    seed: int,
    save: SaveFn,
    choices: Iterable[str],
    total_steps: int,
    on_nan: str = "stop",
    resume: ResumePoint | None = None,
) -> pl.Trainer:
    """A `pl.Trainer` that logs to `tracker`, saves through `save(directory, metrics, step, extra)` and stops cleanly on signals.

    `choices` are the metrics that validation logs. `on_nan`: `stop` or `skip`. `resume`: where `fit` goes on. Raises UserError for settings
    that cannot work.
    """
    check_trainer(settings)
    params = trainer_params(settings)
    shows_progress = params.pop("enable_progress_bar", True)
    if processes_of(settings) > 1:
        timeout = timedelta(seconds=settings.process_timeout_s)
        if make := SHARDINGS.get(params["strategy"]):
            clip = params.pop("gradient_clip_val", None)
            params |= {"strategy": ShardedStrategy(make, clip=clip, timeout=timeout)}
        else:
            params["strategy"] = DDPStrategy(
                find_unused_parameters=params["strategy"].endswith("_true"), gradient_as_bucket_view=True, timeout=timeout
            )
        if launched():
            params["plugins"] = [LaunchedEnvironment()]
    logger = TrackerLogger(tracker)
    metrics = TrainingMetrics(tracker, total_steps, params["log_every_n_steps"], skips=on_nan == "skip")
    report = ProgressReport(metrics, total_steps, shows_progress and not follows())
    keeper = CheckpointKeeper.from_settings(run_dir, save, settings.checkpoint, choices)
    state = None if resume is None else resume.state
    checkpoints = Checkpoints(
        keeper, settings.checkpoint.every_n_train_steps, total_steps, StopSignals(tells=not follows()), report, tracker, state
    )
    trainer = lightning_trainer(
        params,
        logger=logger,
        callbacks=[SetEpoch(_overfits(settings)), StatelessDropout(seed), metrics, report, checkpoints],
        default_root_dir=str(run_dir),
    )
    logger.trainer = trainer
    return trainer


def lightning_trainer(params: Mapping[str, Any], **arguments: Any) -> pl.Trainer:
    """A trainer with what the project settles for all of them. Raises UserError with Lightning's reason where it refuses `params`."""
    settled: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,  # the batch plan knows the processes
    }
    try:
        with quiet_lightning():
            return pl.Trainer(**{**params, **settled, **arguments})
    except (MisconfigurationException, ImportError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"trainer.params: {' '.join(str(error).split())}") from error


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, train_loader: DataLoader[Any], val_loader: DataLoader[Any] | None = None
) -> RunResult:
    """Train to the end. SIGTERM and SIGINT save and raise `Stopped` (exit 143, 130); a loss that is not finite raises UserError."""
    checkpoints = next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))  # type: ignore[attr-defined]
    order = next(callback for callback in trainer.callbacks if isinstance(callback, SetEpoch))  # type: ignore[attr-defined]
    state, keeper = checkpoints.state, checkpoints.keeper
    if sampler := plan_sampler(train_loader):
        sampler.same_batches = order.same_batches
    started = time.monotonic()
    checkpoints.frozen = weights_digest(frozen_weights(module))
    if state is not None:
        refuse_other_processes(trainer.world_size, state["processes"])
        check_start_weights(checkpoints.frozen, state["frozen"], "frozen weights")
        trainer.precision_plugin.convert_module(module)  # as Lightning will: under bf16-true what was saved is bfloat16
        load_trained_weights(module, state["weights"])
        checkpoints.go_back(state)
    leads = trainer.world_size > 1 and not launched() and not follows()
    with checkpoints.stop, quiet_lightning(), meeting_on_loopback() if leads else contextlib.nullcontext():
        try:
            if state is not None and state["validates"]:
                _set_progress(trainer, state, train_loader)
                trainer.validate(module, val_loader, verbose=False)
            if state is not None:
                _set_progress(trainer, state, train_loader)
            if state is None or state["step"] < checkpoints.total_steps:
                trainer.fit(module, train_loader, val_loader)
        except MisconfigurationException as error:
            raise UserError(f"trainer.params: {' '.join(str(error).split())}") from error
        except BaseException as error:
            end_followers(trainer, at_once=not isinstance(error, Stopped))
            trainer.fit_loop.teardown()  # left alone where a validation in mid-training is stopped: its data workers would stay for long
            if isinstance(error, RuntimeError) and "find_unused_parameters=True" in str(error):
                raise UserError(
                    "trainer.params.strategy: under ddp every weight that trains must enter every loss, and some do "
                    "not; use ddp_find_unused_parameters_true"
                ) from error
            if isinstance(error, RuntimeError) and trainer.world_size > 1 and is_of_the_connection(error):
                raise UserError(
                    "a process of this training ended, or did not answer within trainer.process_timeout_s; --resume goes on from the last "
                    f"checkpoint ({' '.join(str(error).split())[:160]})"
                ) from error
            raise
    release_optimization(trainer, module)
    if distributed.is_initialized() and not launched():
        distributed.destroy_process_group()  # all of them are here; a launcher's group is its maker's
    model = keeper.run_dir / BEST
    if trainer.is_global_zero:
        if keeper.last is None:
            raise UserError("training ended before its first step; raise trainer.params.max_time, if it is set")
        model = keeper.close()
    return RunResult(
        model=model,
        monitor=keeper.monitor,
        best_value=keeper.best_value,
        best_metrics=dict(keeper.best_metrics),
        validated=checkpoints.validated,
        steps=trainer.global_step,
        seconds=time.monotonic() - started,
        peak_memory_gib=peak_memory_gib(trainer.strategy.root_device),  # the module is back on the CPU by now
    )


def release_optimization(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Free gradients, moments and schedules: nothing needs them after the last step, and what follows needs memory, too."""
    module.zero_grad(set_to_none=True)
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []


def end_followers(trainer: pl.Trainer, *, at_once: bool) -> None:
    """Before this process leaves: end those it started (`at_once`), or let them end by themselves."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []  # it would kill this process as soon as it sees one of them gone
    if at_once:
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            process.kill()


def _set_progress(trainer: pl.Trainer, state: Mapping[str, Any], train_loader: DataLoader[Any]) -> None:
    """Put Lightning's loops, and the order of the rows, where the state was saved: after a step, its validation done."""
    epoch, behind, per_epoch = state["epoch"], state["batches"], state["batches_per_epoch"]
    if behind == per_epoch:
        epoch, behind = epoch + 1, 0
    loop: Any = trainer.fit_loop
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.ready = epochs.started = epoch + (behind > 0)
        epochs.processed = epochs.completed = epoch
    progress = loop.epoch_loop.batch_progress
    for batches, done in ((progress.total, epoch * per_epoch + behind), (progress.current, behind)):
        batches.ready = batches.started = batches.processed = batches.completed = done
    steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = state["step"]
    loop.restarting = behind > 0
    sampler = plan_sampler(train_loader)
    assert sampler is not None, "training loaders work through a plan"
    sampler.set_epoch(epoch)
    sampler.skip(behind)


# Hints of Lightning that are settled here, or advertise.
_SETTLED_WARNINGS = (
    r".*does not have many workers.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*GPU available but not used.*",
    r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # validation sums over processes itself
    r".*Trainer already configured with model summary.*",
    r".*LeafSpec.*",
    r".*your dataloader is not resumable.*",  # its sampler is put where the state was saved
    r".*module\(s\) in eval mode at the start of training.*",  # frozen parts, on purpose
    r".*logging on the .* level with .* on distributed setting.*",
)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices and settled hints inside; warnings of other kinds still show."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _SETTLED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
