"""Weights, gradients and optimizer states spread over processes by DeepSpeed's ZeRO-3, where deepspeed is installed.

Phases without gradients gather networks whole, as under FSDP; what an update gathers, and when, is DeepSpeed's own affair.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.launch.runtime import Runtime
from common.launch.sharding import Network, Sharding

T = TypeVar("T")


class Zero3(Sharding):
    """DeepSpeed's ZeRO-3. It keeps the optimizer's weights and moments as a flat part of many parameters in each process."""

    name, spreads, steps_all = "DeepSpeed", True, True

    def __init__(self, runtime: Runtime) -> None:
        import deepspeed

        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # of its calls, at every one
        self.runtime = runtime
        self.deepspeed: Any = deepspeed
        self.settings = {
            "train_micro_batch_size_per_gpu": 1,  # batches are made, gradients clipped and learning rates set elsewhere
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its default is 1
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a CPU would compile this kernel now, which only inference uses
        deepspeed.init_distributed(dist_init_required=False)
        self.engine: Any = None
        self._trained: list[nn.Module] = []
        self._gathered: list[nn.Module] = []
        self._has_gradients = False

    def place(self, *networks: nn.Module) -> None:
        for network in networks:
            if not any(hasattr(parameter, "ds_id") for parameter in network.parameters()):
                network.to(self.runtime.device)
                self.deepspeed.zero.Init(module=network, config_dict_or_path=self.settings, dtype=torch.float32)

    def train(self, networks: Sequence[nn.Module], make_optimizer: Callable[[], Optimizer]) -> Optimizer:
        trained = _Trained(networks).to(self.runtime.device)
        optimizer = make_optimizer()
        self.engine, *_ = self.deepspeed.initialize(model=trained, optimizer=optimizer, config=self.settings)
        self._trained = list(networks)
        return optimizer

    @contextmanager
    def gathered(self, *networks: nn.Module) -> Iterator[None]:
        from trl.models.utils import add_hooks, remove_hooks

        fresh = [network for network in networks if network not in self._gathered]
        parameters = [parameter for network in fresh for parameter in network.parameters()]
        hooked = any(network in self._trained for network in fresh)  # whose hooks would let go of a block's weights behind it
        if hooked:
            remove_hooks(self.engine)
        self._gathered += fresh
        try:
            with self.deepspeed.zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext():
                yield
        finally:
            self._gathered = [network for network in self._gathered if network not in fresh]
            if hooked:
                add_hooks(self.engine)

    @contextmanager
    def whole(self, network: Network) -> Iterator[Network]:
        with self.gathered(network):
            yield network

    def forward(self, networks: Sequence[nn.Module], function: Callable[[], T]) -> T:
        result: T = self.engine(function)
        return result

    def copy_weights(self, network: nn.Module, into: nn.Module) -> None:
        for target, source in zip(into.parameters(), network.parameters(), strict=True):
            parts: Any = target, source
            parts[0].ds_tensor.data.copy_(parts[1].ds_tensor.data)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.runtime.world_size)  # it takes the mean over processes
        self._has_gradients = True

    def drop_gradients(self, optimizer: Optimizer) -> None:
        self.engine.optimizer.zero_grad()
        self._has_gradients = False

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        squares = [gradient.square().sum() for _, gradient in self._gradients(parameters)]
        return self.runtime.sum(torch.stack(squares).sum()).sqrt()

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in self._gradients(parameters):
            safe_set_local_grad(parameter, gradient * factor)

    def _gradients(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with this process's part of its gradient."""
        from deepspeed.utils import safe_get_local_grad

        for parameter in parameters:
            yield parameter, safe_get_local_grad(parameter)

    def step(self, optimizer: Optimizer) -> None:
        if self._has_gradients:  # it would step with those it has summed up, dropped or not
            self.engine.step()
        self._has_gradients = False

    def whole_weights(self, network: nn.Module) -> dict[str, Tensor]:
        with self.gathered(network):
            if not self.runtime.is_main:
                return {}
            return {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        named = network.named_parameters(remove_duplicate=False)
        parameters = [parameter for name, parameter in named if name in weights]
        with self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            super().load_weights(network, weights)
        self.engine.optimizer.refresh_fp32_params()  # the optimizer's, where it has its own

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        with self._flat_parts() as parts:
            flat = optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        numbers: list[range] = []  # of the parameters in each flat part
        for number, parameters in enumerate(parts):
            numbers.append(range(len(state), len(state) + len(parameters)))
            for parameter in parameters:
                own = state[len(state)] = dict(flat["state"].get(number, {}))
                for name, value in own.items():
                    if isinstance(value, Tensor):
                        whole = safe_get_full_optimizer_state(parameter, name) if value.ndim else value  # by all processes together
                        own[name] = whole.to("cpu", copy=True) if self.runtime.is_main else None
        groups = [{**group, "params": [own for number in group["params"] for own in numbers[number]]} for group in flat["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        with self._flat_parts() as parts:
            groups = optimizer.state_dict()["param_groups"]
            flat: dict[int, dict[str, Any]] = {}
            first = 0
            for number, parameters in enumerate(parts):
                states = [state["state"][first + place] for place in range(len(parameters))]
                first += len(parameters)
                flat[number] = {
                    name: self._part([own[name] for own in states], parameters) if isinstance(value, Tensor) and value.ndim else value
                    for name, value in states[0].items()
                }
            restored = [{**saved, "params": group["params"]} for saved, group in zip(state["param_groups"], groups, strict=True)]
            optimizer.load_state_dict({"state": flat, "param_groups": restored})

    @contextmanager
    def _flat_parts(self) -> Iterator[list[list[Any]]]:
        """Inside, the optimizer has its flat parts, which it is given for steps alone; the parameters that each of them is made of."""
        zero = self.engine.optimizer
        zero._set_fp32_optimizer_param_groups()
        try:
            yield zero.fp16_groups
        finally:
            zero._clear_fp32_optimizer_param_groups()

    def _part(self, tensors: Sequence[Tensor], parameters: Sequence[Any]) -> Tensor:
        """This process's flat part of whole tensors, each like its parameter."""
        parts = []
        for tensor, parameter in zip(tensors, parameters, strict=True):
            size = parameter.ds_tensor.numel()  # as large in each process: what is behind the end is filled up
            padded = nn.functional.pad(tensor.flatten(), (0, size * self.runtime.world_size - tensor.numel()))
            parts.append(padded[self.runtime.rank * size :][:size])
        return torch.cat(parts)


class _Trained(nn.Module):
    """The networks that train together, and a forward that is whatever is to be computed with them."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, function: Callable[[], T]) -> T:
        return function()
