"""How the networks of a training lie in its processes: whole in each, or spread over them as `accelerate launch` asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from common.errors import UserError
from common.launch.runtime import Runtime

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


class Sharding:
    """How networks lie in the processes. This one: whole in each, so that there is nothing to gather, and gradients are summed."""

    name = "none"
    spreads = False
    """Whether networks are spread; processes then run the same forwards and backwards in an update."""
    steps_all = False
    """Whether a step of the optimizer moves weights without a gradient, too."""

    def place(self, *networks: nn.Module) -> None:
        """Spread networks that do not train. What copies a network, looks at its modules or tries it comes before."""

    def train(self, networks: Sequence[nn.Module], make_optimizer: Callable[[], Optimizer]) -> Optimizer:
        """Spread networks that train, and make their optimizer."""
        return make_optimizer()

    @contextmanager
    def gathered(self, *networks: nn.Module) -> Iterator[None]:
        """Inside, each process has these networks whole, to read; all processes enter together, and run what forwards they like."""
        yield

    @contextmanager
    def whole(self, network: Network) -> Iterator[Network]:
        """Inside, a network of ordinary classes with the weights as they are, to be looked at and saved."""
        yield network

    def forward(self, networks: Sequence[nn.Module], function: Callable[[], T]) -> T:
        """`function()`, which runs forwards of these networks and returns the loss, perhaps among other things."""
        return function()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """`last`: of those before a step of the optimizer."""
        loss.backward()

    def drop_gradients(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
        clip_grads_with_norm_(parameters, max_norm, norm)

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def copy_weights(self, network: nn.Module, into: nn.Module) -> None:
        """Into another one of the same shapes, placed the same way, perhaps of another type."""
        for target, source in zip(into.parameters(), network.parameters(), strict=True):
            target.data.copy_(source.data)

    def whole_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """`state_dict` of a network; where it is spread, all processes ask, and the main one alone gets the tensors, on the CPU."""
        return network.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """`state_dict` as one process has it; where networks are spread, all ask, and the main one alone gets the tensors, on the CPU."""
        return optimizer.state_dict()

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put whole weights, those of `state_dict` or some of them, into a network."""
        network.load_state_dict(weights, strict=False)

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` gave, which every process has."""
        optimizer.load_state_dict(dict(state))


def launched_sharding(runtime: Runtime, mixed_precision: str = "no") -> Sharding:
    """What `accelerate launch` asks PPO for; without it, networks lie whole in each process.

    Raises UserError with every setting of accelerate's that would have no effect here, or another one than PPO's `mixed_precision`.
    """
    problems = accelerate_problems()
    if (precision := accelerate_precision()) not in ("no", mixed_precision):
        remedy = "set that, or let accelerate have no" if precision == "bf16" else "let accelerate have no"
        problems.append(
            f"accelerate's mixed_precision: got {precision}, but ppo_config.mixed_precision is {mixed_precision}, which counts; {remedy}"
        )
    fsdp, zero = is_set("ACCELERATE_USE_FSDP"), is_set("ACCELERATE_USE_DEEPSPEED")
    if (fsdp or zero) and runtime.world_size == 1:
        problems.append("accelerate asks for sharded weights, but this process is alone; set num_processes to 2 or more, or use python")
    if zero and importlib.util.find_spec("deepspeed") is None:
        problems.append("accelerate asks for DeepSpeed, which is not installed; pip install -r requirements-deepspeed.txt, or use FSDP")
    if problems:
        raise UserError(*problems)
    return fully_sharded(runtime) if fsdp else zero3(runtime) if zero else Sharding()


def fully_sharded(runtime: Runtime) -> Sharding:
    """torch's FSDP, as `accelerate launch` may have set it."""
    from common.launch.fsdp import FullySharded

    return FullySharded(runtime, reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true")


def zero3(runtime: Runtime) -> Sharding:
    """DeepSpeed's ZeRO-3."""
    from common.launch.zero3 import Zero3

    return Zero3(runtime)


class _Setting(NamedTuple):
    """One of accelerate's settings, and what can be served of it."""

    name: str
    variable: str
    """Of the environment, where a launched process finds it."""
    served: tuple[str, ...]
    """In lower case; the empty one: not set."""
    expected: str


_ALWAYS = (
    _Setting("use_megatron_lm", "ACCELERATE_USE_MEGATRON_LM", ("", "false"), "false: there are FSDP, DeepSpeed and data parallelism"),
    _Setting("use_parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", ("", "false"), "false"),
    _Setting("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", ("", "no"), "no: nothing is compiled"),
    _Setting("enable_cpu_affinity", "ACCELERATE_CPU_AFFINITY", ("", "0"), "false"),
)
_FSDP = (
    _Setting("fsdp_version", "FSDP_VERSION", ("2",), "2"),
    _Setting("fsdp_auto_wrap_policy", "FSDP_AUTO_WRAP_POLICY", ("transformer_based_wrap",), "TRANSFORMER_BASED_WRAP"),
    _Setting("fsdp_transformer_layer_cls_to_wrap", "FSDP_TRANSFORMER_CLS_TO_WRAP", ("",), "none: blocks are found here"),
    _Setting("fsdp_reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", ("", "true", "false"), "true or false"),
    _Setting("fsdp_state_dict_type", "FSDP_STATE_DICT_TYPE", ("", "full_state_dict"), "FULL_STATE_DICT: checkpoints hold whole weights"),
    _Setting("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", ("", "false"), "false"),
    _Setting("fsdp_cpu_ram_efficient_loading", "FSDP_CPU_RAM_EFFICIENT_LOADING", ("", "false"), "false: each process reads the files"),
    _Setting(
        "fsdp_activation_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("", "false"),
        "false; the stage's own gradient_checkpointing does it",
    ),
    _Setting("fsdp_forward_prefetch", "FSDP_FORWARD_PREFETCH", ("", "false"), "false"),
    _Setting("fsdp_ignored_modules", "FSDP_IGNORED_MODULES", ("",), "none"),
)
_ZERO = (
    _Setting("deepspeed_config_file", "ACCELERATE_DEEPSPEED_CONFIG_FILE", ("", "none"), "none"),
    _Setting("zero_stage", "ACCELERATE_DEEPSPEED_ZERO_STAGE", ("3",), "3"),
    _Setting("offload_optimizer_device", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("", "none"), "none"),
    _Setting("offload_param_device", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("", "none"), "none"),
    _Setting("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING", ("", "none", "auto"), "none; the stage's own setting does it"),
    _Setting(
        "gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "auto", "1"), "1; the stage's own setting does it"
    ),
    _Setting("zero3_init_flag", "ACCELERATE_DEEPSPEED_ZERO3_INIT", ("", "false"), "false: each process reads the files"),
    _Setting("zero3_save_16bit_model", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", ("", "false"), "false: float32 is saved"),
    _Setting("deepspeed_moe_layer_cls_names", "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", ("",), "none"),
)


def accelerate_problems() -> list[str]:
    """A line for each setting that `accelerate launch` has passed on and nothing here reads."""
    asked = [*_ALWAYS, *(_FSDP if is_set("ACCELERATE_USE_FSDP") else ()), *(_ZERO if is_set("ACCELERATE_USE_DEEPSPEED") else ())]
    found = [(setting, os.environ.get(setting.variable, "")) for setting in asked]
    return [
        f"accelerate's {setting.name}: got {value or 'nothing'}, expected {setting.expected}"
        for setting, value in found
        if value.lower() not in setting.served
    ]


def accelerate_precision() -> str:
    """`mixed_precision` of `accelerate launch`; `no` without it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def is_set(name: str) -> bool:
    """Whether a variable of accelerate's is on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
