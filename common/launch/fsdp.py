"""Weights, gradients and optimizer states spread over processes by torch's FSDP (`fully_shard`).

Between phases each process holds its shard alone. A phase without gradients (sampling, reference, judges, saving) gathers a network whole
and keeps it, so that processes may run different numbers of forwards; an update gathers it block by block, in step with the others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from common.freezing import find_blocks
from common.launch.runtime import Runtime
from common.launch.sharding import Network, Sharding

T = TypeVar("T")


class FullySharded(Sharding):
    """torch's FSDP (`fully_shard`): transformer blocks are gathered one by one in an update, embeddings and heads for its whole forward."""

    name, spreads = "FSDP", True

    def __init__(self, runtime: Runtime, *, reshard_after_forward: bool = True) -> None:
        """`reshard_after_forward`: blocks are gathered anew for backward; else they stay from forward to backward."""
        # T5's blocks hand on the relative position bias, a view to which nothing adds in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w*T5Block\) returned a view", UserWarning)
        self.runtime = runtime
        self.reshard_after_forward = reshard_after_forward
        self.mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
        self._units: dict[nn.Module, _Unit] = {}

    def place(self, *networks: nn.Module) -> None:
        for network in networks:
            if network not in self._units:
                self._units[network] = _Unit(network, self.mesh, self.reshard_after_forward)

    def train(self, networks: Sequence[nn.Module], make_optimizer: Callable[[], Optimizer]) -> Optimizer:
        self.place(*networks)
        return make_optimizer()

    @contextmanager
    def gathered(self, *networks: nn.Module) -> Iterator[None]:
        units = [unit for unit in (self._units[network] for network in networks) if not unit.is_gathered]
        for unit in units:
            unit.gather()
        try:
            yield
        finally:
            for unit in units:
                unit.release()

    @contextmanager
    def whole(self, network: Network) -> Iterator[Network]:
        with self.gathered(network):
            yield cast(Network, self._units[network].twin[0])

    def forward(self, networks: Sequence[nn.Module], function: Callable[[], T]) -> T:
        if not networks:
            return function()
        first, *others = networks
        result: T = self._units[first](lambda: self.forward(others, function))
        return result

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return _whole(super().gradient_norm(parameters))

    def load_weights(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        own = network.state_dict()
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(_spread(weight, own[name]))

    def whole_weights(self, network: nn.Module) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self._on_main(network.state_dict())
        return weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = self._on_main(optimizer.state_dict())
        return state

    def _on_main(self, state: Any) -> Any:
        """A nested state with whole tensors in the main process, and none in others."""
        if isinstance(state, Mapping):
            return {key: self._on_main(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._on_main(value) for value in state)
        if not isinstance(state, Tensor):
            return state
        tensor = _whole(state.detach())  # by all processes together
        return tensor.cpu() if self.runtime.is_main else None

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        spread = {
            number: {
                name: _spread(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
                for name, value in state["state"][number].items()
            }
            for number, parameter in zip(numbers, parameters, strict=True)
            if number in state["state"]
        }
        optimizer.load_state_dict({**state, "state": spread})


class _Unit(nn.Module):
    """A network under FSDP's root module, whose forward is whatever is to be computed with the network.

    FSDP gathers weights in hooks around `forward`; ours enter a model at its trunk and its output layer, whose weights are the root's.
    """

    def __init__(self, network: nn.Module, mesh: Any, reshard_after_forward: bool) -> None:
        super().__init__()
        self.twin = [_twin(network)]  # in a list, so that it is no part of this module
        self.network = network
        self.reshard_after_forward = reshard_after_forward
        blocks = [network.get_submodule(block.prefix.rstrip(".")) for block in find_blocks(network)]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        fully_shard(self, mesh=mesh, reshard_after_forward=False)
        self.parts = [module for module in (*blocks, self) if isinstance(module, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)  # losses are divided by what all processes have: gradients are summed
            part.set_force_sum_reduction_for_comms(True)
        self(lambda: None)  # the first forward tells FSDP which module is the root
        self.is_gathered = True
        self.release()

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def gather(self) -> None:
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self.is_gathered = True

    def release(self) -> None:
        for part in self.parts:
            part.reshard()
            if not isinstance(part, _Unit):
                part.set_reshard_after_forward(self.reshard_after_forward, recurse=False)
        self.is_gathered = False


def _twin(network: nn.Module) -> nn.Module:
    """A module of the same classes with the very weights that `network` has at any time: FSDP gives its modules classes of its own, which
    can neither be copied nor saved."""
    tensors = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    for module, own in zip(network.modules(), twin.modules(), strict=True):
        own._parameters, own._buffers = module._parameters, module._buffers
    return twin


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which all processes do together; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, which each process has, cut into shards as `like` is, if it is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None)
