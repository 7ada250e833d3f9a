"""What accelerate's launcher asks for reaches PPO, and what nobody would read is refused in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

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
        for variable, value in prepare_multi_gpu_env(_validate_launch_command(arguments)[0]).items():
            if os.environ.get(variable) != value:
                monkeypatch.setenv(variable, value)
        monkeypatch.setattr(fsdp, "FullySharded", Kept)

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


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--fsdp_version", "1"], "fsdp_version: got 1, expected 2"),
        (["--fsdp_offload_params", "true"], "fsdp_offload_params: expected false"),
        (["--fsdp_cpu_ram_efficient_loading", "true"], "fsdp_cpu_ram_efficient_loading: expected false"),
        (["--fsdp_activation_checkpointing", "true"], "gradient_checkpointing does it"),
        (["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"], "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP"),
        (["--mixed_precision", "bf16"], "mixed_precision: got bf16, but ppo_config.mixed_precision is no"),
    ],
)
def test_settings_that_nobody_reads_are_refused(launch: Launch, options: list[str], problem: str) -> None:
    launch("fsdp.yaml", *options)
    with pytest.raises(UserError, match=problem) as refused:
        launched_sharding(TWO)
    assert len(refused.value.problems) == 1


def test_a_lonely_process_that_should_be_sharded_is_refused(launch: Launch) -> None:
    launch("fsdp.yaml")
    with pytest.raises(UserError, match="this process is alone"):
        launched_sharding(Runtime(torch.device("cpu")))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage: expected 3"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device: expected none"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "ppo_config.max_grad_norm does it"),
    ],
)
def test_deepspeed_is_zero_3_with_nothing_that_ppo_does_itself(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], problem: str | None
) -> None:
    asked = yaml.safe_load((CONFIGS / "deepspeed_zero3.yaml").read_text())["deepspeed_config"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "common.launch.zero3", SimpleNamespace(Zero3=lambda runtime: "sharded"))
    shipped = {f"ACCELERATE_DEEPSPEED_{name.upper()}": str(value).lower() for name, value in asked.items()}
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **shipped, **settings}.items():
        monkeypatch.setenv(name, value)
    if problem is None:
        assert launched_sharding(TWO) == "sharded"
        return
    with pytest.raises(UserError, match=problem):
        launched_sharding(TWO)


def test_a_launcher_that_asks_for_deepspeed_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; pip install deepspeed, or use FSDP"):
        launched_sharding(TWO)
