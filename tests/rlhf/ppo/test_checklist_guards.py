"""Details 33 to 35 of docs/ppo_checklist.md: what stops a run, what keeps evaluations comparable, what must fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rlhf.ppo.update as update_module
from common.decoding import check_positions
from common.errors import UserError
from common.record_types import Prompt, PromptRecord
from common.schema import GenerateParams
from rlhf.config import PPOData, PPOGeneration, PPOParams, PPORunConfig, RewardSettings
from rlhf.inputs import prompt_limit
from rlhf.ppo import NonFiniteError, PPOTrainer
from rlhf.ppo.evaluation import Evaluator
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rewards import penalised_scores
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.rules import RepetitionRule

Build = Callable[..., PPOTrainer]

# --- 33 ---------------------------------------------------------------------------------------------------------------------------


def spoil_token(model: Any, token: int) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[token] = math.nan


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("score", "scores of rows 1, 3 are not finite"),
        ("policy", "PPO step 0: log-probabilities of rows 2 are not finite"),
        ("reference", "the reference's log-probabilities of rows 2 are not finite"),
        ("value", "values of rows 0, 1, 2, 3 are not finite"),
        ("loss", "losses of rows 0, 1, 2, 3 are not finite"),
        ("gradient", "gradients of rows 0, 1, 2, 3 are not finite"),
    ],
)
def test_33_what_is_not_finite_stops_before_the_optimizer_with_its_rows(
    what: str, named: str, build: Build, batch: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 8 stands in the third prompt alone."""
    models = [make_model("gpt2", seed, tie_word_embeddings=False) for seed in (0, 4)]
    trainer = build(models[0], reference=models[1])
    scores = list(batch.scores)
    if what == "score":
        scores[1], scores[3] = math.nan, math.inf
    elif what in ("policy", "reference"):
        spoil_token(models[what == "reference"], 8)
    elif what == "value":
        trainer.model.v_head.summary.bias.data.fill_(math.inf)
    elif what == "loss":
        original = update_module.value_loss
        monkeypatch.setattr(update_module, "value_loss", lambda *given, **more: (original(*given, **more)[0] * math.nan, torch.zeros(())))
    else:
        trainer.model.v_head.summary.bias.register_hook(lambda gradient: gradient * math.inf)
    stepped: list[int] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: stepped.append(1))
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    with pytest.raises(NonFiniteError, match=named):
        trainer.step(batch.queries, batch.responses, scores)
    assert stepped == []
    for parameter, value in zip(trainer.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0, equal_nan=True)


# --- 34 ---------------------------------------------------------------------------------------------------------------------------


def test_34_two_evaluations_of_one_model_give_the_same_numbers(build: Build, batch: Any) -> None:
    """Whatever was drawn and trained on in between; another model and another seed give other ones."""
    trainer = build()
    prompts = [EncodedPrompt(ids, PromptRecord(Prompt(f"{row}?"), columns={}, where="")) for row, ids in enumerate(batch.queries)]

    def penalise(scores: Any, rollout: Any) -> torch.Tensor:
        return penalised_scores(torch.tensor(scores), torch.tensor(list(map(len, rollout.responses))), torch.tensor(rollout.ended))

    def evaluator(seed: int) -> Evaluator:
        params = GenerateParams(do_sample=True, max_new_tokens=8)
        pipeline = RewardPipeline(RepetitionRule("repetition", 1))
        return Evaluator(trainer, pipeline, prompts, params, penalise=penalise, seed=seed, samples=4, batch_size=2)

    evaluate = evaluator(0)
    first = evaluate()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.manual_seed(99), torch.rand(3)
    trainer.step(*batch)
    trained = evaluate()
    trainer.model.load_state_dict(weights)
    second = evaluate()
    assert (second.figures, second.samples) == (first.figures, first.samples)
    assert trained.figures["eval/kl"] != first.figures["eval/kl"] and first.figures["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    assert evaluator(1)().samples != first.samples


# --- 35 ---------------------------------------------------------------------------------------------------------------------------


def run_config(prompt: int | None, new: int) -> PPORunConfig:
    return PPORunConfig(
        data_config=PPOData(data_file_path="prompts.json", max_prompt_length=prompt),
        generation_config=PPOGeneration(max_new_tokens=new),
        ppo_config=PPOParams(model_name="policy"),
        reward_config=RewardSettings(reward_model_name="judge"),
    )


def test_35_prompt_and_answer_fit_the_positions_by_the_config() -> None:
    assert prompt_limit(run_config(40, 24), 64, False) == 40
    with pytest.raises(UserError, match=r"max_prompt_length 40 \+ generation_config.max_new_tokens 25 = 65 exceeds the 64 positions"):
        prompt_limit(run_config(40, 25), 64, False)
    assert prompt_limit(run_config(None, 24), 64, False) == 40  # what is left
    with pytest.raises(UserError, match="max_new_tokens 64 leaves no room for a prompt"):
        prompt_limit(run_config(None, 64), 64, False)
    assert prompt_limit(run_config(64, 64), 64, True) == 64  # an encoder-decoder has positions for both
    with pytest.raises(UserError, match="max_new_tokens 65 exceeds the policy's 64 positions"):
        prompt_limit(run_config(None, 65), 64, True)


def test_35_a_rollout_that_cannot_fit_runs_no_forward(build: Build, make_model: Any) -> None:
    trainer = build(make_model("gpt2"))
    params = GenerateParams(do_sample=True, max_new_tokens=4)
    trainer.rollout([[5], [6] * 60], params, seed=0)
    forwards: list[int] = []
    for module in trainer.model.modules():
        module.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(UserError, match="prompt and answer of 65 tokens, the model has 64 positions"):
        trainer.rollout([[5], [6] * 61], params, seed=0)
    assert forwards == []
    check_positions(make_model("t5").config, 10**6, 10**6)  # relative positions have no end
