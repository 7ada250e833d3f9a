"""Lightning's loop over a network that no process has whole: its weights, gradients and optimizer states are spread as a `Sharding` says.

Lightning's own strategies of the kind want CUDA, and checkpoints of their own. The loop, the checkpoints and what they hold stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from common.launch.runtime import Runtime
from common.launch.sharding import Sharding


class ShardedStrategy(DDPStrategy):
    """Spreads `module.model`, which all that a module computes goes through.

    Processes make the same forwards in training, whose losses are divided by what one of them has, and any in validation, for which the
    network is gathered.
    """

    def __init__(self, make: Callable[[Runtime], Sharding], *, clip: float | None, timeout: timedelta) -> None:
        """`make`: what spreads the network, among processes that have met by then. clip: the largest norm that a gradient keeps."""
        super().__init__(timeout=timeout)
        self._make = make
        self._clip = clip
        self._sharding: Sharding | None = None
        self._validation = contextlib.ExitStack()

    @property
    def sharding(self) -> Sharding:
        assert self._sharding is not None, "the trainer has set its strategy up"
        return self._sharding

    @property
    def _network(self) -> nn.Module | Any:
        assert self.lightning_module is not None
        return self.lightning_module.model

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        if self._sharding is None:
            self._sharding = self._make(Runtime(self.root_device, self.global_rank, self.world_size))
        if trainer.state.fn == TrainerFn.FITTING:
            self.sharding.train([self._network], lambda: self._made_optimizer(trainer))
        else:
            self.sharding.place(self._network)
        self.setup_precision_plugin()

    def _made_optimizer(self, trainer: pl.Trainer) -> Optimizer:
        self.setup_optimizers(trainer)
        [optimizer] = self.optimizers
        return optimizer

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        with self.precision_plugin.train_step_context():
            return self.sharding.forward([self._network], lambda: module.training_step(*arguments, **options))

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *arguments: Any, **options: Any) -> Tensor:
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        # the denominators of a batch plan expect a mean over processes, and gradients are summed
        self.sharding.backward(loss / self.world_size, last=not self.lightning_module.trainer.fit_loop._should_accumulate())
        self.precision_plugin.post_backward(loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **options: Any) -> Any:
        module = model or self.lightning_module
        assert module is not None
        result = self.precision_plugin._wrap_closure(module, optimizer, closure)
        if self._clip:
            self.sharding.clip_gradients(self._trained, self._clip, self.gradient_norm())
        self.sharding.step(optimizer)
        return result

    @property
    def _trained(self) -> list[nn.Parameter]:
        """Of the network, since an optimizer may hold them in another form."""
        return [parameter for parameter in self._network.parameters() if parameter.requires_grad]

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the whole gradient. All processes ask."""
        return self.sharding.gradient_norm(self._trained)

    def on_validation_start(self) -> None:
        self._validation.enter_context(self.sharding.gathered(self._network))

    def on_validation_end(self) -> None:
        self._validation.close()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, `module.model` is an ordinary network with the weights as they are, to be looked at and saved. All processes enter."""
        module, network = self.lightning_module, self._network
        assert module is not None
        with self.sharding.whole(network) as twin:
            module.model = twin
            try:
                yield
            finally:
                module.model = network

    def teardown(self) -> None:
        """Leave the network where it is: it is not moved in parts."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


@contextlib.contextmanager
def whole_network(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, the module that a trainer trains has its network whole; every process enters."""
    with trainer.strategy.whole() if isinstance(trainer.strategy, ShardedStrategy) else contextlib.nullcontext():
        yield


def optimizer_states(trainer: pl.Trainer) -> list[Any]:
    """The states of its optimizers as one process has them; of a network that is spread, in the process that leads. Every process asks."""
    if not isinstance(trainer.strategy, ShardedStrategy):
        return [optimizer.state_dict() for optimizer in trainer.optimizers]
    sharding = trainer.strategy.sharding
    return [sharding.optimizer_state(optimizer) for optimizer in trainer.optimizers]


def load_optimizer_state(trainer: pl.Trainer, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Put back what `optimizer_states` gave."""
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.sharding.load_optimizer_state(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def drop_gradients(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Make the next step of the optimizer change nothing."""
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.sharding.drop_gradients(optimizer)
    else:
        optimizer.zero_grad(set_to_none=True)


def gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Euclidean norm of the whole gradient; 0 where there is none."""
    if isinstance(trainer.strategy, ShardedStrategy):
        return float(trainer.strategy.gradient_norm())
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
