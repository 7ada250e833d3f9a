"""What accelerate's launcher asks for reaches PPO, and what nobody would read is refused in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as launcher
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from common.errors import UserError
from common.launch import fsdp
from common.launch.runtime import Runtime
from common.launch.sharding import Sharding, launched_sharding

CONFIGS = Path(__file__).resolve().parents[3] / "rlhf" / "configs" / "accelerate"
Launch = Callable[..., None]
TWO = Runtime(torch.device("cpu"), 0, 2)


class Kept:
    """Stands for networks that are really sharded, which takes processes."""

    def __init__(self, runtime: Runtime, *, reshard_after_forward: bool) -> None:
        self.reshard_after_forward = reshard_after_forward


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`launch(config, *options)` sets the environment that `accelerate launch` gives its processes."""

    def start(name: str, *options: str) -> None:
        arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), *options, "train_ppo.py"])
        if name.startswith("deepspeed"):
            monkeypatch.setattr(launcher, "is_deepspeed_available", lambda: True)
            arguments = _validate_launch_command(arguments)[0]
            arguments.deepspeed_fields_from_accelerate_config = ""  # as its own command does
            environment = prepare_deepspeed_cmd_env(arguments)[1]
        else:
            environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
        for variable, value in environment.items():
            if os.environ.get(variable) != value:
                monkeypatch.setenv(variable, value)
        monkeypatch.setattr(fsdp, "FullySharded", Kept)
        monkeypatch.setitem(sys.modules, "common.launch.zero3", SimpleNamespace(Zero3=lambda runtime: "sharded"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)

    return start


def test_without_a_launcher_or_with_plain_data_parallelism_nothing_is_sharded(launch: Launch) -> None:
    assert type(launched_sharding(Runtime.local("cpu"))) is Sharding
    launch("ddp.yaml")
    assert type(launched_sharding(TWO)) is Sharding


@pytest.mark.parametrize(("options", "reshards"), [([], True), (["--fsdp_reshard_after_forward", "false"], False)])
def test_the_shipped_fsdp_settings_shard(launch: Launch, options: list[str], reshards: bool) -> None:
    launch("fsdp.yaml", *options)
    asked = launched_sharding(TWO)
    assert isinstance(asked, Kept) and asked.reshard_after_forward is reshards


FSDP, ZERO = "fsdp.yaml", "deepspeed_zero3.yaml"


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        (FSDP, ["--fsdp_version", "1"], "fsdp_version: got 1, expected 2"),
        (FSDP, ["--fsdp_offload_params", "true"], "fsdp_offload_params: got true, expected false"),
        (FSDP, ["--fsdp_cpu_ram_efficient_loading", "true"], "fsdp_cpu_ram_efficient_loading: got true, expected false"),
        (FSDP, ["--fsdp_activation_checkpointing", "true"], "gradient_checkpointing does it"),
        (FSDP, ["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"], "got SIZE_BASED_WRAP, expected TRANSFORMER_BASED_WRAP"),
        (FSDP, ["--fsdp_transformer_layer_cls_to_wrap", "GPTNeoBlock"], "fsdp_transformer_layer_cls_to_wrap: got GPTNeoBlock"),
        (FSDP, ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"], "fsdp_state_dict_type: got SHARDED_STATE_DICT"),
        (FSDP, ["--fsdp_reshard_after_forward", "FULL_SHARD"], "fsdp_reshard_after_forward: got full_shard, expected true or false"),
        (FSDP, ["--mixed_precision", "bf16"], "mixed_precision: got bf16, but ppo_config.mixed_precision is no, which counts; set that"),
        (FSDP, ["--mixed_precision", "fp16"], "mixed_precision: got fp16, .* counts; let accelerate have no"),
        (FSDP, ["--dynamo_backend", "inductor"], "dynamo_backend: got INDUCTOR, expected no"),
        ("ddp.yaml", ["--dynamo_backend", "inductor"], "dynamo_backend: got INDUCTOR, expected no"),
        (ZERO, ["--zero_stage", "2"], "zero_stage: got 2, expected 3"),
        (ZERO, ["--offload_param_device", "cpu"], "offload_param_device: got cpu, expected none"),
        (ZERO, ["--offload_optimizer_device", "nvme"], "offload_optimizer_device: got nvme, expected none"),
        (ZERO, ["--gradient_clipping", "1.0"], "gradient_clipping: got 1.0, expected none"),
        (ZERO, ["--gradient_accumulation_steps", "4"], "gradient_accumulation_steps: got 4, expected 1"),
        (ZERO, ["--zero3_init_flag", "true"], "zero3_init_flag: got true, expected false: each process reads the files"),
    ],
)
def test_settings_that_nobody_reads_are_refused(launch: Launch, config: str, options: list[str], problem: str) -> None:
    launch(config, *options)
    with pytest.raises(UserError, match=problem) as refused:
        launched_sharding(TWO)
    assert len(refused.value.problems) == 1


def test_the_shipped_deepspeed_settings_shard(launch: Launch) -> None:
    launch(ZERO)
    assert launched_sharding(TWO) == "sharded"


def test_a_lonely_process_that_should_be_sharded_is_refused(launch: Launch) -> None:
    launch("fsdp.yaml")
    with pytest.raises(UserError, match="this process is alone"):
        launched_sharding(Runtime(torch.device("cpu")))


def test_a_launcher_that_asks_for_deepspeed_where_there_is_none_is_refused(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(ZERO)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed; pip install -r requirements-deepspeed"):
        launched_sharding(TWO)
