"""What this project adds to Lightning's training loop, one callback per subject."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.optim import Optimizer

from common.batching import PlanSampler
from common.errors import UserError
from common.launch.checkpointing import CheckpointKeeper
from common.launch.runtime import peak_memory_gib
from common.launch.sharded_strategy import drop_gradients, gradient_norm, load_optimizer_state, optimizer_states, whole_network
from common.launch.signals import StopSignals
from common.notes import say
from common.progress import Progress, duration, format_figure
from common.resume import remove_leftovers
from common.tracking import Tracker
from common.training_state import check_finite, trained_weights

# Every metric that training itself logs, with one line of definition.
TRAINING_METRICS = {
    "train/loss": "Loss whose gradient the step applied: over all rows of its micro-batches and processes, as the stage normalises it.",
    "train/lr": "Learning rate of the step.",
    "train/grad_norm": "Euclidean norm of the whole gradient before clipping.",
    "train/epoch": "Passes over the training rows so far (fractional).",
    "train/skipped_steps": "Steps left out so far because their loss or gradient was not finite; under `on_nan: skip`.",
    "perf/step_seconds": "Seconds per optimizer step since the last line, validation and saving left out.",
    "perf/tokens_per_second": "Tokens (prompt and answer, no padding) per second and process, over the same steps.",
    "perf/memory_gib": "Most memory used so far: of the GPU where there is one, else of the process.",
}
ESTIMATE_AFTER_STEPS = 5
ESTIMATE_WORTH_S = 20.0


class TrackerLogger(Logger):
    """Hands what a LightningModule logs to the tracker, at the number of optimizer steps made."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.trainer: pl.Trainer | None = None

    @property
    def name(self) -> str:
        return self.tracker.stage

    @property
    def version(self) -> str:
        return self.tracker.run_dir.name

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass  # the run directory holds the configuration

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert self.trainer is not None
        # TrainingMetrics logs the loss of the whole step; Lightning would give the last micro-batch's.
        kept = {name: value for name, value in metrics.items() if name not in {"train/loss", "epoch"}}
        self.tracker.log(kept, self.trainer.global_step)


class SetEpoch(pl.Callback):
    """Tells the training loader's sampler which epoch it orders; with `same_batches` always the first."""

    def __init__(self, same_batches: bool) -> None:
        self.same_batches = same_batches

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if sampler := plan_sampler(trainer.train_dataloader):
            sampler.set_epoch(trainer.current_epoch)


def plan_sampler(loader: Any) -> PlanSampler | None:
    """The sampler of a loader that works through a batch plan."""
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    return next((sampler for sampler in samplers if isinstance(sampler, PlanSampler)), None)


class StatelessDropout(pl.Callback):
    """Makes dropout a function of (seed, epoch, micro-batch, rank), whatever ran before: a resumed run draws the same masks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(mixed_seed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers; tuples that differ anywhere give unrelated seeds."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class TrainingMetrics(pl.Callback):
    """Loss, learning rate, gradient norm, speed and memory of each step; does not step on a loss or gradient that is not finite.

    A module may name the rows of a batch in errors: `describe_rows(batch) -> str`; and have `means`, of its last training batch: name ->
    (values, weights), two (N,) tensors, of whose weighted mean over all rows of the step's micro-batches and processes a figure is made.
    `skips`: such a step is left out, else the run ends.
    """

    def __init__(self, tracker: Tracker, total_steps: int, log_every_n_steps: int, skips: bool = False) -> None:
        self.tracker = tracker
        self.total_steps = total_steps
        self.log_every_n_steps = log_every_n_steps
        self.skips = skips
        self.skipped = 0  # steps left out so far
        self._step = 0
        self._batch: Any = None
        self._window: list[tuple[Tensor, Any]] = []  # (loss, batch) of the micro-batches since the last step
        self._losses: list[Tensor] = []  # the same losses, as they add up to the step's
        self._sums: dict[str, Tensor] = {}  # name -> (weighted sum, sum of weights) of the module's `means`, over the same batches
        self._step_loss, self._step_sums = torch.tensor(math.nan), self._sums
        self._lr = math.nan
        self._grad_norm: float | None = None
        # since the last line
        self._steps = 0
        self._seconds = 0.0
        self._tokens: list[Tensor | int] = []
        self._started = 0.0

    @property
    def loss(self) -> float:
        """Loss of the last step on this process."""
        return float(self._step_loss)

    @property
    def means(self) -> dict[str, float]:
        """The module's figures of the last step on this process."""
        return {name: _mean(sums) for name, sums in self._step_sums.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.monotonic()
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._window.append((loss.detach(), self._batch))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]
        window, self._window = self._window, []
        finite = torch.stack([loss.isfinite() for loss, _ in window]).tolist()
        what, bad = "loss", [batch for (_, batch), good in zip(window, finite, strict=True) if not good]
        self._grad_norm = gradient_norm(trainer, optimizer)  # of a network that is spread, by all processes
        if not _anywhere(trainer, bool(bad)):
            if math.isfinite(self._grad_norm) or _rescales_loss(trainer):
                return
            what, bad = "gradient", [batch for _, batch in window]  # found by all processes: it is the sum of theirs
        problem = f"step {trainer.global_step + 1}: {not_finite(what, pl_module, bad)}"
        if not self.skips:
            remedy = "lower the learning rate, set gradient_clip_val, or use precision 32 or bf16-mixed; on_nan: skip leaves such steps out"
            raise UserError(f"{problem}; training stopped before that step was applied; {remedy}")
        drop_gradients(trainer, optimizer)  # the optimizer passes over weights without a gradient
        self.skipped += 1
        self._grad_norm = None
        say(f"{problem}; the step is left out ({self.skipped} so far)")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._losses.append(outputs["loss"].detach().float())
        for name, (values, weights) in getattr(pl_module, "means", {}).items():
            sums = torch.stack([(values * weights).sum(), weights.sum()]).detach().float()
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._tokens.append(count_tokens(batch))
        self._seconds += time.monotonic() - self._started
        self._batch = None
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        self._steps += 1
        # Lightning has divided each by the number of micro-batches, so the sum is the loss of the step.
        self._step_loss = torch.stack(self._losses).sum()
        self._step_sums = self._sums
        self._losses, self._sums = [], {}
        on_schedule = self.log_every_n_steps > 0 and self._step % self.log_every_n_steps == 0
        if on_schedule or self._step == self.total_steps:
            self._log(trainer, pl_module, batch_idx)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        metrics = {"train/loss": float(trainer.strategy.reduce(self._step_loss, reduce_op="mean")), "train/lr": self._lr}
        metrics |= {name: _mean(trainer.strategy.reduce(sums, reduce_op="sum")) for name, sums in self._step_sums.items()}
        if self._grad_norm is not None:
            metrics["train/grad_norm"] = self._grad_norm
        metrics["train/skipped_steps"] = self.skipped
        metrics["train/epoch"] = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        metrics["perf/step_seconds"] = self._seconds / self._steps
        metrics["perf/tokens_per_second"] = sum(int(count) for count in self._tokens) / max(self._seconds, 1e-9)
        metrics["perf/memory_gib"] = peak_memory_gib(pl_module.device)
        self.tracker.log(metrics, self._step)
        self._steps, self._seconds, self._tokens = 0, 0.0, []


def _mean(sums: Any) -> float:
    total, weight = sums.tolist()
    return total / weight if weight else math.nan


def not_finite(what: str, module: pl.LightningModule, batches: list[Any]) -> str:
    """That a loss or gradient is NaN or infinite, naming the rows where the module can; no batches: it is so in another process."""
    if not batches:
        return f"a {what} is not finite in another process"
    describe = getattr(module, "describe_rows", None)
    rows = f" (rows: {'; '.join(describe(batch) for batch in batches)})" if describe is not None else ""
    return f"the {what} is not finite{rows}"


def _anywhere(trainer: pl.Trainer, found: bool) -> bool:
    """Whether any process found it; all of them must agree on what they do then."""
    return found if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(found, all=False)


def count_tokens(batch: Any) -> Tensor | int:
    """Tokens of a batch without padding where that can be told: `tokens`, else a (B, S) attention mask, else the size of `input_ids`."""
    if not isinstance(batch, Mapping):
        return 0
    if "tokens" in batch:
        tokens: Tensor | int = batch["tokens"]
        return tokens
    total: Tensor | int = 0
    for name, value in batch.items():
        if name.endswith("input_ids") and isinstance(value, Tensor):
            mask = batch.get(name.removesuffix("input_ids") + "attention_mask")
            total = total + (mask.sum() if isinstance(mask, Tensor) and mask.shape == value.shape else value.numel())
    return total


def _rescales_loss(trainer: pl.Trainer) -> bool:
    """Under float16 a gradient that overflows is normal: the scaler skips that step and lowers its scale."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


class ProgressReport(pl.Callback):
    """The progress bar, and early on how long the run will take."""

    def __init__(self, metrics: TrainingMetrics, total_steps: int, enabled: bool) -> None:
        self.metrics = metrics
        self.total_steps = total_steps
        self.enabled = enabled
        self.progress: Progress | None = None
        self._step = self._first = 0
        self._seconds: list[float] = []
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._first = trainer.global_step
        self.progress = Progress(self.total_steps, done=self._step, enabled=self.enabled and trainer.is_global_zero)
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step or self.progress is None:
            return
        self._step = trainer.global_step
        made = self._step - self._first
        if made <= ESTIMATE_AFTER_STEPS:
            self._seconds.append(time.monotonic() - self._started)
            self._started = time.monotonic()
        if self.progress.due(self._step):
            # In a log, validation has lines of its own.
            figures = self.metrics.means | _shown(trainer) if self.progress.is_bar else {}
            self.progress.update(self._step, {"loss": self.metrics.loss, **figures})
        if made == ESTIMATE_AFTER_STEPS and self._step < self.total_steps:
            self._estimate(pl_module.device)

    def _estimate(self, device: torch.device) -> None:
        per_step = sorted(self._seconds)[len(self._seconds) // 2]  # the first step is slower than the rest
        left = per_step * (self.total_steps - self._step)
        if left < ESTIMATE_WORTH_S:
            return
        self.note(
            f"about {duration(left)} for the {self.total_steps - self._step} steps left ({per_step:.3g} s each, validation not counted); "
            f"peak memory so far {peak_memory_gib(device):.2f} GiB"
        )

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self.enabled:
            return
        if self.progress is not None:
            self.progress.note(text)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.close()


def _shown(trainer: pl.Trainer) -> dict[str, float]:
    """Figures the module wants in the bar, beside the loss."""
    return {name: float(value) for name, value in trainer.progress_bar_metrics.items() if name != "train/loss"}


class Checkpoints(pl.Callback):
    """Saves every n optimizer steps or at each validation, at the end, and when a signal asks to stop. Goes last: it may leave.

    `state` is that of an earlier run that goes on.
    """

    def __init__(
        self,
        keeper: CheckpointKeeper,
        every_n_steps: int | None,
        total_steps: int,
        stop: StopSignals,
        report: ProgressReport,
        tracker: Tracker,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.keeper = keeper
        self.every_n_steps = every_n_steps
        self.total_steps = total_steps
        self.stop = stop
        self.report = report
        self.tracker = tracker
        self.state = state
        self.frozen = ""  # digest of the weights that do not train
        self.validated = bool(state and state["validated"])
        self._step = 0
        self._epoch, self._batches = 0, 0  # where the last step ended
        self._between_steps = False
        self._validates = False  # the state of the last step is still to be validated
        self._due = False

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Make files and metrics what they were when this state was saved; call it once nothing can be refused any more."""
        if self.tracker.is_main:
            remove_leftovers(self.keeper.folder)
            self.keeper.load_state_dict(state["keeper"], state["step"])
            self.tracker.go_back(state["metrics"], state["step"])

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()  # Lightning has put its own handler of SIGTERM in front

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()
        self._step = trainer.global_step
        if self.state is not None:
            load_optimization(trainer, self.state)
            self.report.metrics.skipped = self.state.get("skipped", 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.state is not None:
            # Lightning decides by this when it logs; a restart may have counted a step too many.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self.state = None
        if not self._between_steps:
            return
        # Lightning has logged all of the last step by now, and no validation followed it.
        self._between_steps = False
        stops = self._asked_to_stop(trainer)
        if self._due or stops:
            self._save(trainer)
        if stops:
            self._leave()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._epoch, self._batches = trainer.current_epoch, batch_idx + 1
        self._between_steps = True
        self._due = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        if self._step >= self.total_steps:
            # Both make Lightning validate the final state, so that it can be the best.
            trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch and 1
            trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()
        self._validates = not trainer.sanity_checking

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._asked_to_stop(trainer):
            if self._validates:
                self._save(trainer)
            self._leave()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validated, self._validates, self._between_steps = True, False, False
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}
        if self.keeper.monitor not in metrics:
            raise UserError(
                f"trainer.checkpoint.monitor: validation did not log {self.keeper.monitor}; it logged: {', '.join(sorted(metrics))}"
            )
        improves = trainer.strategy.broadcast(self.keeper.improves(metrics))  # only the first process knows what it kept
        figures = "  ".join(f"{name} {format_figure(value)}" for name, value in metrics.items())
        self.report.note(f"step {trainer.global_step}: {figures}{'  (best so far)' if improves else ''}")
        stops = self._asked_to_stop(trainer)
        if self.every_n_steps is None or self._due or improves or stops:
            self._save(trainer, metrics)
        if stops:
            self._leave()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0:
            self._save(trainer)

    def _leave(self) -> NoReturn:
        if self.keeper.last is not None:
            for line in (f"saved {self.keeper.last}; stopping", "to go on: the same command with --resume"):
                self.report.note(line)
                if not self.report.enabled:  # its notes are silent then
                    say(line)
        self.stop.stop()

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any process got a signal; all of them must agree on the step they leave at."""
        return _anywhere(trainer, self.stop.received is not None)

    def _save(self, trainer: pl.Trainer, metrics: Mapping[str, float] | None = None) -> None:
        self._due = False
        optimizers = optimizer_states(trainer)
        with whole_network(trainer):
            if trainer.is_global_zero:
                check_finite(trainer.lightning_module, trainer.global_step)
                self.keeper.save(trainer.global_step, metrics, partial(self._state, trainer, optimizers))
        trainer.strategy.barrier("checkpoint")

    def _state(self, trainer: pl.Trainer, optimizers: list[Any]) -> dict[str, Any]:
        """What training needs to go on from here."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return {
            "step": trainer.global_step,
            "epoch": self._epoch,
            "batches": self._batches,
            "batches_per_epoch": trainer.num_training_batches,
            "validates": self._validates,
            "validated": self.validated,
            "processes": trainer.world_size,
            "skipped": self.report.metrics.skipped,
            "frozen": self.frozen,
            "weights": trained_weights(trainer.lightning_module),
            "optimizers": optimizers,
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "scaler": None if scaler is None else scaler.state_dict(),
            "timers": [timer.state_dict() for timer in _timers(trainer)],
            "metrics": self.tracker.position,
        }


def _timers(trainer: pl.Trainer) -> list[pl.callbacks.Timer]:
    """What ends the training after `max_time`, where that is set."""
    return [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.Timer)]  # type: ignore[attr-defined]


def load_optimization(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Put back optimizers and schedules, which Lightning has made by now, and the time that has been spent."""
    for timer, spent in zip(_timers(trainer), state.get("timers", ()), strict=False):
        timer.load_state_dict(spent)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        load_optimizer_state(trainer, optimizer, saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    if state["scaler"] is not None:
        trainer.precision_plugin.scaler.load_state_dict(state["scaler"])  # type: ignore[attr-defined]
