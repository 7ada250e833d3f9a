"""Two processes with sharded weights (FSDP, DeepSpeed) make the numbers of one, save what one saves, and go on from it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

from common.checkpoint import verify_directory
from common.launch.runtime import Runtime
from common.launch.sharding import Sharding, launched_sharding
from common.lora import add_lora
from common.models.load import load_backbone, load_tokenizer
from common.schema import LoraSettings
from common.tracking import read_metrics
from common.training_state import read_training_state
from rlhf.ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf.ppo.models import Critic

PROMPTS = [[5 + number, *range(30, 30 + number * 5 % 7)] for number in range(11)]
HELD_OUT = [[60, 61], [62], [63, 64, 65, 66]]
STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "head": {"max_grad_norm": 0.3},
    "critic and adapters": {"critic": True, "lora": True, "gradient_checkpointing": True, "max_grad_norm": 0.3, "weight_decay": 0.1},
}
LAUNCHED = {
    "FSDP": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""What `accelerate launch` tells its processes."""
RESUMED = "critic and adapters"
RUNS = [("FSDP", "head"), ("FSDP", RESUMED), ("DeepSpeed", RESUMED)]


def by_length(responses: list[str]) -> list[float]:
    return [-0.1 * len(response) for response in responses]


def make_trainer(case: str, policy: str, runtime: Runtime, sharding: Sharding) -> PPOTrainer:
    settings = dict(CASES[case])
    critic = Critic(load_backbone(policy)) if settings.pop("critic", False) else None
    lora = LoraSettings(r=4) if settings.pop("lora", False) else None
    model = AutoModelForCausalLMWithValueHead.from_pretrained(policy)
    if lora is not None:
        model = AutoModelForCausalLMWithValueHead(add_lora(model.pretrained_model, lora, seed=3))
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    rows = 8 // runtime.world_size
    config = PPOConfig(batch_size=rows, mini_batch_size=rows, ppo_epochs=2, learning_rate=1e-3, classic_quirks=False, **settings)
    return PPOTrainer(config, model, None, load_tokenizer(policy), critic=critic, runtime=runtime, sharding=sharding)


def train(trainer: PPOTrainer, reward: Any, folder: Path, **options: Any) -> None:
    generation = {"max_new_tokens": 6, "temperature": 0.7}
    trainer.train(
        PROMPTS, reward=reward, generation=generation, steps=STEPS, eval_prompts=HELD_OUT, eval_every=2, save_to=folder,
        save_every=2, keep_last=2, **options,
    )  # fmt: skip


def rewards(case: str, judge: str) -> Any:
    return judge if "critic" in case else by_length


def process(rank: int, port: int, policy: str, judge: str, folder: str, kind: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= LAUNCHED[kind]
    with Runtime.start(timeout_s=60) as runtime:
        for case in [case for launched, case in RUNS if launched == kind]:
            trainer = make_trainer(case, policy, runtime, launched_sharding(runtime))
            train(trainer, rewards(case, judge), Path(folder) / case)
            (Path(folder) / f"{case}-{rank}").write_text("{} {}".format(*held(trainer)))
            if case == RESUMED:
                if rank == 0:
                    shutil.copytree(Path(folder) / case, Path(folder) / f"{case}-again", symlinks=True)
                runtime.barrier()
                again = make_trainer(case, policy, runtime, launched_sharding(runtime))
                train(again, rewards(case, judge), Path(folder) / f"{case}-again" / "checkpoints" / "step-000002", resume=True)


def held(trainer: PPOTrainer) -> tuple[int, int]:
    """Numbers that this process holds, of weights, moments and the reference, and those that there are."""
    moments: list[Any] = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    weights: list[Any] = [*trainer.parameters, *trainer.ref_model.parameters(), *trainer.model.parameters()]
    if trainer.sharding.name == "FSDP":
        return sum(tensor.to_local().numel() for tensor in moments + weights), sum(tensor.numel() for tensor in moments + weights)
    # beside its part of them, DeepSpeed keeps weights whole that are as small as these
    numbers = [weight.ds_numel for weight in weights] + 2 * [weight.ds_numel for weight in weights[: len(trainer.parameters)]]
    return sum(weight.ds_tensor.numel() for weight in weights) + sum(moment.numel() for moment in moments), sum(numbers)


@pytest.fixture(scope="module")
def runs_under(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path, reward_dir: Path) -> Callable[[str], Path]:
    """`runs_under(kind)`: the folder of every case's run with two processes, which are started once."""

    @cache
    def started(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("sharded")
        start(kind, policy_dir, reward_dir, folder)
        return folder

    return started


@pytest.fixture
def runs(request: pytest.FixtureRequest, runs_under: Callable[[str], Path]) -> Path:
    """The folder of every case's run with two processes under what a test names."""
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed", reason="requirements-deepspeed.txt is not installed")
    return runs_under(request.param)


def start(kind: str, policy_dir: Path, reward_dir: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(policy_dir), str(reward_dir), str(folder), kind)
    start_processes(process, args=arguments, nprocs=2, start_method="fork")


@pytest.mark.parametrize(("runs", "case"), RUNS, indirect=["runs"])
def test_sharded_processes_make_the_numbers_of_one(case: str, runs: Path, policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    alone = make_trainer(case, str(policy_dir), Runtime.local("cpu"), Sharding())
    train(alone, rewards(case, str(reward_dir)), tmp_path / "alone")
    for mine, theirs in zip(read_metrics(tmp_path / "alone"), read_metrics(runs / case), strict=True):
        for name, value in mine.items():
            if not name.startswith("perf/") and name != "time":
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert verify_directory(runs / case / "last") == []
    for file in ("model.safetensors", "value_head.safetensors") if "critic" not in case else ("model.safetensors",):
        own, saved = (load_file(folder / "last" / file) for folder in (tmp_path / "alone", runs / case))
        assert own.keys() == saved.keys()
        for name, tensor in own.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-4)
    assert type(AutoModelForCausalLM.from_pretrained(runs / case / "last")).__name__ == "GPTNeoForCausalLM"


@pytest.mark.parametrize(("runs", "case"), RUNS, indirect=["runs"])
def test_a_process_holds_half_of_weights_and_moments_between_phases(case: str, runs: Path) -> None:
    for rank in range(2):
        own, whole = map(int, (runs / f"{case}-{rank}").read_text().split())
        assert own < 0.55 * whole


@pytest.mark.parametrize("runs", [*LAUNCHED], indirect=True)
def test_a_sharded_run_that_goes_on_ends_with_the_bits_of_one_that_never_stopped(runs: Path) -> None:
    states = [flat(read_training_state(runs / name / "last")) for name in (RESUMED, f"{RESUMED}-again")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
    whole, resumed = ((runs / name / "last" / "model.safetensors").read_bytes() for name in (RESUMED, f"{RESUMED}-again"))
    assert whole == resumed


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """The values of a nested state by the way to them."""
    if not isinstance(state, dict | list | tuple):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {way: value for key, item in items for way, value in flat(item, f"{name}.{key}").items()}
