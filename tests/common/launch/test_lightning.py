from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import StrategyRegistry
from torch import Tensor
from torch.utils.data import DataLoader

from common.batching import Batch, BatchPlan, batch_loader
from common.checkpoint import atomic_directory
from common.closing import RunResult, finish_run
from common.errors import UserError
from common.launch.callbacks import TRAINING_METRICS, ProgressReport, TrainingMetrics, count_tokens, mixed_seed
from common.launch.lightning import (
    batch_limit,
    batch_words,
    build_trainer,
    check_processes,
    check_trainer,
    fit,
    on_all_gpus,
    processes_of,
    total_optimizer_steps,
    trainer_params,
)
from common.lightning_arguments import Strategy
from common.schema import CheckpointSettings, TrainerSettings
from common.tracking import Tracker, read_metrics

ROOT = Path(__file__).resolve().parents[3]


class Toy(pl.LightningModule):
    """One weight w, pulled towards the batch's mean: loss mean((w - x)^2) over rows; records what it saw."""

    logged_metrics = ("val/loss", "val/weight")

    def __init__(self, start: float = 1.0, lr: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([start]))
        self.drop = torch.nn.Dropout(dropout)
        self.lr = lr
        self.rows: list[list[int]] = []
        self.masks: list[list[float]] = []
        self.validated_at: list[int] = []
        self.hook: Callable[[Toy, int], None] = lambda module, step: None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.rows.append(batch["rows"])
        self.masks.append(self.drop(torch.ones(8)).tolist())
        self.hook(self, self.trainer.global_step)
        self.log("train/loss", -1.0)
        self.log("train/extra", 7.0)
        return ((self.w - batch["x"]) ** 2).sum() / batch["denominator"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", ((self.w - batch["x"]) ** 2).mean(), batch_size=len(batch["x"]))

    def on_validation_epoch_end(self) -> None:
        self.validated_at.append(self.trainer.global_step)
        self.log("val/weight", self.w.detach()[0])

    def describe_rows(self, batch: dict[str, Any]) -> str:
        return ", ".join(f"row {row}" for row in batch["rows"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(
    values: Sequence[float],
    *,
    batch_size: int = 2,
    accumulate: int = 1,
    mode: Any = "random",
    seed: int = 3,
    limit: int | float | None = None,
) -> DataLoader[Any]:
    def collate(batch: Batch) -> dict[str, Any]:
        x = torch.tensor([values[row] for row in batch.indices])
        return {"x": x, "rows": batch.indices, "denominator": batch.denominator}

    plan = BatchPlan([1] * len(values), batch_size=batch_size, seed=seed, accumulate=accumulate, mode=mode, limit=limit)
    return batch_loader(plan, collate)


def saver(module: Toy) -> Any:
    def save(directory: Path, metrics: dict[str, float], step: int, extra: Callable[[Path], None]) -> None:
        with atomic_directory(directory) as staging:
            extra(staging)
            (staging / "state.json").write_text(json.dumps({"w": module.w.item(), "step": step, "metrics": metrics}))

    return save


def state(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "state.json").read_text())


def settings(checkpoint: dict[str, Any] | None = None, **params: Any) -> TrainerSettings:
    return TrainerSettings(
        checkpoint=CheckpointSettings(**{"monitor": "val_loss", **(checkpoint or {})}),
        params={"accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_progress_bar": False, **params},
    )


def train(
    run: Path,
    module: Toy,
    config: TrainerSettings,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
    seed: int = 5,
    on_built: Callable[[pl.Trainer], None] = lambda trainer: None,
    finish: bool = False,
) -> RunResult:
    run.mkdir(exist_ok=True)
    total = total_optimizer_steps(config, len(train_loader))
    with Tracker(run, stage="sft") as tracker:
        trainer = build_trainer(
            config, run_dir=run, tracker=tracker, seed=seed, save=saver(module), choices=module.logged_metrics, total_steps=total
        )
        on_built(trainer)
        result = fit(trainer, module, train_loader, val_loader)
        assert trainer.global_step == total
        if finish:
            finish_run(tracker, result, runs_root=run.parent)
    return result


VALUES = [0.0, 1.0, 2.0, 3.0, 4.0]


def column(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(run) if name in line]


def test_loss_gradient_and_steps_by_hand(tmp_path: Path) -> None:
    """Five rows in batches of 2 with accumulation of 2: steps over rows 0-3 and row 4, whose mean gradients are known."""
    module = Toy(start=1.0, lr=0.25)
    result = train(tmp_path, module, settings(accumulate_grad_batches=2), loader(VALUES, accumulate=2, mode="sequential"), loader(VALUES))
    # Step 1: mean (1 - x)^2 over 0..3 = (1 + 0 + 1 + 4) / 4; gradient 2 mean(1 - x) = -1; w = 1.25. Step 2: (1.25 - 4)^2, gradient -5.5.
    assert column(tmp_path, "train/loss") == [(1, 1.5), (2, 7.5625)]
    assert column(tmp_path, "train/grad_norm") == [(1, 1.0), (2, 5.5)]
    assert column(tmp_path, "train/lr") == [(1, 0.25), (2, 0.25)]
    assert column(tmp_path, "train/epoch") == [(1, 2 / 3), (2, 1.0)]
    assert module.w.item() == pytest.approx(1.25 + 0.25 * 5.5)
    assert column(tmp_path, "train/extra") == [(1, 7.0), (2, 7.0)]
    assert column(tmp_path, "val/loss") == [(2, pytest.approx(sum((2.625 - x) ** 2 for x in VALUES) / 5, rel=1e-6))]
    assert result.steps == 2 and result.model == tmp_path / "checkpoints" / "step-000002"
    assert state(tmp_path / "best") == {"w": 2.625, "step": 2, "metrics": {"val/loss": pytest.approx(2.390625), "val/weight": 2.625}}


@pytest.mark.parametrize("params", [{"limit_train_batches": 3}, {"limit_train_batches": 0.6}, {"overfit_batches": 3}])
def test_a_step_that_a_limit_cuts_short_is_not_scaled_down(tmp_path: Path, params: dict[str, Any]) -> None:
    """Two of five rows a step, cut after the third: the second step is over row 2 alone."""
    config = settings(accumulate_grad_batches=2, **params)
    rows = loader(VALUES, batch_size=1, accumulate=2, mode="sequential", limit=batch_limit(config))
    train(tmp_path, Toy(start=1.0, lr=0.25), config, rows, loader(VALUES))
    # Step 1: mean (1 - x)^2 over 0 and 1, gradient 1; w = 0.75. Step 2: (0.75 - 2)^2.
    assert column(tmp_path, "train/loss") == [(1, 0.5), (2, 1.5625)]


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 7]), (0, [7])])
def test_metrics_come_on_schedule_and_at_the_end(tmp_path: Path, every: int, expected: list[int]) -> None:
    train(tmp_path, Toy(), settings(log_every_n_steps=every, max_steps=7), loader([1.0] * 40), loader(VALUES))
    assert [step for step, _ in column(tmp_path, "train/loss")] == expected
    assert all(name in read_metrics(tmp_path)[0] for name in TRAINING_METRICS)


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    module = Toy(start=1.0, lr=1.0)
    train(tmp_path, module, settings(gradient_clip_val=0.5, max_steps=1), loader([3.0], mode="sequential"), loader(VALUES))
    assert column(tmp_path, "train/grad_norm") == [(1, 4.0)]
    assert module.w.item() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({}, 40),
        ({"max_epochs": 3}, 41),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 45),
        ({"max_steps": 7}, 40),
        ({"max_steps": 7, "max_epochs": 2, "accumulate_grad_batches": 5}, 40),
        ({"limit_train_batches": 3, "max_epochs": 2}, 40),
        ({"limit_train_batches": 0.3, "max_epochs": 2}, 41),
        ({"overfit_batches": 2, "max_epochs": 4}, 40),
        ({"overfit_batches": 0.25, "max_epochs": 2}, 40),
        ({"fast_dev_run": True}, 40),
        ({"fast_dev_run": 3, "accumulate_grad_batches": 2}, 40),
    ],
)
def test_total_steps_are_those_that_lightning_counts_and_makes(tmp_path: Path, params: dict[str, Any], rows: int) -> None:
    trainers: list[pl.Trainer] = []
    train(tmp_path, Toy(), settings(**params), loader([1.0] * rows, batch_size=4), loader(VALUES), on_built=trainers.append)
    (trainer,) = trainers  # train() has compared the count with the steps made
    assert trainer.estimated_stepping_batches == trainer.global_step


def test_the_final_state_is_validated_wherever_training_ends(tmp_path: Path) -> None:
    module = Toy()
    train(tmp_path, module, settings(val_check_interval=4, max_steps=6), loader([1.0] * 20), loader(VALUES))
    assert module.validated_at == [4, 6]
    assert column(tmp_path, "val/weight") == [(4, 1.0), (6, 1.0)]


def test_the_final_state_is_validated_in_an_epoch_without_validation_too(tmp_path: Path) -> None:
    module = Toy()
    train(tmp_path, module, settings(check_val_every_n_epoch=2, max_epochs=3), loader([1.0] * 4), loader(VALUES))
    assert module.validated_at == [4, 6]


@pytest.mark.parametrize(("every", "expected"), [(None, [3, 6, 8]), (2, [2, 3, 4, 6, 8])])
def test_when_checkpoints_are_written(tmp_path: Path, every: int | None, expected: list[int]) -> None:
    """Validation at 3, 6 and 8 always improves: with `every` those are saved beside the multiples, without it they alone."""
    module = Toy(start=0.0, lr=0.05)
    config = settings({"every_n_train_steps": every, "keep_last": 9}, val_check_interval=3, max_steps=8)
    train(tmp_path, module, config, loader([1.0] * 40), loader([1.0]))
    written = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert written == expected
    assert [state(tmp_path / "checkpoints" / f"step-{step:06d}")["metrics"] != {} for step in expected] == [
        step in (3, 6, 8) for step in expected
    ]
    # what lies in the directory of a step is the state after exactly that step
    for step in expected:
        assert state(tmp_path / "checkpoints" / f"step-{step:06d}")["w"] == pytest.approx(1 - 0.9**step, rel=1e-5)


def test_with_a_save_interval_a_validation_that_does_not_improve_saves_nothing(tmp_path: Path) -> None:
    module = Toy(start=1.0, lr=0.5)  # first validation at w = 1 (best), later ones at 3
    config = settings({"every_n_train_steps": 4, "keep_last": 9}, val_check_interval=1, max_steps=4)
    train(tmp_path, module, config, loader([1.0, 3.0, 3.0, 3.0], batch_size=1, mode="sequential"), loader([1.0]))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000004"]
    assert state(tmp_path / "best")["step"] == 1 and state(tmp_path / "last")["step"] == 4


def test_without_validation_the_last_state_is_the_model(tmp_path: Path) -> None:
    result = train(tmp_path, Toy(), settings(limit_val_batches=0, max_steps=3), loader([1.0] * 20), None)
    assert state(tmp_path / "best")["step"] == 3 and result.best_value is None


def test_each_epoch_has_its_own_order_and_overfitting_keeps_the_first_batches(tmp_path: Path) -> None:
    module = Toy()
    values = [float(number) for number in range(8)]
    train(tmp_path / "a", module, settings(max_epochs=3), loader(values), loader(VALUES))
    plan = BatchPlan([1] * 8, batch_size=2, seed=3)
    assert module.rows == [batch.indices for epoch in range(3) for batch in plan.batches(epoch)]
    module = Toy()
    train(tmp_path / "b", module, settings(max_epochs=3, overfit_batches=2), loader(values), loader(VALUES))
    assert module.rows == [batch.indices for batch in plan.batches(0)[:2]] * 3


def test_dropout_is_a_function_of_seed_epoch_and_batch_alone(tmp_path: Path) -> None:
    def masks(name: str, *, seed: int = 5, noise: bool = False) -> list[list[float]]:
        module = Toy(dropout=0.5)
        if noise:
            torch.manual_seed(99)
            module.hook = lambda toy, step: torch.rand(step + 1)  # type: ignore[assignment]
        train(tmp_path / name, module, settings(max_epochs=2), loader([1.0] * 8), loader(VALUES), seed=seed)
        return module.masks

    plain = masks("a")
    assert masks("b", noise=True) == plain
    assert masks("c", seed=6) != plain
    assert len({tuple(mask) for mask in plain}) == 8


def test_mixed_seeds_differ_in_every_place() -> None:
    seeds = {mixed_seed(*parts) for parts in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (12, 3), (1, 23), (1, 2, 3, 0)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("lost", "words"),
    [(True, "step 1: a loss is not finite in another process"), (False, "step 1: the gradient is not finite (rows: row 3)")],
)
def test_rows_of_this_process_are_not_named_for_a_loss_of_another(tmp_path: Path, lost: bool, words: str) -> None:
    module = Toy()
    module.w.grad = torch.tensor([float("nan")])  # a sum over processes
    metrics = TrainingMetrics(Tracker(tmp_path), 1, 1)
    metrics._window = [(torch.tensor(1.0), {"rows": [3]})]
    strategy = SimpleNamespace(reduce_boolean_decision=lambda found, all: found or lost)
    trainer: Any = SimpleNamespace(world_size=2, global_step=0, strategy=strategy, precision_plugin=None)
    with pytest.raises(UserError) as stopped:
        metrics.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), 0.1))
    assert str(stopped.value).startswith(words)


@pytest.mark.parametrize(("bad", "what"), [(float("nan"), "loss"), (float("inf"), "loss"), (1e30, "gradient")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_its_step(tmp_path: Path, bad: float, what: str) -> None:
    values = [1.0, 1.0, 1.0, 1.0, 1.0, bad]
    module = Toy(start=0.0, lr=0.25)
    if what == "gradient":
        values[5] = 1.0
        handle = lambda grad: grad * float("inf") if len(module.rows) == 6 else grad  # noqa: E731
        module.w.register_hook(handle)
    config = settings(val_check_interval=2)
    with pytest.raises(UserError) as stopped:
        train(tmp_path, module, config, loader(values, batch_size=1, mode="sequential"), loader([1.0]))
    assert str(stopped.value).startswith(f"step 6: the {what} is not finite (rows: row 5)")
    assert module.w.item() == pytest.approx(1 - 0.5**5)  # five steps halved the distance to 1; no sixth was made
    assert state(tmp_path / "best")["step"] == 4
    assert [step for step, _ in column(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


def test_a_nan_in_the_middle_of_an_accumulation_names_its_own_rows(tmp_path: Path) -> None:
    train_loader = loader([1.0, float("nan"), 1.0], batch_size=1, accumulate=3, mode="sequential")
    with pytest.raises(UserError, match=r"step 1: the loss is not finite \(rows: row 1\)"):
        train(tmp_path, Toy(), settings(accumulate_grad_batches=3), train_loader, loader(VALUES))


def test_a_nan_in_validation_is_never_the_best(tmp_path: Path) -> None:
    config = settings(val_check_interval=1, max_steps=3)
    module = Toy()
    values = iter([2.0, float("nan"), 3.0])
    module.validation_step = lambda batch, batch_idx: module.log("val/loss", next(values))  # type: ignore[method-assign]
    result = train(tmp_path, module, config, loader([1.0] * 8), loader([1.0]))
    assert state(tmp_path / "best")["step"] == 1 and result.best_value == 2.0


@pytest.mark.parametrize("precision", ["16", 16, "16-mixed", "16-true"])
def test_float16_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    config = settings(accelerator="auto", precision=precision)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="use bf16-mixed or 32"):
        check_trainer(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_trainer(config)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_epochs": -1}, "set max_steps"),
        ({"accelerator": "gpu"}, "there is no GPU here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_settings_that_cannot_work_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_trainer(settings(**params))


@pytest.mark.parametrize(
    ("devices", "fits"), [(2, True), ("2", True), ([0, 1], True), (-1, True), ("auto", True), (3, False), ("0,2", False)]
)
def test_more_devices_than_present_are_refused(monkeypatch: pytest.MonkeyPatch, devices: Any, fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = settings(accelerator="gpu", devices=devices)
    if fits:
        check_trainer(config)
    else:
        with pytest.raises(UserError, match=r"trainer\.params\.devices"):
            check_trainer(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_what_lightning_refuses_is_refused_before_a_run_directory_is_made() -> None:
    with pytest.raises(UserError, match=r"^trainer\.params: .*CPU"):
        check_trainer(settings(accelerator="cpu", devices=-1))


def test_every_name_of_a_strategy_is_one_of_lightning() -> None:
    assert set(get_args(Strategy)) - {"auto"} <= set(StrategyRegistry.available_strategies())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UserError) as refused:
        check_trainer(settings(max_epochs=-1, accelerator="gpu"))
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"limit_train_batches": 0.01}, "limit_train_batches: 0.01 of 4"),
        ({"overfit_batches": 0.1}, "overfit_batches: 0.1 of 4"),
        ({"val_check_interval": 9}, "val_check_interval: got 9, but an epoch has 4 batches"),
    ],
)
def test_lengths_that_do_not_fit_the_data_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        total_optimizer_steps(settings(**params), 4)


def test_what_lightning_refuses_is_a_user_error(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    config = settings(barebones=True, log_every_n_steps=1)
    with pytest.raises(UserError, match=r"trainer\.params: .*barebones"):
        build_trainer(config, run_dir=tmp_path, tracker=tracker, seed=0, save=saver(Toy()), choices=("val/loss",), total_steps=1)


def test_defaults_are_one_epoch_in_one_process() -> None:
    params = trainer_params(TrainerSettings())
    assert (params["max_epochs"], params["devices"], params["accelerator"]) == (1, 1, "auto")
    assert "max_epochs" not in trainer_params(TrainerSettings(params={"max_steps": 3}))


@pytest.mark.usefixtures("picture")
def test_a_run_is_quiet_but_for_its_own_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = settings(enable_progress_bar=True, max_steps=40, val_check_interval=20, num_sanity_val_steps=2)
        train(tmp_path / "run", Toy(), config, loader([1.0] * 80), loader(VALUES), finish=True)
    assert [str(warning.message) for warning in caught] == []
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert 20 <= len(lines) <= 24 and all(line.startswith("step ") for line in lines), captured.err
    assert "step 20: val/loss 3  val/weight 1  (best so far)" in lines
    assert captured.out.splitlines()[0].startswith("done: 40 steps in ")
    assert "best val/loss 3 (val/weight 1), step-000020" in captured.out
    assert (tmp_path / "latest").resolve() == tmp_path / "run" / "checkpoints" / "step-000020"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["monitor"], summary["best_value"]) == (40, "val/loss", 3.0)
    assert (tmp_path / "run" / "curves.png").exists() and (tmp_path / "run" / "metrics.csv").exists()


def test_frozen_parts_in_eval_mode_are_no_reason_to_warn(tmp_path: Path) -> None:
    module = Toy()
    module.drop.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path / "run", module, settings(max_steps=2), loader([1.0] * 4), loader(VALUES))
    assert [str(warning.message) for warning in caught] == []


def test_tokens_are_counted_without_padding() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert int(count_tokens({"input_ids": torch.zeros(2, 3), "attention_mask": mask, "labels": torch.zeros(2, 3)})) == 3
    assert count_tokens({"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(2, 1, 3, 3)}) == 6
    assert count_tokens({"tokens": 5, "input_ids": torch.zeros(2, 3)}) == 5
    two = {"input_ids": torch.zeros(1, 2), "decoder_input_ids": torch.zeros(1, 3), "decoder_attention_mask": torch.tensor([[1, 1, 0]])}
    assert int(count_tokens(two)) == 4
    assert count_tokens([1, 2]) == 0


@pytest.mark.parametrize(
    ("number", "code", "where", "saved"),
    [(signal.SIGTERM, 143, "step", 4), (signal.SIGINT, 130, "step", 4), (signal.SIGTERM, 143, "validation", 3)],
)
def test_a_signal_saves_and_leaves_with_its_code(
    tmp_path: Path, number: signal.Signals, code: int, where: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(ProgressReport, "note", lambda report, text: notes.append(text))
    with pytest.raises(SystemExit) as left:
        interrupted_run(tmp_path, where, lambda: os.kill(os.getpid(), number))
    assert left.value.code == code
    assert state(tmp_path / "last") == {"step": saved, "w": pytest.approx(1 - 0.9**saved, rel=1e-5), "metrics": {}}
    assert read_metrics(tmp_path)[-1]["step"] == saved
    assert (tmp_path / "metrics.csv").exists()
    assert notes[-1] == "to go on: the same command with --resume"


def test_a_signal_in_an_accumulation_waits_for_the_step(tmp_path: Path) -> None:
    module = Toy(start=0.0, lr=0.05)
    module.hook = lambda toy, step: os.kill(os.getpid(), signal.SIGTERM) if len(toy.rows) == 4 else None
    with pytest.raises(SystemExit):
        train(tmp_path, module, settings(accumulate_grad_batches=3), loader([1.0] * 40, accumulate=3), loader([1.0]))
    assert state(tmp_path / "last")["step"] == 2 and len(module.rows) == 6


def test_a_second_interrupt_leaves_without_saving(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as left:
        interrupted_run(tmp_path, "step", twice)
    assert left.value.code == 130
    assert state(tmp_path / "last")["step"] == 3  # of the validation before


def interrupted_run(run: Path, where: str, interrupt: Callable[[], None]) -> None:
    """Validates (and saves) at step 3; is interrupted in that validation or in the step after it."""
    module = Toy(start=0.0, lr=0.05)
    if where == "step":
        module.hook = lambda toy, step: interrupt() if step == 3 else None
    else:
        original = module.validation_step

        def validation_step(batch: dict[str, Any], batch_idx: int) -> None:
            original(batch, batch_idx)
            interrupt()

        module.validation_step = validation_step  # type: ignore[method-assign]
    train(run, module, settings(val_check_interval=3), loader([1.0] * 4000), loader([1.0] * 4))


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_lightning import interrupted_run
def wait():
    print("ready", flush=True)
    time.sleep(1.0)
interrupted_run(Path(sys.argv[3]), "step", wait)
"""


def test_a_process_that_is_told_to_end_exits_with_143(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert state(tmp_path / "last")["step"] == 4
    assert not [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    assert "Traceback" not in err


def cpu_settings(**params: object) -> TrainerSettings:
    return TrainerSettings(params={"accelerator": "cpu", **params})


def test_processes_on_one_machine_each_hold_the_whole_model() -> None:
    check_processes(cpu_settings(devices=2))
    assert trainer_params(cpu_settings(devices=2))["strategy"] == "ddp"
    assert [processes_of(cpu_settings(devices=devices)) for devices in (1, 3, "2", "auto")] == [1, 3, 2, 1]
    assert batch_words(cpu_settings(devices=2), 8) == "8 x 1 rows on each of 2 devices"
    with pytest.raises(UserError, match="num_nodes: got 2; to train on several machines, start the script on each of them with torchrun"):
        check_processes(cpu_settings(num_nodes=2))
    with pytest.raises(UserError, match=r"strategy: got 'single_device', expected auto or one of ddp, .*, fsdp"):
        check_processes(cpu_settings(devices=2, strategy="single_device"))


def test_what_accelerate_asks_for_and_the_trainer_would_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_processes(cpu_settings())
    asked = {"USE_FSDP": "true", "MIXED_PRECISION": "bf16"}
    shipped = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    for name, value in {**{f"ACCELERATE_{name}": value for name, value in asked.items()}, **shipped}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        check_processes(cpu_settings())
    strategy, precision = refused.value.problems
    assert strategy == "trainer.params.strategy: got ddp, but accelerate asks for fsdp; set it"
    assert precision.startswith("trainer.params.precision: got 32, but accelerate's mixed_precision is bf16")
    check_processes(cpu_settings(strategy="fsdp", precision="bf16-mixed"))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError) as refused:
        check_processes(cpu_settings(strategy="fsdp", precision="bf16-mixed"))
    assert refused.value.problems == (
        "accelerate's fsdp_offload_params: got true, expected false",
        "trainer.params.precision: got bf16-mixed, but accelerate's mixed_precision is fp16; set it, or let accelerate have no",
    )


def test_what_a_model_that_is_spread_cannot_do_is_refused() -> None:
    check_processes(cpu_settings(devices=2, strategy="fsdp", precision="bf16-mixed", gradient_clip_val=1.0))
    check_trainer(cpu_settings(devices=2, strategy="fsdp"))
    with pytest.raises(UserError, match=r"strategy: got fsdp, but the run is one process; set trainer\.params\.devices \(Ray: "):
        check_processes(cpu_settings(strategy="fsdp"))
    with pytest.raises(UserError) as refused:
        check_processes(
            settings(
                accelerator="gpu", devices=2, strategy="fsdp", precision="16-mixed", gradient_clip_val=1, gradient_clip_algorithm="value"
            )
        )
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        "trainer.params.precision",
        "trainer.params.gradient_clip_algorithm",
    ]
    check_processes(cpu_settings(devices=2, strategy="fsdp", precision="bf16-true"))
    for precision in ("bf16-true", 64):
        with pytest.raises(UserError, match=rf"precision: got '?{precision}'?, expected bf16-mixed or 32 under strategy deepspeed"):
            check_processes(TrainerSettings.model_construct(params={"devices": 2, "strategy": "deepspeed", "precision": precision}))


def test_processes_that_a_launcher_started_are_as_many_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with two processes each: the settings may say so, and say nothing else."""
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for asked in ({}, {"devices": 2}, {"devices": "auto", "num_nodes": 2}):
        check_processes(cpu_settings(**asked))
        params = trainer_params(cpu_settings(**asked))
        assert (params["devices"], params["num_nodes"], params["strategy"], processes_of(cpu_settings(**asked))) == (2, 2, "ddp", 4)
    with pytest.raises(UserError, match="devices: got 4, but 2 processes were started on this machine"):
        check_processes(cpu_settings(devices=4))
    with pytest.raises(UserError, match="num_nodes: got 1, but processes were started on 2"):
        check_processes(cpu_settings(num_nodes=1))
    with pytest.raises(UserError, match="--dry_run measures in one process"):
        check_processes(cpu_settings(), dry_run=True)
    monkeypatch.setenv("WORLD_SIZE", "5")  # two here, three on the other machine
    check_processes(cpu_settings())


def test_one_process_is_fewer_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="devices: got 2, but 1 processes were started on this machine"):
        check_processes(cpu_settings(devices=2))


def test_all_gpus_are_taken_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainerSettings(params={"max_epochs": 2})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for present, devices in ((0, None), (1, None), (4, 4)):
        monkeypatch.setattr("torch.cuda.device_count", lambda present=present: present)
        assert on_all_gpus(settings).params.get("devices") == devices
    assert on_all_gpus(TrainerSettings(params={"accelerator": "cpu"})).params == {"accelerator": "cpu"}
