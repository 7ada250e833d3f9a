"""Two processes with sharded weights (FSDP) make the numbers of one, save what one saves, and go on from it."""

from __future__ import annotations

import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
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
    "critic and adapters": {"critic": True, "lora": True, "gradient_checkpointing": True},
}
LAUNCHED = {
    "FSDP": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""What `accelerate launch` tells its processes."""
RESUMED = "critic and adapters"


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
        for case in CASES:
            trainer = make_trainer(case, policy, runtime, launched_sharding(runtime))
            train(trainer, rewards(case, judge), Path(folder) / case)
            if kind == "DeepSpeed":
                continue  # which keeps weights whole that are as small as these
            held = [trainer.parameters, *(state.values() for state in trainer.optimizer.state.values())]
            held += [network.parameters() for network in (trainer.ref_model, trainer.model)]
            tensors = [tensor for group in held for tensor in group if tensor.ndim]
            own = sum(tensor.to_local().numel() for tensor in tensors)  # type: ignore[operator]
            (Path(folder) / f"{case}-{rank}").write_text(f"{own} {sum(tensor.numel() for tensor in tensors)}")
            if case == RESUMED and trainer.sharding.resumes:
                if rank == 0:
                    shutil.copytree(Path(folder) / case, Path(folder) / f"{case}-again", symlinks=True)
                runtime.barrier()
                again = make_trainer(case, policy, runtime, launched_sharding(runtime))
                train(again, rewards(case, judge), Path(folder) / f"{case}-again" / "checkpoints" / "step-000002", resume=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path, reward_dir: Path) -> Path:
    """The folder of every case's run with two processes under FSDP."""
    folder = tmp_path_factory.mktemp("sharded")
    start("FSDP", policy_dir, reward_dir, folder)
    return folder


def start(kind: str, policy_dir: Path, reward_dir: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port, str(policy_dir), str(reward_dir), str(folder), kind), nprocs=2)


@pytest.mark.parametrize("case", CASES)
def test_sharded_processes_make_the_numbers_of_one(case: str, runs: Path, policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    compare(case, runs, policy_dir, reward_dir, tmp_path)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_processes_of_deepspeed_do_so_too(policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    start("DeepSpeed", policy_dir, reward_dir, tmp_path)
    for case in CASES:
        compare(case, tmp_path, policy_dir, reward_dir, tmp_path / f"{case} alone")
        assert read_training_state(tmp_path / case / "last")["trainer"] == {}


def compare(case: str, runs: Path, policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    """A run of one process with the sharded one."""
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


@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_half_of_weights_and_moments_between_phases(case: str, runs: Path) -> None:
    for rank in range(2):
        own, whole = map(int, (runs / f"{case}-{rank}").read_text().split())
        assert own < 0.55 * whole


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
