"""Weights, gradients and optimizer states spread over processes by DeepSpeed's ZeRO-3, where deepspeed is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.launch.runtime import Runtime
from common.launch.sharding import Network, Sharding

T = TypeVar("T")


class Zero3(Sharding):
    """DeepSpeed's ZeRO-3: what is gathered in an update, and when, is its own affair. Optimizer states are not kept in checkpoints."""

    name, spreads, resumes = "DeepSpeed", True, False

    def __init__(self, runtime: Runtime) -> None:
        import deepspeed

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
        deepspeed.init_distributed(dist_init_required=False)
        self.engine: Any = None
        self._trained: list[nn.Module] = []
        self._gathered: list[nn.Module] = []

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
        with self.deepspeed.zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext():
            yield
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

    def drop_gradients(self, optimizer: Optimizer) -> None:
        self.engine.optimizer.zero_grad()

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
        self.engine.step()


class _Trained(nn.Module):
    """The networks that train together, and a forward that is whatever is to be computed with them."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, function: Callable[[], T]) -> T:
        return function()
