"""What the tests of single details share: a batch of four answers, a trainer for it, and processes played by threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

from common.launch.runtime import Runtime
from common.token_choice import TokenChooser
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.models import with_value_head
from rlhf.ppo.update import Update

T = TypeVar("T")


@pytest.fixture
def on_updates(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, float]], dict[str, float] | None]], None]:
    """`on_updates(change)`: sees the figures of every optimizer step, and may give others in their place."""

    def watch(change: Callable[[dict[str, float]], dict[str, float] | None]) -> None:
        original = Update.optimizer_step

        def changed(self: Update, rows: Tensor) -> dict[str, float]:
            figures = original(self, rows)
            return change(figures) or figures

        monkeypatch.setattr(Update, "optimizer_step", changed)

    return watch


class Batch(NamedTuple):
    """What `PPOTrainer.step` takes: ids and one score per answer. EOS is 1; the second answer was cut off."""

    queries: list[list[int]]
    responses: list[list[int]]
    scores: list[float]


BATCH = Batch(
    queries=[[5, 6, 7], [9] * 6, [4, 8], [30, 31, 32, 33]],
    responses=[[40, 41, 1], [42] * 5, [43, 1], [44, 45, 46, 1]],
    scores=[1.0, -0.5, 2.0, 0.25],
)


@pytest.fixture
def batch() -> Batch:
    return Batch(*(list(part) for part in BATCH))


@pytest.fixture
def build(make_model: Any, tokenizer: Any) -> Callable[..., PPOTrainer]:
    """`build(model, reference=…, critic=…, optimizer="sgd" | "adam", reader=…, **settings)`: a trainer for four answers.

    Its value head is away from zero, its optimizer plain SGD (gradients show in the parameters) or the trainer's own Adam. `reader`: a
    tokenizer other than the usual one.
    """

    def make(
        model: Any = None,
        *,
        reference: Any = None,
        critic: Any = None,
        optimizer: str = "sgd",
        reader: Any = tokenizer,
        **settings: Any,
    ) -> PPOTrainer:
        model = make_model() if model is None else model
        policy = model if hasattr(model, "v_head") else with_value_head(model)
        torch.nn.init.normal_(policy.v_head.summary.weight, std=0.3, generator=torch.Generator().manual_seed(5))
        usual = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "learning_rate": 0.05, "classic_quirks": False}
        config = PPOConfig(**{**usual, **settings})
        trainer = PPOTrainer(config, policy, reference, reader, critic=critic, runtime=Runtime.local("cpu"))
        if optimizer == "sgd":
            trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=config.learning_rate)
        return trainer

    return make


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], None]:
    """`write(answers)` makes sampling write these tokens, by the rows' numbers, whatever the model says."""

    def follow(answers: list[list[int]]) -> None:
        def scores(self: TokenChooser, logits: Tensor, rows: Tensor, position: int, text: Tensor, real: Tensor) -> Tensor:
            wanted = torch.tensor([answers[row][position] for row in rows.tolist()])
            return torch.nn.functional.one_hot(wanted, logits.shape[1]).float()

        monkeypatch.setattr(TokenChooser, "scores", scores)

    return follow


class Meeting:
    """Where the threads that play processes show one another what they have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[Any] = [None] * size

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self.brought[rank] = mine
        self.barrier.wait()
        everything = copy.deepcopy(self.brought)
        self.barrier.wait()
        return everything


@dataclass(frozen=True)
class PlayedRank(Runtime):
    """One of several processes."""

    meeting: Meeting | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        assert self.meeting is not None
        parts = self.meeting.gather(self.rank, tensor.detach())
        return sum(parts[1:], parts[0].clone())

    def gather(self, rows: Sequence[T]) -> list[T]:
        assert self.meeting is not None
        return [row for part in self.meeting.gather(self.rank, list(rows)) for row in part]

    def broadcast(self, value: T) -> T:
        return self.gather([value])[0]


@pytest.fixture
def in_ranks() -> Callable[[int, Callable[[Runtime], T]], list[T]]:
    """`in_ranks(n, work)`: what `work(runtime)` returns in each of n processes, played by threads."""

    def run(size: int, work: Callable[[Runtime], T]) -> list[T]:
        meeting = Meeting(size)

        def play(rank: int) -> T:
            try:
                return work(PlayedRank(torch.device("cpu"), rank, size, meeting))
            except BaseException:
                meeting.barrier.abort()  # else the others would wait for this one
                raise

        with ThreadPoolExecutor(size) as pool:
            parts = [pool.submit(play, rank) for rank in range(size)]
        errors = [error for part in parts if (error := part.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # the cause, where others only waited for the rank that failed
        return [part.result() for part in parts]

    return run
