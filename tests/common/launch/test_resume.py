"""A training that was stopped after any step, in any validation, and goes on gives the bits of one that never stopped."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.batching import Batch, BatchPlan, batch_loader
from common.checkpoint import Manifest, atomic_directory
from common.closing import RunResult
from common.errors import UserError
from common.launch.lightning import build_trainer, fit, total_optimizer_steps
from common.launch.signals import Stopped
from common.resume import ResumePoint
from common.runs import checkpoints_in, step_of
from common.schema import CheckpointSettings, TrainerSettings
from common.tracking import Tracker, read_metrics
from common.training_state import read_training_state

ROWS = 11


class Net(pl.LightningModule):
    """Dropout, momentum and a schedule over two layers; records the rows it saw."""

    logged_metrics = ("val/loss",)

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.register_buffer("seen", torch.zeros(()))
        self.total_steps = total_steps
        self.rows: list[list[int]] = []
        self.steps_seen: list[int] = []
        self.hook: Callable[[str, int], None] = lambda place, step: None

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return (self.layers(batch["x"]).squeeze(1) - batch["x"].sum(1)).square().sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.rows.append(batch["rows"])
        self.seen += len(batch["rows"])
        self.hook("step", self.trainer.global_step)
        loss = self.loss(batch) / batch["denominator"]
        self.log("train/own", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.hook("validation", self.trainer.global_step)
        self.log("val/loss", self.loss(batch) / len(batch["x"]), batch_size=len(batch["x"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / (self.total_steps + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data(num_workers: int, accumulate: int, training: bool) -> DataLoader[Any]:
    values = torch.linspace(-1, 1, ROWS * 3).reshape(ROWS, 3)

    def collate(batch: Batch) -> dict[str, Any]:
        return {"x": values[batch.indices], "rows": batch.indices, "denominator": batch.denominator}

    mode: Any = "random" if training else "sequential"
    plan = BatchPlan([1] * ROWS, batch_size=2, seed=3, accumulate=accumulate if training else 1, mode=mode)
    return batch_loader(plan, collate, num_workers=num_workers)


def run(
    directory: Path,
    *,
    accumulate: int,
    num_workers: int = 0,
    every: int | None = None,
    params: dict[str, Any] | None = None,
    hook: Callable[[str, int], None] | None = None,
    resume: ResumePoint | None = None,
) -> tuple[Net, RunResult | None]:
    directory.mkdir(exist_ok=True)
    settings = TrainerSettings(
        checkpoint=CheckpointSettings(every_n_train_steps=every),
        params={
            "accelerator": "cpu",
            "log_every_n_steps": 2,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "max_epochs": 3,
            "accumulate_grad_batches": accumulate,
            **(params or {}),
        },
    )
    train_loader, val_loader = data(num_workers, accumulate, True), data(0, 1, False)
    total = total_optimizer_steps(settings, len(train_loader))
    module = Net(total)
    if hook is not None:
        module.hook = hook

    def save(folder: Path, metrics: dict[str, float], step: int, extra: Callable[[Path], None]) -> None:
        with atomic_directory(folder) as staging:
            extra(staging)
            (staging / "facts.json").write_text(json.dumps({"step": step, "metrics": metrics}))

    with Tracker(directory, stage="sft") as tracker:
        trainer = build_trainer(
            settings,
            run_dir=directory,
            tracker=tracker,
            seed=5,
            save=save,
            choices=module.logged_metrics,
            total_steps=total,
            resume=resume,
        )
        return module, fit(trainer, module, train_loader, val_loader)


def interrupted(directory: Path, place: str, step: int, **options: Any) -> None:
    """Ask the run to stop in a training step after `step` steps, or in the validation of that step."""

    def hook(where: str, now: int) -> None:
        if (where, now) == (place, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(directory, hook=hook, **options)
    assert not multiprocessing.active_children()  # data workers


def last(directory: Path) -> ResumePoint:
    checkpoint = checkpoints_in(directory / "checkpoints")[-1]
    return ResumePoint(directory, checkpoint, Manifest(stage="sft", tokenizer_fingerprint="", step=step_of(checkpoint)))


def content(directory: Path) -> dict[str, Any]:
    """Everything a run leaves, without times."""
    states = {}
    for checkpoint in checkpoints_in(directory / "checkpoints"):
        state = read_training_state(checkpoint)
        states[checkpoint.name] = flat({part: state[part] for part in ("step", "epoch", "batches", "weights", "optimizers", "schedulers")})
    lines = [
        {name: value for name, value in line.items() if name != "time" and not name.startswith("perf/")} for line in read_metrics(directory)
    ]
    return {
        "states": states,
        "metrics": lines,
        "links": {name: os.readlink(directory / name) for name in ("best", "last")},
    }


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {str(name): flat(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value


def summary(result: RunResult | None) -> Any:
    assert result is not None
    return result.monitor, result.best_value, result.best_metrics, result.model.name, result.steps, result.validated


SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate": 2},  # 6 batches, 3 steps an epoch
    "uneven accumulation": {"accumulate": 4, "every": 1},  # steps over 4 and 2 batches
    "validation in mid-epoch, saves between": {"accumulate": 1, "every": 2, "params": {"val_check_interval": 4}},
    "validation every second epoch": {"accumulate": 2, "every": 2, "params": {"check_val_every_n_epoch": 2}},
    "validation counted over epochs": {"accumulate": 1, "params": {"val_check_interval": 5, "check_val_every_n_epoch": None}},
    "the same batches always": {"accumulate": 1, "params": {"overfit_batches": 4}},
    "an end in mid-epoch": {"accumulate": 1, "every": 3, "params": {"max_steps": 8}},
    "weights in bfloat16": {"accumulate": 2, "params": {"precision": "bf16-true"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_after_any_step_and_resumed(tmp_path: Path, name: str) -> None:
    options = SETTINGS[name]
    whole, result = run(tmp_path / "whole", **options)
    expected, total = content(tmp_path / "whole"), summary(result)[4]
    validated = sorted({line["step"] for line in expected["metrics"] if "val/loss" in line})
    places = [("step", step) for step in range(total)] + [("validation", step) for step in validated]
    assert total >= 6 and validated
    for place, step in places:
        directory = tmp_path / f"{place}-{step}"
        interrupted(directory, place, step, **options)
        stopped_at = step + (place == "step")
        point = last(directory)
        assert point.step == stopped_at
        module, resumed = run(directory, resume=point, **options)
        assert summary(resumed) == summary(result), (place, step)
        got = content(directory)
        assert got["metrics"] == expected["metrics"], (place, step)
        assert got["links"] == expected["links"]
        assert [got["states"][name] for name in expected["states"] if name in got["states"]] == [
            state for name, state in expected["states"].items() if name in got["states"]
        ], (place, step)
        assert list(expected["states"])[-1] in got["states"]
        if module.rows:
            assert module.rows == whole.rows[-len(module.rows) :]


@pytest.mark.parametrize("steps", [(1, 4), (2, 7), (3, 3), (5, 6)])
def test_resumed_twice_with_data_workers(tmp_path: Path, steps: tuple[int, int]) -> None:
    options: dict[str, Any] = {"accumulate": 2, "num_workers": 2}
    run(tmp_path / "whole", **{**options, "num_workers": 0})
    directory = tmp_path / "stopped"
    first, second = steps
    interrupted(directory, "step", first, **options)
    if second > first:
        interrupted(directory, "step", second, resume=last(directory), **options)
    run(directory, resume=last(directory), **options)
    assert content(directory)["metrics"] == content(tmp_path / "whole")["metrics"]
    assert content(directory)["states"]["step-000009"] == content(tmp_path / "whole")["states"]["step-000009"]


def test_a_run_that_was_killed_goes_on_from_its_last_save(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def hook(place: str, step: int) -> None:
        if step == 7:
            raise Killed

    options: dict[str, Any] = {"accumulate": 2, "every": 2}
    run(tmp_path / "whole", **options)
    with pytest.raises(Killed):
        run(tmp_path / "killed", hook=hook, **options)
    point = last(tmp_path / "killed")
    assert point.step == 6
    run(tmp_path / "killed", resume=point, **options)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_the_time_that_may_be_spent_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour a step: three steps before the stop, which saves, leave one of four hours."""
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * hours, time=time.time)
    monkeypatch.setattr("pytorch_lightning.callbacks.timer.time", clock)
    hours = 0

    def hook(place: str, step: int) -> None:
        nonlocal hours
        hours += place == "step"
        if step == 2 and place == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    options: dict[str, Any] = {"accumulate": 1, "params": {"max_time": "00:04:00:00"}}
    with pytest.raises(Stopped):
        run(tmp_path / "run", hook=hook, **options)
    assert last(tmp_path / "run").step == 3
    _, result = run(tmp_path / "run", resume=last(tmp_path / "run"), hook=hook, **options)
    assert result is not None and result.steps == 4


def test_after_the_last_step_moments_and_gradients_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    original = Net.configure_optimizers

    def noting(net: Net) -> Any:
        settled = original(net)
        made.append(weakref.ref(settled["optimizer"]))
        return settled

    monkeypatch.setattr(Net, "configure_optimizers", noting)
    net, result = run(tmp_path / "run", accumulate=1)
    assert result is not None and result.steps > 0
    gc.collect()
    assert [optimizer() for optimizer in made] == [None]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate": 2, "every": 1}
    run(tmp_path / "run", **options)
    expected = content(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    earlier = checkpoints_in(folder)[-2]
    point = ResumePoint(tmp_path / "run", earlier, Manifest(stage="sft", tokenizer_fingerprint="", step=step_of(earlier)))
    run(tmp_path / "run", resume=point, **options)
    assert content(tmp_path / "run") == expected
    assert (folder / "aside-step-000009").is_dir()


def test_another_number_of_processes_or_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "run", "step", 1, accumulate=2)
    point = last(tmp_path / "run")
    point.state["processes"] = 2
    with pytest.raises(UserError, match="1 process now, 2 when the run began"):
        run(tmp_path / "run", accumulate=2, resume=point)
    point = last(tmp_path / "run")
    point.state["weights"]["other"] = torch.zeros(1)
    with pytest.raises(UserError, match="other is in them alone"):
        run(tmp_path / "run", accumulate=2, resume=point)


def test_what_is_refused_loses_neither_metrics_nor_checkpoints(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate": 2, "every": 1}
    run(tmp_path / "run", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    earlier = checkpoints_in(tmp_path / "run" / "checkpoints")[-2]
    point = ResumePoint(tmp_path / "run", earlier, Manifest(stage="sft", tokenizer_fingerprint="", step=step_of(earlier)))
    point.state["frozen"] = "other"
    with pytest.raises(UserError, match="the frozen weights are not those that the run began with"):
        run(tmp_path / "run", resume=point, **options)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "metrics.csv"}
    assert after == {path: time for path, time in before.items() if path.name != "metrics.csv"}


def test_metrics_that_were_cut_off_are_missed(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", "step", 4, accumulate=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"metrics\.jsonl: holds \d+ bytes, \d+ when the checkpoint was saved"):
        run(tmp_path / "run", accumulate=2, resume=last(tmp_path / "run"))


def test_the_state_holds_all_bits_and_no_pickle(tmp_path: Path) -> None:
    from common.training_state import write_training_state

    whole = torch.arange(3.0)
    state = {
        "tensor": torch.tensor([0.1, float("nan"), -0.0]).double(),
        3: {"tuple": (1, 0.1 + 0.2, None), "list": [True, "x"]},
        "infinity": float("inf"),
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "views": [whole, whole[1:]],
    }
    write_training_state(tmp_path, state)
    back = read_training_state(tmp_path)
    assert repr(back) == repr(state)
    with pytest.raises(TypeError, match="cannot hold a set"):
        write_training_state(tmp_path, {"x": {1}})
    assert sys.getsizeof(back) and {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
