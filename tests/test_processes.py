"""Every stage that Lightning trains: two processes do what one does with batches of twice the size, and leave the same run behind."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file

import reward_model.classification.train_reward
import reward_model.regression.train_reward
import sft.train_sft
from common.errors import UserError
from common.followers import rank
from common.launch.callbacks import Checkpoints
from common.tracking import read_metrics
from reward_model.classification.module import PairModule
from reward_model.regression.module import ScoreModule
from sft.module import SFTModule
from tests.processes import as_launched

MAINS: dict[str, Callable[[Any], int]] = {
    "sft": sft.train_sft.main,
    "reward_classification": reward_model.classification.train_reward.main,
    "reward_regression": reward_model.regression.train_reward.main,
}
MODULES: dict[str, type[pl.LightningModule]] = {
    "sft": SFTModule,
    "reward_classification": PairModule,
    "reward_regression": ScoreModule,
}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 8, "max_position_embeddings": 64}
T5 = {"model_type": "t5", "config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}}
FROZEN = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff")}
GENERATED = {"evaluation": {"num_generated": 5, "generate_params": {"max_new_tokens": 6, "do_sample": True}}}


def rows(stage: str, first: int, count: int) -> list[dict[str, Any]]:
    """Rows whose answers are of unequal length."""
    made = []
    for number in range(first, first + count):
        question, answer = f"What is thing {number}?", f"good {'thing ' * (number % 4)}{number}"
        other = {"reward_classification": {"Accepted_Answer": answer, "Answer": f"bad {number}"}}
        made.append({"Question": question, "Answer": answer, "Score": float(number % 5)} | other.get(stage, {}))
    return made


def write_config(stage: str, tmp_path: Path, **changes: Any) -> Path:
    """A config of 10 steps over 2 epochs (21 rows make 6 batches of 4), validated on 5 rows."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "data.json").write_text(json.dumps({"train": rows(stage, 0, 21), "val": rows(stage, 30, 5)}))
    settings: dict[str, Any] = {
        "index": 0,
        "data": {"data_dir": str(tmp_path / "data.json"), "batch_size": 4, "val_batch_size": 2, "max_length": 48},
        "model_init": {"model_type": "gpt_neo", "vocab_size": 280, "config": NEO},
        "model_params": {"learning_rate": 1e-2, "do_compute_metrics": stage == "sft"},
        "trainer": {
            "checkpoint": {"dirpath": str(tmp_path / "models")},
            "process_timeout_s": 60,
            "params": {
                "accelerator": "cpu", "max_steps": 10, "max_epochs": 4, "log_every_n_steps": 1, "enable_progress_bar": False,
                "accumulate_grad_batches": 2,
            },
        },
        "wandb": {"mode": "disabled"},
        **(GENERATED if stage == "sft" else {}),
    }  # fmt: skip
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def noting_rows(monkeypatch: pytest.MonkeyPatch, stage: str, folder: Path) -> None:
    """Let each process write down which rows enter which step."""
    original = MODULES[stage].training_step
    folder.mkdir()

    def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
        counted = batch["labels"].ne(-100).any() if stage == "sft" else batch["weight"].sum() > 0
        here = list(batch["rows"]) if stage == "sft" else batch["index"].tolist()
        with (folder / f"rows-{rank()}").open("a") as file:
            file.write(json.dumps([module.trainer.global_step, here if counted else []]) + "\n")
        return original(module, batch, batch_idx)

    monkeypatch.setattr(MODULES[stage], "training_step", training_step)


def rows_by_step(folder: Path) -> dict[int, list[int]]:
    found = defaultdict(list)
    for file in folder.glob("rows-*"):
        for step, places in map(json.loads, file.read_text().splitlines()):
            found[step] += places
    return {step: sorted(places) for step, places in found.items()}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in (run_dir / "last/").glob("model*.safetensors") for name, tensor in load_file(file).items()}


def figures(run_dir: Path, prefixes: tuple[str, ...] = ("train/", "val/")) -> dict[tuple[int, str], float]:
    lines = read_metrics(run_dir)
    return {(line["step"], name): value for line in lines for name, value in line.items() if name.startswith(prefixes)}


def check_equal(one: Path, two: Path, *, losses: float = 1e-5, of_weights: float = 1e-4) -> None:
    """Losses and weights agree, and both runs have left the same files."""
    expected, found = figures(one), figures(two)
    assert expected.keys() == found.keys()
    assert found == pytest.approx(expected, rel=losses, abs=losses)
    tensors = weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensors.pop(name), tensor, rtol=0, atol=of_weights, msg=name)
    assert not tensors
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, two)]
    assert names[0] == names[1]


def stopping_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second process get a signal in the fifth step of SFT."""
    original = SFTModule.training_step

    def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
        if module.trainer.global_step == 4 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", training_step)


def check_same_bits(whole: Path, stopped: Path) -> None:
    """A run that went on ended with the figures and weights of one that never stopped."""
    assert figures(stopped) == figures(whole)
    expected, found = weights(whole), weights(stopped)
    assert found.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", {"data": {"batching": "packed"}, "model_params": {"learning_rate": 1e-2, "lora": {"r": 2}}}),
    ("sft", {"model_init": T5, "data": {"batching": "bucketed"}}),
    ("sft", {"model_params": {"learning_rate": 1e-2, "layers_not_to_freeze": [-1], "cache_states": "float32", **FROZEN}}),
    ("reward_classification", {}),
    ("reward_regression", {"data": {"batching": "bucketed"}}),
]


@pytest.mark.parametrize(("stage", "changes"), CASES, ids=["sft", "sft-packed-lora", "sft-t5", "sft-cached", "pairs", "scores"])
def test_two_processes_train_what_one_does(stage: str, changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(stage, tmp_path, **changes)
    with monkeypatch.context() as patch:
        noting_rows(patch, stage, tmp_path / "rows-one")
        assert MAINS[stage]([f"--config={path}", "desc=one"]) == 0
    with monkeypatch.context() as patch:
        noting_rows(patch, stage, tmp_path / "rows-two")
        codes, printed = as_launched(MAINS[stage], [f"--config={path}", "desc=two", "data.batch_size=2"], tmp_path)
    assert codes == [0, 0], printed
    one, two = (tmp_path / "models" / f"desc-{name},index-0" for name in ("one", "two"))
    assert rows_by_step(tmp_path / "rows-one") == rows_by_step(tmp_path / "rows-two")
    check_equal(one, two)
    assert (tmp_path / "printed-1").read_text() == "" and "steps of 2 x 2 rows on each of 2 devices" in printed
    if stage == "sft":
        tables = [sorted((run / "tables").iterdir())[-1].read_text() for run in (one, two)]
        assert tables[0] == tables[1] and len(tables[0].splitlines()) == 5
    assert os.readlink(tmp_path / "models" / "latest") == "desc-two,index-0/best"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_stop_after_the_same_step_and_go_on_together(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal reaches one of them alone, and dropout draws of each what it had drawn."""
    path = write_config("sft", tmp_path, model_params={"learning_rate": 1e-2, "dropout": 0.2})
    command = [f"--config={path}", "data.batch_size=2", "trainer.params.accumulate_grad_batches=1", f"trainer.params.strategy={strategy}"]
    assert as_launched(MAINS["sft"], [*command, "desc=whole"], tmp_path)[0] == [0, 0]
    with monkeypatch.context() as patch:
        stopping_the_second(patch)
        codes, printed = as_launched(MAINS["sft"], [*command, "desc=stopped"], tmp_path)
    assert codes == [143, 143] and printed.count("to go on: the same command with --resume") == 1, printed
    assert (tmp_path / "printed-1").read_text() == ""
    if strategy == "ddp":  # told before the data are read
        (tmp_path / "data.json").rename(tmp_path / "elsewhere.json")
        with pytest.raises(UserError, match="--resume: 1 process now, 2 when the run began; start as many"):
            MAINS["sft"]([*command, "desc=stopped", "--resume"])
        (tmp_path / "elsewhere.json").rename(tmp_path / "data.json")
    assert as_launched(MAINS["sft"], [*command, "desc=stopped", "--resume"], tmp_path)[0] == [0, 0]
    check_same_bits(*(tmp_path / "models" / f"desc-{name},index-0" for name in ("whole", "stopped")))


def test_what_is_wrong_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.errors.LEADER_SPEAKS_S", 0.0)
    path = write_config("sft", tmp_path)
    codes, printed = as_launched(MAINS["sft"], [f"--config={path}", "trainer.params.devices=3"], tmp_path)
    assert codes == [2, 2] and printed.count("error: ") == 1
    assert "trainer.params.devices: got 3, but 2 processes were started on this machine" in printed
    codes, printed = as_launched(MAINS["sft"], [f"--config={path}", "launch.num_training_workers=4"], tmp_path)
    assert codes == [2, 2] and "launch.num_training_workers: got 4, but 2 processes train" in printed
    assert not (tmp_path / "models").exists()


def test_rows_that_only_another_process_knows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config("sft", tmp_path)
    original = SFTModule.training_step
    monkeypatch.setattr(SFTModule, "training_step", lambda *batch: original(*batch) * (float("nan") if rank() == 1 else 1.0))
    codes, printed = as_launched(MAINS["sft"], [f"--config={path}"], tmp_path)
    assert codes == [2, 2] and (tmp_path / "printed-1").read_text() == ""
    assert printed.count("error: ") == 2 and "error: step 1: the loss is not finite (rows: " in printed


@pytest.mark.parametrize(("stage", "changes"), CASES[:2] + CASES[-2:], ids=["sft", "sft-packed-lora", "pairs", "scores"])
def test_a_model_that_is_spread_trains_as_one_that_is_whole(
    stage: str, changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(stage, tmp_path, **changes)
    clipped = "trainer.params.gradient_clip_val=0.5"
    assert MAINS[stage]([f"--config={path}", "desc=one", clipped]) == 0
    original = Checkpoints.on_train_end

    def on_train_end(callbacks: Any, trainer: Any, module: Any) -> None:
        moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        held = sum(moment.to_local().numel() for moment in moments) / sum(moment.numel() for moment in moments)
        (tmp_path / f"held-{rank()}").write_text(str(held))
        original(callbacks, trainer, module)

    monkeypatch.setattr(Checkpoints, "on_train_end", on_train_end)
    command = [f"--config={path}", clipped, "data.batch_size=2", "trainer.params.strategy=fsdp"]
    codes, printed = as_launched(MAINS[stage], [*command, "desc=two"], tmp_path)
    assert codes == [0, 0], printed
    one, two = (tmp_path / "models" / f"desc-{name},index-0" for name in ("one", "two"))
    check_equal(one, two)
    held = [float((tmp_path / f"held-{number}").read_text()) for number in range(2)]
    assert sum(held) == 1 and max(held) < 0.6
