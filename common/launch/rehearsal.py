"""`--dry_run` of the stages that Lightning trains: a few real steps and a validation in memory, and what they say of the whole run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from common.batching import Batch, BatchPlan, limited
from common.disk import most_saves
from common.dry_run import Cost, Forecast, counted, model_bytes, report, seconds_of, start_line
from common.errors import UserError
from common.launch.callbacks import StatelessDropout, TrainingMetrics, plan_sampler
from common.launch.lightning import SHARDINGS, batch_limit, lightning_trainer, quiet_lightning, release_optimization, trainer_params
from common.launch.runtime import peak_memory_gib
from common.schema import DataSettings, TrainerSettings, TrainingSettings
from common.tokenization import Encoder
from common.tracking import Tracker
from common.training_state import state_size, trained_weights

TYPICAL_STEPS, ENOUGH_S = 8, 4.0
"""Typical steps that are made at most; none is begun after so many seconds of steps."""
_KEPT = (
    "accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode",
    "detect_anomaly",
)  # fmt: skip


def report_training(
    config: TrainingSettings,
    data: DataSettings,
    module: pl.LightningModule,
    model: Any,
    encoder: Encoder,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    *,
    total_steps: int,
    processes: int = 1,
    padding_free: bool,
    root: Path,
    keeps_states: bool,
    closing: Callable[[], object] = lambda: None,
) -> None:
    """Print what a training would take. Raises UserError where it could not run or could not keep its checkpoints in `root`.

    keeps_states: whether the run would keep states of layers that do not train, which nothing here does. closing: what takes as much memory
    as the run does after training.
    """
    forecast = rehearse(
        config.trainer,
        module,
        model,
        encoder.tokenizer,
        train_loader,
        val_loader,
        total_steps=total_steps,
        batch_size=data.batch_size,
        processes=processes,
        padding_free=padding_free,
        seed=config.seed,
        closing=closing,
    )
    name = config.trainer.ckpt_path or config.model_name
    cached = "cache: the run computes states of layers that do not train once and keeps them; measured without, so it takes less than this"
    strategy = trainer_params(config.trainer).get("strategy")
    spread = f"strategy: {strategy} spreads weights, gradients and moments over {processes} processes; measured with all of them in one"
    report(
        config,
        encoder=encoder,
        rows={"train": len(_plan(train_loader).lengths), "val": len(_plan(val_loader).lengths)},
        fits=[start_line(name, model.config, encoder.tokenizer, data.max_length, data.prompt_format)],
        parameters=model.parameters(),
        forecast=forecast,
        root=root,
        keep_last=config.trainer.checkpoint.keep_last,
        keep_best=config.trainer.checkpoint.keep_best,
        notes=[*([cached] if keeps_states else []), *([spread] if strategy in SHARDINGS else [])],
    )


def rehearse(
    settings: TrainerSettings,
    module: pl.LightningModule,
    model: nn.Module,
    tokenizer: Any,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    *,
    total_steps: int,
    batch_size: int,
    processes: int = 1,
    padding_free: bool,
    seed: int,
    closing: Callable[[], object] = lambda: None,
) -> Forecast:
    """Train on the longest batch of the first epoch and on a typical one, validate on the longest and a typical one, in this process alone.

    The module has other weights afterwards. padding_free: whether padding costs nothing. Raises UserError where a step fails as it would in
    the run: a loss that is not finite, memory that does not suffice.
    """
    params = trainer_params(settings)
    accumulate: int = params.get("accumulate_grad_batches", 1)
    train_plan, val_plan = _plan(train_loader), _plan(val_loader)
    batches = train_plan.batches(0)[: limited(len(train_plan.batches(0)), batch_limit(settings))]
    val_batches = val_plan.batches(0)[: limited(len(val_plan.batches(0)), params.get("limit_val_batches"))]

    def tokens(plan: BatchPlan, batch: Batch) -> int:
        lengths = plan.lengths[batch.indices]
        return int(lengths.sum() if padding_free else lengths.max() * len(lengths))

    def all_tokens(plan: BatchPlan, batches: Sequence[Batch]) -> NDArray[np.int64]:
        return np.fromiter((tokens(plan, batch) for batch in batches), np.int64, len(batches))

    used = batches[: total_steps * accumulate]
    used_tokens, val_tokens = all_tokens(train_plan, used), all_tokens(val_plan, val_batches)
    longest, typical = _longest_and_typical(used, used_tokens)
    shown = [longest] * 2 + [typical] * TYPICAL_STEPS
    val_shown = _longest_and_typical(val_batches, val_tokens) if val_batches else ()
    watch = Stopwatch(accumulate)
    trainer = lightning_trainer(
        {name: params[name] for name in _KEPT if name in params},
        devices=params["devices"][:1] if isinstance(params["devices"], list) else 1,
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        callbacks=[StatelessDropout(seed), TrainingMetrics(Tracker(Path(), is_main=False), total_steps, 0), watch],
    )
    train_part = _with_batches(train_loader, [batch for batch in shown for _ in range(accumulate)])
    val_part = _with_batches(val_loader, [*val_shown, *val_shown[1:]]) if val_shown else None
    with quiet_lightning():
        try:
            trainer.fit(module, train_part, val_part)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"memory does not suffice for a step on {len(longest.indices)} rows of {tokens(train_plan, longest):,} tokens, the longest "
                f"batch: {' '.join(str(error).split())[:200]}; lower data.batch_size or data.max_length, or set "
                "model_params.gradient_checkpointing"
            ) from None
    step = [
        Cost(tokens(train_plan, batch), seconds / accumulate)
        for batch, seconds in ((longest, watch.steps[1]), (typical, statistics.median(watch.steps[2:])))
    ]
    once_through = seconds_of(map(int, used_tokens), *step)
    steps_seconds = once_through * total_steps / math.ceil(len(used) / accumulate)
    count, once = validations(settings, len(train_plan.batches(0)), total_steps), 0.0
    if val_shown:
        val_step = [
            Cost(tokens(val_plan, batch), seconds)
            for batch, seconds in zip(val_shown, (watch.val_batches[0], watch.val_batches[-1]), strict=True)
        ]
        once = seconds_of(map(int, val_tokens), *val_step) + watch.val_rest
    release_optimization(trainer, module)
    closing()
    return Forecast(
        device=str(trainer.strategy.root_device),
        measured=f"the longest batch of the first epoch ({counted(len(longest.indices), 'row')}, {step[0].tokens:,} tokens) "
        f"{step[0].seconds:.3g} s, a typical one ({counted(len(typical.indices), 'row')}, {step[1].tokens:,} tokens) "
        f"{step[1].seconds:.3g} s, a validation about {once:.3g} s",
        steps=f"{total_steps:,} optimizer steps of {batch_size} x {accumulate} rows"
        + (f" on each of {processes} devices (measured in one process)" if processes > 1 else ""),
        steps_seconds=steps_seconds,
        validations=count if val_shown else 0,
        validations_seconds=count * once,
        memory_gib=peak_memory_gib(trainer.strategy.root_device),
        checkpoint_bytes=model_bytes(model, tokenizer) + watch.state_bytes,
    )


class Stopwatch(pl.Callback):
    """Seconds of each optimizer step, of each validation batch and of the rest of a validation; bytes of the state of the training."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.steps: list[float] = []
        self.val_batches: list[float] = []
        self.val_rest = 0.0
        self.state_bytes = 0
        self._began = 0.0

    def _lap(self, module: pl.LightningModule) -> float:
        """Seconds since the lap before."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        before, self._began = self._began, time.perf_counter()
        return self._began - before

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.steps.append(self._lap(pl_module))
            trainer.should_stop = len(self.steps) > 2 and sum(self.steps) > ENOUGH_S

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap(pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.val_batches.append(self._lap(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.val_rest = self._lap(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # What a checkpoint holds of the training; saving it takes this memory, too.
        optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.state_bytes = state_size({"weights": trained_weights(pl_module), "optimizers": optimizers})


def validations(settings: TrainerSettings, batches_per_epoch: int, total_steps: int) -> int:
    """How often training validates: as Lightning does, and always after the last step."""
    params = trainer_params(settings)
    batches = limited(batches_per_epoch, batch_limit(settings))
    accumulate, every, interval = (
        params.get(name) for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
    )
    epochs, steps = divmod(total_steps, math.ceil(batches / (accumulate or 1)))
    rest = steps * (accumulate or 1)
    if "check_val_every_n_epoch" in params and every is None:  # batches are counted across epochs
        count, after = divmod(epochs * batches + rest, interval if isinstance(interval, int) else batches)
        return count + (after > 0)
    each = interval if type(interval) is int else max(1, int(batches * interval)) if isinstance(interval, float) else batches
    validated, in_last = divmod(epochs, every or 1)
    count = validated * (batches // each)
    if rest:
        validates = in_last == (every or 1) - 1
        return count + (rest // each if validates else 0) + (not validates or rest % each > 0)
    return count + (in_last > 0 or batches % each > 0)


def saves_at_most(settings: TrainerSettings, batches_per_epoch: int, total_steps: int) -> int:
    """How many checkpoints a training can make."""
    looks = validations(settings, batches_per_epoch, total_steps)
    return most_saves(total_steps, settings.checkpoint.every_n_train_steps, looks)


def _plan(loader: DataLoader[Any]) -> BatchPlan:
    sampler = plan_sampler(loader)
    assert sampler is not None, "loaders work through a plan"
    return sampler.plan


def _longest_and_typical(batches: Sequence[Batch], tokens: NDArray[np.int64]) -> tuple[Batch, Batch]:
    order = np.argsort(tokens, kind="stable")
    return batches[int(order[-1])], batches[int(order[len(order) // 2])]


def _with_batches(loader: DataLoader[Any], batches: Sequence[Batch]) -> DataLoader[Any]:
    """A loader of these batches in the place of its own, without processes beside this one."""
    if loader.batch_size is None and loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=list(batches), collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=list(batches), collate_fn=loader.collate_fn)  # type: ignore[arg-type]
