"""Details 1 to 9 of docs/ppo_checklist.md: what the models read, and how their heads start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import new_manifest
from common.models.backbone import RewardInput, collate_rewards, token_position
from common.models.readouts import ScoreHead
from common.models.reward import RewardModel, RewardScorer
from common.record_types import Prompt
from common.schema import GenerateParams
from rlhf.ppo import PPOTrainer
from rlhf.ppo.answers import gather_answers
from rlhf.ppo.models import Critic, with_value_head
from rlhf.ppo.rollout import collect_rollout
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.combine import Ensemble
from rlhf.reward_pipelines.model import TrainedRewardModel

SAMPLED = GenerateParams(do_sample=True, max_new_tokens=6)
Build = Callable[..., PPOTrainer]


@pytest.fixture
def reward(make_model: Any) -> RewardModel:
    return RewardModel.from_backbone(make_model("gpt_neo", 7).transformer, seed=3).eval()


def scorer_of(reward: RewardModel, tokenizer: Any, **options: Any) -> RewardScorer:
    manifest = new_manifest("reward_classification", tokenizer, max_length=64, score_mean=0.5, score_scale=2.0)
    return RewardScorer(reward, tokenizer=tokenizer, manifest=manifest, **options)


# --- 1 ----------------------------------------------------------------------------------------------------------------------------


def test_01_the_reward_model_reads_prompt_answer_and_eos(reward: RewardModel, tokenizer: Any) -> None:
    [score] = scorer_of(reward, tokenizer).score([Prompt("Is water wet?")], ["Yes"])
    ids = tokenizer("Question: Is water wet?\nAnswer:")["input_ids"] + tokenizer(" Yes")["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        assert score == pytest.approx(float(reward(torch.tensor([ids]), torch.ones(1, len(ids)))), abs=1e-6)


def test_01_the_critic_reads_prompt_and_answer(build: Build, batch: Any, make_model: Any) -> None:
    critic = Critic(make_model("gpt_neo", 7).transformer)
    torch.nn.init.normal_(critic.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    trainer = build(critic=critic, learning_rate=0.0)
    trainer.step(*batch)
    assert trainer.record is not None
    for row, (query, response) in enumerate(zip(batch.queries, batch.responses, strict=True)):
        with torch.no_grad():
            states = critic.trunk(torch.tensor([query + response])).last_hidden_state[0]
            by_hand = critic.v_head(states[len(query) - 1 : -1])
        torch.testing.assert_close(trainer.record.values[row, : len(response)], by_hand, rtol=1e-5, atol=1e-5)


# --- 2 ----------------------------------------------------------------------------------------------------------------------------


def test_02_masks_come_from_lengths_whatever_the_ids(make_model: Any) -> None:
    """0 is what fills padding and 1 is EOS; inside an answer both are tokens like any other."""
    answers = gather_answers([[5, 0, 1], [7]], [[0, 0, 1], [1]], make_model().config)
    assert answers.present.tolist() == answers.mask.tolist() == [[True, True, True], [True, False, False]]
    assert answers.starts.tolist() == [2, 0] and answers.lengths.tolist() == [6, 2]


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_02_eos_is_trained_on_also_where_it_is_the_padding_token(pad_token: str, build: Build, tokenizer: Any) -> None:
    """Answers that are EOS alone: what they earn is all there is to learn from."""
    reader = copy.deepcopy(tokenizer)
    reader.pad_token = pad_token
    trainer = build(reader=reader, batch_size=2, mini_batch_size=2, init_kl_coef=0.0, vf_coef=0.0)
    queries = [[5, 6, 7], [9] * 6]

    def eos_logprobs() -> torch.Tensor:
        with torch.no_grad():
            model = trainer.model.pretrained_model
            return torch.stack([model(torch.tensor([query])).logits[0, -1].log_softmax(-1)[1] for query in queries])

    before = eos_logprobs()
    trainer.step(queries, [[1], [1]], [1.0, -1.0])
    assert trainer.record is not None and trainer.record.mask.tolist() == [[True], [True]]
    moved = eos_logprobs() - before
    assert float(moved[0]) > 1e-3 and float(moved[1]) < -1e-3


# --- 3 ----------------------------------------------------------------------------------------------------------------------------


def test_03_prompts_are_padded_on_the_left_with_positions_from_the_mask(make_model: Any, tokenizer: Any) -> None:
    model = with_value_head(make_model("gpt2"))
    seen: list[dict[str, Any]] = []
    model.pretrained_model.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    rollout = collect_rollout(model, tokenizer, [[5, 6, 7], [9]], GenerateParams(do_sample=True, max_new_tokens=2), seed=3)
    first, second = [given for given in seen if given.get("position_ids") is not None]
    assert first["input_ids"][0].tolist() == [5, 6, 7] and first["input_ids"][1, -1] == 9
    assert first["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert second["input_ids"].tolist() == [[response[0]] for response in rollout.responses]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert second["position_ids"].tolist() == [[3], [1]]


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "t5"])
def test_03_logprobs_do_not_change_with_padding_or_order(kind: str, build: Build, batch: Any, make_model: Any, tokenizer: Any) -> None:
    trainer = build(make_model(kind), learning_rate=0.0)
    trainer.step(*batch)
    straight = trainer.record
    order = [2, 0, 3, 1]
    trainer.step(*([part[row] for row in order] for part in batch))
    assert straight is not None and trainer.record is not None
    torch.testing.assert_close(trainer.record.logprobs, straight.logprobs[order], rtol=1e-6, atol=1e-6)
    for row, (query, response) in enumerate(zip(batch.queries, batch.responses, strict=True)):
        with torch.no_grad():
            unpadded = trainer.networks.logprobs(trainer.policy, gather_answers([query], [response], trainer.model.config), 1.0)
        torch.testing.assert_close(straight.logprobs[row, : len(response)], unpadded[0], rtol=1e-5, atol=1e-5)
    # in sampling: one row alone, and with as much padding as the model takes
    options = {"seed": 3, "rows": [1]}
    alone, padded = (
        collect_rollout(trainer.model, tokenizer, [[9, 8]], SAMPLED, pad_to=width, use_cache=False, **options) for width in (None, 58)
    )
    torch.testing.assert_close(padded.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)


# --- 4 ----------------------------------------------------------------------------------------------------------------------------


def test_04_the_score_is_read_at_the_last_real_token(reward: RewardModel) -> None:
    with torch.no_grad():
        for ids in ([5, 7, 6, 0], [7] * 9):
            state = reward.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            padded = torch.tensor([ids + [0] * 3])
            mask = torch.arange(len(ids) + 3)[None] < len(ids)
            assert float(reward(padded, mask)[0]) == pytest.approx(float(state @ reward.readout.score.weight[0]), abs=1e-6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert token_position(mask, "last").tolist() == [1, 2]
    assert token_position(mask.flip(1), "last").tolist() == [2, 2]


def test_04_a_padding_id_inside_the_prompt_changes_nothing(reward: RewardModel) -> None:
    rows = [RewardInput([5, 0, 6, 0]), RewardInput([7] * 9)]
    with torch.no_grad():
        alone = float(reward(torch.tensor([[5, 0, 6, 0]]), torch.ones(1, 4)))
        for pad_id in (0, 1, 33):
            padded = collate_rewards(rows, pad_id)
            assert padded.attention_mask[0].tolist() == [True] * 4 + [False] * 5
            assert float(reward(*padded)[0]) == pytest.approx(alone, abs=1e-6)


# --- 5 ----------------------------------------------------------------------------------------------------------------------------


def test_05_a_score_does_not_change_with_its_batch(reward: RewardModel, tokenizer: Any) -> None:
    prompts = [Prompt(question) for question in ("Is it?", "Is water wet at noon?", "Why?", "Who asked that?", "So?")]
    answers = ["Yes.", "No, it is not.", "<pad>", "", "It may be that nobody did."]
    scores = scorer_of(reward, tokenizer, batch_size=5).score(prompts, answers)
    assert len({round(score, 3) for score in scores}) == 5
    for size in (1, 2, 3):
        assert scorer_of(reward, tokenizer, batch_size=size).score(prompts, answers) == pytest.approx(scores, abs=1e-6)
    backwards = scorer_of(reward, tokenizer, batch_size=2).score(prompts[::-1], answers[::-1])
    assert backwards[::-1] == pytest.approx(scores, abs=1e-6)


# --- 6 ----------------------------------------------------------------------------------------------------------------------------


def test_06_the_score_head_starts_normal_with_std_one_over_the_root_of_d_plus_1(make_model: Any) -> None:
    head = ScoreHead(255, torch.Generator().manual_seed(0))
    by_hand = torch.empty(1, 255).normal_(std=1 / 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.weight, by_hand) and head.bias is None
    wide = ScoreHead(10**6 - 1, torch.Generator().manual_seed(1)).weight
    assert float(wide.detach().std()) == pytest.approx(1e-3, rel=0.01)
    model = RewardModel.from_backbone(make_model().transformer, seed=4)  # D = 16
    by_hand = torch.empty(1, 16).normal_(std=17**-0.5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(model.readout.score.weight.detach(), by_hand, rtol=1e-6, atol=0)


# --- 7 ----------------------------------------------------------------------------------------------------------------------------


def fake_scorer(scores: list[float], mean: float = 0.5, scale: float = 2.0) -> Any:
    """Gives these scores in turn, whatever it reads; `mean` and `scale` are its training set's."""
    left = iter(scores)
    return SimpleNamespace(score_mean=mean, score_scale=scale, score=lambda prompts, *_: [next(left) for _ in prompts])


def test_07_scores_are_normalised_on_the_references_answers() -> None:
    """Reference answers score 1 and 5: mean 3, standard deviation 2, so the gain is 1 / 2 and the bias 0 - 3 / 2."""
    part = TrainedRewardModel("judge", fake_scorer([1.0, 5.0, 7.0, 0.0]), "reference")
    pipeline = RewardPipeline(part)
    assert pipeline.needs_calibration
    with pytest.raises(ValueError, match="calibrate the pipeline before it scores"):
        pipeline(["q"], ["a"])
    pipeline.calibrate(["q", "q"], ["a", "b"])
    assert (part.mean, part.scale) == (3.0, 2.0)
    assert pipeline(["q", "q"], ["a", "b"]) == [0.5 * 7.0 - 1.5, 0.5 * 0.0 - 1.5]


def test_07_the_training_sets_figures_are_the_fallback() -> None:
    pipeline = RewardPipeline(TrainedRewardModel("judge", fake_scorer([4.5])))
    assert pipeline(["q"], ["a"]) == [(4.5 - 0.5) / 2.0]
    assert not pipeline.needs_calibration


def test_07_members_of_an_ensemble_are_normalised_before_they_are_combined() -> None:
    """Raw, the first member's 20 is the larger number; on its own scale it is the more severe judgement."""
    large = TrainedRewardModel("large", fake_scorer([20.0], mean=30.0, scale=10.0))  # -1
    small = TrainedRewardModel("small", fake_scorer([3.0], mean=1.0, scale=0.5))  # 4
    result = RewardPipeline(Ensemble("both", [large, small], "min")).score(["q"], ["a"])
    assert result.scores == [-1.0]
    assert (result.components["large"], result.components["small"], result.components["both_std"]) == ([-1.0], [4.0], [2.5])


# --- 8 ----------------------------------------------------------------------------------------------------------------------------


def test_08_the_value_head_starts_at_zero_and_warms_up_alone(build: Build, batch: Any) -> None:
    """The head's first step by hand: with V = 0 the gradient of 0.1 * 0.5 * mean (V - R)^2 by the bias is -0.1 * mean R."""
    trainer = build(critic_warmup_steps=2, entropy_coef=0.01)
    torch.nn.init.zeros_(trainer.model.v_head.summary.weight)
    fresh = with_value_head(trainer.model.pretrained_model).v_head.summary
    assert not fresh.weight.any() and not fresh.bias.any()
    policy = {name: value.clone() for name, value in trainer.model.pretrained_model.state_dict().items()}

    def untouched() -> bool:
        return all(torch.equal(value, policy[name]) for name, value in trainer.model.pretrained_model.state_dict().items())

    stats = trainer.step(*batch)
    assert stats["ppo/loss/total"] == pytest.approx(0.1 * stats["ppo/loss/value"], rel=1e-6)
    assert trainer.record is not None and not trainer.record.values.any()
    bias = 0.05 * 0.1 * float(trainer.record.returns[trainer.record.mask].mean())
    assert trainer.model.v_head.summary.bias.item() == pytest.approx(bias, rel=1e-5) and abs(bias) > 1e-4
    assert untouched()
    trainer.step(*batch)
    assert untouched()
    trainer.step(*batch)
    assert not untouched()


def test_08_a_critic_starts_as_the_reward_model_on_the_scale_of_the_scores(reward: RewardModel) -> None:
    critic = Critic.from_reward_model(reward, mean=0.5, scale=4.0, weight=-2.0)
    ids = torch.tensor([[5, 6, 7, 40, 41]])
    with torch.no_grad():
        value = float(critic.v_head(critic.trunk(ids).last_hidden_state[0, -1]))
        score = float(reward(ids, torch.ones_like(ids)))
    assert value == pytest.approx(-2.0 * (score - 0.5) / 4.0, abs=1e-6)
    assert not {id(parameter) for parameter in critic.parameters()} & {id(parameter) for parameter in reward.parameters()}


# --- 9 ----------------------------------------------------------------------------------------------------------------------------

DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}


@pytest.mark.parametrize("own_critic", [False, True])
def test_09_no_dropout_in_policy_reference_or_critic(own_critic: bool, build: Build, batch: Any, make_model: Any) -> None:
    """Also where the caller puts the models into training mode before a step."""
    model = with_value_head(make_model("gpt2", **DROPOUT).train())
    model.v_head.dropout.p = 0.5
    critic = Critic(make_model("gpt2", 7, **DROPOUT).transformer).train() if own_critic else None
    if critic is not None:
        torch.nn.init.normal_(critic.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    trainer = build(model, critic=critic, learning_rate=0.0, ppo_epochs=2)
    records = []

    def set_training() -> None:
        for part in (trainer.model, trainer.ref_model, trainer.critic):
            if part is not None:
                part.train()

    for _ in range(2):
        set_training()
        rollout = trainer.rollout(batch.queries, SAMPLED, seed=0)
        stats = trainer.step(batch.queries, rollout.responses, batch.scores)
        assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6) and stats["ppo/policy/approxkl"] < 1e-10
        assert trainer.record is not None
        torch.testing.assert_close(trainer.record.logprobs, rollout.logprobs, rtol=1e-5, atol=1e-5)
        set_training()
        assert sum(trainer.sampled_kl(rollout)) == pytest.approx(0.0, abs=1e-4)
        records.append(trainer.record)
    first, second = records
    for name in ("logprobs", "ref_logprobs", "values"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert float(first.kl.abs().max()) < 1e-5
    assert stats["ppo/val/vpred"] == pytest.approx(float(second.values[second.mask].mean()), rel=1e-5)


def test_09_no_dropout_in_the_reward_model(make_model: Any, tokenizer: Any) -> None:
    reward = RewardModel.from_backbone(make_model("gpt2", **DROPOUT).transformer, seed=3)
    scorer = scorer_of(reward.train(), tokenizer)
    first, second = (scorer.score([Prompt("Is water wet?")], ["Yes"]) for _ in range(2))
    assert first == second and reward.training
