"""How the networks of a training lie in its processes: whole in each, or spread over them as `accelerate launch` asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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
    """What `accelerate launch` asks for; without it, networks lie whole in each process.

    Raises UserError with every setting of accelerate's that would have no effect here, or another one than PPO's `mixed_precision`.
    """
    fsdp, zero = is_set("ACCELERATE_USE_FSDP"), is_set("ACCELERATE_USE_DEEPSPEED")
    problems = [f"{name} is set: PPO has FSDP, DeepSpeed and plain data parallelism" for name in _UNSERVED if is_set(name)]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", mixed_precision):
        problems.append(
            f"accelerate's mixed_precision: got {precision}, but ppo_config.mixed_precision is {mixed_precision}, which counts; set it"
        )
    if (fsdp or zero) and runtime.world_size == 1:
        problems.append("accelerate asks for sharded weights, but this process is alone; set num_processes to 2 or more, or use python")
    elif fsdp:
        problems += _fsdp_problems()
    elif zero:
        problems += _zero_problems()
    if problems:
        raise UserError(*problems)
    if fsdp:
        from common.launch.fsdp import FullySharded

        return FullySharded(runtime, reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true")
    if zero:
        from common.launch.zero3 import Zero3

        return Zero3(runtime)
    return Sharding()


_UNSERVED = ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


def _fsdp_problems() -> list[str]:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if os.environ.get("FSDP_VERSION") != "2":
        return [f"accelerate's fsdp_version: got {os.environ.get('FSDP_VERSION', '1')}, expected 2"]
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        return [f"accelerate's FSDP settings: {error}"]
    blocks = plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None
    unread = {
        "fsdp_auto_wrap_policy": (not blocks, "TRANSFORMER_BASED_WRAP without fsdp_transformer_layer_cls_to_wrap: blocks are found here"),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "false"),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "false: each process reads the files"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "false; ppo_config.gradient_checkpointing does it"),
        "fsdp_ignored_modules": (plugin.ignored_modules, "none"),
    }
    return _unexpected(unread)


def _zero_problems() -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        return ["accelerate asks for DeepSpeed, which is not installed; pip install deepspeed, or use FSDP"]
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    unread = {
        "zero_stage": (plugin.zero_stage != 3, "3"),
        "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ, "none"),
        "offload_optimizer_device": (plugin.offload_optimizer_device != "none", "none"),
        "offload_param_device": (plugin.offload_param_device != "none", "none"),
        "gradient_clipping": (plugin.gradient_clipping != "auto", "none; ppo_config.max_grad_norm does it"),
        "gradient_accumulation_steps": (plugin.gradient_accumulation_steps not in ("auto", 1), "1; ppo_config has a setting of that name"),
    }
    return _unexpected(unread)


def _unexpected(settings: Mapping[str, tuple[Any, str]]) -> list[str]:
    """A line for each setting of accelerate's that is wrong, with what is expected."""
    return [f"accelerate's {name}: expected {expected}" for name, (wrong, expected) in settings.items() if wrong]


def is_set(name: str) -> bool:
    """Whether a variable of accelerate's is on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
