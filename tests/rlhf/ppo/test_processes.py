"""Two processes make the numbers of one with a batch as large as theirs together, whatever is switched on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.launch.runtime import Runtime
from common.lora import add_lora
from common.record_types import Prompt, PromptRecord
from common.schema import LoraSettings
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.models import Critic, with_value_head
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.sharing import score_rollout
from rlhf.reward_pipelines.build import RewardPipeline, as_pipeline
from rlhf.reward_pipelines.function import AnswerError
from rlhf.reward_pipelines.model import TrainedRewardModel

InRanks = Callable[[int, Callable[[Runtime], Any]], list[Any]]
STEPS = 4
PROMPTS = [[5 + number, *range(30, 30 + number * 5 % 7)] for number in range(11)]
HELD_OUT = [[60, 61], [62], [63, 64, 65, 66], [67], [68, 69]]
PLAIN = {"ppo_epochs": 2, "mini_batch_size": 2, "learning_rate": 1e-3}


_building = threading.Lock()
"""Models are drawn from torch's own generator, which the threads that play processes share."""


def reward_of(responses: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """What the policies are rewarded for; hardly ever alike for two answers, since Adam makes full steps of what rounding leaves."""
    texts = [prompt + response for response, prompt in zip(responses, prompts, strict=True)]
    return [sum(ord(letter) * place for place, letter in enumerate(text, 1)) % 1009 / 200 for text in texts]


class Run(NamedTuple):
    """What a training left."""

    weights: Tensor
    answers: list[Tensor]
    history: list[dict[str, float]]
    kl_coef: float


CASES: dict[str, dict[str, Any]] = {
    "plain, ten steps": {"steps": 10},
    "accumulation": {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "entropy_coef": 0.01},
    "whitening, scaling, adaptive KL": {
        "ppo_epochs": 4, "mini_batch_size": 4, "whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True,
        "horizon": 40.0, "target": 0.5, "classic_quirks": False,
    },
    "classic quirks": {"whiten_rewards": True, "max_grad_norm": 0.3, "classic_quirks": True},
    "early stopping": {"early_stopping": True, "target_kl": 0.002, "ppo_epochs": 4, "learning_rate": 3e-3},
    "rloo": {"advantage_estimator": "rloo", "samples_per_prompt": 2},
    "grpo": {"advantage_estimator": "grpo", "samples_per_prompt": 4, "kl_penalty": "full"},
    "frozen layers": {"mini_batch_size": 1, "num_shared_layers": 1},
    "critic": {"critic": True},
    "lora": {"lora": True},
    "t5": {"model": "t5"},
    "a reward model's scale": {"judge": True},
    "one held-out prompt": {"held_out": 1, "steps": 2},
    "one held-out prompt, t5": {"held_out": 1, "steps": 2, "model": "t5"},
}  # fmt: skip


@pytest.fixture
def train(make_model: Any, tokenizer: Any) -> Callable[..., Run]:
    def run(runtime: Runtime, settings: dict[str, Any]) -> Run:
        settings = {**PLAIN, **settings}
        steps = settings.pop("steps", STEPS)
        kind, shared = settings.pop("model", "gpt_neo"), settings.pop("num_shared_layers", None)
        held_out = HELD_OUT[: settings.pop("held_out", None)]
        with _building:
            model = make_model(kind, 1)
            if settings.pop("lora", False):
                model = add_lora(model, LoraSettings(r=4), seed=3)
            critic = Critic(make_model("gpt_neo", 7).transformer) if settings.pop("critic", False) else None
        reward: Any = reward_of
        if settings.pop("judge", False):
            reward = RewardPipeline(TrainedRewardModel("judge", Judge(), "reference"))
        factor = 1 if runtime.world_size == 2 else 2  # settings are per process
        settings |= {"batch_size": 4 * factor, "mini_batch_size": settings["mini_batch_size"] * factor}
        policy = with_value_head(model)
        torch.nn.init.normal_(policy.v_head.summary.weight, std=0.3, generator=torch.Generator().manual_seed(5))
        trainer = PPOTrainer(
            PPOConfig(seed=2, **settings), policy, None, tokenizer, None, None, None, shared, critic=critic, runtime=runtime
        )
        original, answers = trainer.step, []

        def step(*arguments: Any, **options: Any) -> Any:
            stats = original(*arguments, **options)
            assert trainer.record is not None
            answers.append(trainer.record.answers.targets)
            return stats

        trainer.step = step  # type: ignore[method-assign]
        generation = {"max_new_tokens": 6, "temperature": 0.7}
        history = trainer.train(PROMPTS, reward=reward, generation=generation, steps=steps, eval_prompts=held_out, eval_every=5)
        return Run(torch.cat([parameter.detach().flatten() for parameter in trainer.parameters]), answers, history, trainer.kl_coef)

    return run


class Judge:
    """A reward model whose scores have a scale of their own."""

    score_mean, score_scale, encoder = 0.0, 1.0, SimpleNamespace(counts=Counter())

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
        return [5.0 + 3.0 * value for value in reward_of(responses, [prompt.question for prompt in prompts])]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_numbers_of_one(case: str, train: Callable[..., Run], in_ranks: InRanks) -> None:
    alone = train(Runtime.local("cpu"), CASES[case])
    halves = in_ranks(2, lambda runtime: train(runtime, CASES[case]))
    assert torch.equal(halves[0].weights, halves[1].weights)
    assert any(not torch.equal(first, other) for first, other in zip(alone.answers, alone.answers[1:], strict=False))
    for half in halves:
        for mine, theirs in zip(alone.answers, half.answers, strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(half.weights, alone.weights, rtol=0, atol=1e-4)
        assert half.kl_coef == pytest.approx(alone.kl_coef, rel=1e-5)
        for line, expected in zip(half.history, alone.history, strict=True):
            assert line.keys() == expected.keys()
            for name, value in expected.items():
                if not name.startswith("perf/"):
                    assert line[name] == pytest.approx(value, rel=0 if "loss" in name else 1e-4, abs=1e-5), name


PROMPT_ROWS = [EncodedPrompt([5], PromptRecord(Prompt(f"Question {row}"), {}, f"file row {row}")) for row in range(5)]
ANSWERED = Rollout(
    queries=[[5]] * 5,
    responses=[[40] * (row + 1) for row in range(5)],
    texts=[f"text {row}" for row in range(5)],
    ended=[True] * 5,
    logprobs=torch.zeros(5, 5),
    values=None,
)


def test_every_row_is_scored_once_and_scores_come_back_in_the_order_of_rows(in_ranks: InRanks) -> None:
    asked: list[list[str]] = []

    def reward(responses: list[str], prompts: list[str]) -> list[float]:
        asked.append(responses)
        return [float(response[-1]) for response in responses]

    for size in (2, 3, 7):
        asked.clear()
        results = in_ranks(size, lambda runtime: score_rollout(runtime, as_pipeline(reward), PROMPT_ROWS, ANSWERED)[0])
        for result in results:
            assert result.scores == result.components["reward"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert sorted(text for texts in asked for text in texts) == ANSWERED.texts
        assert all(asked), "a function was asked about no answer"


@pytest.mark.parametrize("bad", [0, 3])
def test_a_reward_that_fails_in_one_process_is_told_in_all_with_its_row(bad: int, in_ranks: InRanks) -> None:
    def reward(responses: list[str]) -> list[float]:
        return [float("nan") if response == f"text {bad}" else 1.0 for response in responses]

    def work(runtime: Runtime) -> int:
        with pytest.raises(UserError, match="expected a finite number") as caught:
            score_rollout(runtime, as_pipeline(reward), PROMPT_ROWS, ANSWERED)
        assert isinstance(caught.value, AnswerError)
        return caught.value.row

    assert in_ranks(2, work) == [bad, bad]
