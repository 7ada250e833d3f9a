"""The step: what changes the update, what must not, and what stops it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import common.chunks as common_chunks
import rlhf.ppo.chunks as chunks_module
import rlhf.ppo.update as update_module
from common.freezing import apply_freezing
from common.launch.runtime import Runtime
from common.lora import add_lora
from common.models.recompute import recompute_activations
from common.models.reward import RewardModel
from common.schema import FreezeSettings, GenerateParams, LoraSettings
from rlhf.ppo import NonFiniteError, PPOConfig, PPOTrainer
from rlhf.ppo.advantages import gae
from rlhf.ppo.answers import gather_answers
from rlhf.ppo.masked import masked_moments, masked_rescale
from rlhf.ppo.models import Critic, with_value_head
from rlhf.ppo.update import Update, minibatch_order

MakeModel = Callable[..., Any]
QUERIES = [[5, 6, 7], [9] * 6, [4, 8], [30, 31, 32, 33], [7, 7], [50, 60, 70], [3, 2], [11, 12, 13]]
RESPONSES = [[40, 41, 1], [42] * 5, [43, 1], [44, 45, 46, 47, 48, 1], [1], [50, 51], [52, 53, 54, 1], [55, 1]]
SCORES = [1.0, -0.5, 0.25, 2.0, -1.0, 0.75, 0.0, -2.0]
SAMPLED = GenerateParams(do_sample=True, max_new_tokens=8)


def make_trainer(
    model: Any, tokenizer: Any, *, other: Any = None, optimizer: str = "sgd", critic: Any = None, **settings: Any
) -> PPOTrainer:
    """`other`: weights of the reference, to make the KL differ from 0."""
    policy = model if hasattr(model, "v_head") else with_value_head(model)
    with torch.no_grad():
        policy.v_head.summary.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    base = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1, "learning_rate": 0.05, "classic_quirks": False}
    config = PPOConfig(**{**base, **settings})
    trainer = PPOTrainer(config, policy, other, tokenizer, critic=critic, runtime=Runtime.local("cpu"))
    if optimizer == "sgd":  # plain gradients show in the parameters
        trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=config.learning_rate)
    return trainer


def step(trainer: PPOTrainer, **options: Any) -> dict[str, Any]:
    return trainer.step(QUERIES, RESPONSES, SCORES, **options)


def parameters(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


def test_26_the_first_update_sees_ratio_one_and_minus_the_mean_advantage(make_model: MakeModel, tokenizer: Any) -> None:
    whole = step(make_trainer(make_model(), tokenizer))
    assert whole["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert whole["ppo/policy/approxkl"] == pytest.approx(0.0, abs=1e-10)
    assert whole["ppo/policy/clipfrac"] == 0.0
    assert whole["ppo/loss/policy"] == pytest.approx(0.0, abs=1e-6)  # whitened over the batch, which is the minibatch


def test_26_a_minibatch_has_minus_its_own_mean_advantage(make_model: MakeModel, tokenizer: Any, on_updates: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, mini_batch_size=2, learning_rate=0.0)
    seen: list[dict[str, float]] = []
    on_updates(seen.append)
    step(trainer)
    assert len(seen) == 4
    for figures in seen:
        assert figures["loss/policy"] == pytest.approx(-figures["policy/advantages_mean"], abs=1e-6)
        assert abs(figures["policy/advantages_mean"]) > 1e-3


def test_27_with_learning_rate_zero_the_ratio_stays_one(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, learning_rate=0.0, ppo_epochs=4, mini_batch_size=2)
    before = parameters(trainer)
    stats = step(trainer)
    assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(before, parameters(trainer))


def test_28_accumulation_and_smaller_forwards_leave_the_update_unchanged(
    make_model: MakeModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def updated(**settings: Any) -> torch.Tensor:
        trainer = make_trainer(make_model(), tokenizer, entropy_coef=0.01, **settings)
        step(trainer)
        return parameters(trainer)

    whole = updated()
    torch.testing.assert_close(updated(mini_batch_size=2, gradient_accumulation_steps=4), whole, rtol=1e-5, atol=1e-6)
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 12)
    torch.testing.assert_close(updated(), whole, rtol=1e-5, atol=1e-6)
    start = parameters(make_trainer(make_model(), tokenizer))
    assert float((whole - start).abs().max()) > 1e-3


def test_28_every_epoch_has_its_own_permutation_decided_by_seed_and_step() -> None:
    usual = {"seed": 0, "step": 0, "epoch": 0}
    first = minibatch_order(64, **usual)
    assert sorted(first.tolist()) == list(range(64)) and torch.equal(first, minibatch_order(64, **usual))
    for name in usual:
        assert not torch.equal(first, minibatch_order(64, **{**usual, name: 1})), name


def test_padding_and_order_leave_the_update_unchanged(make_model: MakeModel, tokenizer: Any) -> None:
    straight = make_trainer(make_model(), tokenizer, whiten_rewards=True)
    step(straight)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    shuffled = make_trainer(make_model(), tokenizer, whiten_rewards=True)
    shuffled.step(*([part[row] for row in order] for part in (QUERIES, RESPONSES, SCORES)))
    torch.testing.assert_close(parameters(shuffled), parameters(straight), rtol=1e-5, atol=1e-6)


def test_29_early_stop_ends_the_epochs_and_says_so(make_model: MakeModel, tokenizer: Any) -> None:
    settings = {"ppo_epochs": 5, "learning_rate": 0.5, "target_kl": 1e-6}
    stopped = step(make_trainer(make_model(), tokenizer, early_stopping=True, **settings))
    assert stopped["ppo/early_stopped"] == 1.0 and stopped["ppo/updates"] < 5
    assert stopped["ppo/policy/last_policykl"] > 1.5e-6
    free = step(make_trainer(make_model(), tokenizer, **settings))
    assert free["ppo/early_stopped"] == 0.0 and free["ppo/updates"] == 5


def test_29_the_last_updates_kl_is_what_stopped_and_not_the_mean(make_model: MakeModel, tokenizer: Any, on_updates: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, early_stopping=True, target_kl=1.0, ppo_epochs=5)
    moves = iter([0.5, 1.4, 1.6])
    on_updates(lambda figures: {**figures, "policy/policykl": next(moves)})
    stats = step(trainer)
    assert (stats["ppo/updates"], stats["ppo/policy/last_policykl"]) == (3.0, 1.6)
    assert stats["ppo/policy/policykl"] == pytest.approx(3.5 / 3)


def test_29_a_minibatch_beyond_the_ratio_threshold_is_skipped_and_counted(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, ratio_threshold=0.5)
    before = parameters(trainer)
    assert step(trainer)["ppo/skipped_minibatches"] == 1.0
    assert torch.equal(before, parameters(trainer))


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("what", ["full", "frozen", "lora"])
def test_31_kl_is_zero_at_the_start_and_the_step_runs(kind: str, what: str, make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model(kind)
    if what == "lora":
        model = add_lora(model, LoraSettings(), seed=1)
    model = with_value_head(model)
    if what == "frozen":
        apply_freezing(model, FreezeSettings(freeze_emb=True, freeze_attn=True, layers_not_to_freeze=[-1]), always_train=("v_head",))
    trainer = make_trainer(model, tokenizer, optimizer="adam")
    queries = QUERIES
    rollout = trainer.rollout(queries, SAMPLED, seed=0)
    stats = trainer.step(queries, rollout.responses, SCORES, sampled=rollout)
    assert trainer.record is not None
    assert float(trainer.record.kl.abs().max()) < 1e-5  # nats per token
    assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert stats["ppo/policy/entropy"] > 0
    again = step(trainer)
    assert abs(again["objective/kl"]) > 1e-4


def test_31_the_reference_of_trained_adapters_is_the_trained_model_not_its_base(make_model: MakeModel, tokenizer: Any) -> None:
    model = add_lora(make_model(), LoraSettings(), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    trainer = make_trainer(model, tokenizer)
    assert abs(step(trainer)["objective/kl"]) < 1e-5


def test_32_frozen_parameters_and_the_reference_never_change(make_model: MakeModel, tokenizer: Any) -> None:
    model = with_value_head(make_model())
    settings = FreezeSettings(freeze_emb=True, freeze_ln=True, freeze_attn=True, freeze_ff=True, layers_not_to_freeze=[1])
    apply_freezing(model, settings, always_train=("v_head",))
    trainer = make_trainer(model, tokenizer, optimizer="adam", weight_decay=0.5, ppo_epochs=2)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = {name: parameter.clone() for name, parameter in trainer.ref_model.named_parameters()}
    step(trainer)
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[name], value) and now[name].grad is None for name, value in frozen.items())
    assert all(not torch.equal(now[name], value) for name, value in trained.items())
    assert all(torch.equal(dict(trainer.ref_model.named_parameters())[name], value) for name, value in reference.items())


def test_a_model_of_which_nothing_trains_is_refused(make_model: MakeModel, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no parameter is left to train"):
        make_trainer(with_value_head(make_model()).requires_grad_(False), tokenizer)


def test_32_the_reference_shares_frozen_parameters_and_copies_trained_ones(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = PPOTrainer(PPOConfig(), with_value_head(make_model()), tokenizer=tokenizer, num_shared_layers=1)
    ours = dict(trainer.model.named_parameters())
    for name, parameter in trainer.ref_model.named_parameters():
        assert (parameter is ours[name]) == (".h.0." in name or ".wte." in name or ".wpe." in name), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_33_scores_that_are_not_finite_stop_the_step_with_their_rows(value: float, make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer)
    before = parameters(trainer)
    scores = [*SCORES[:2], value, *SCORES[3:5], value, *SCORES[6:]]
    with pytest.raises(NonFiniteError, match="scores of rows 2, 5 are not finite"):
        trainer.step(QUERIES, RESPONSES, scores)
    assert torch.equal(before, parameters(trainer))


def test_33_logprobs_that_are_not_finite_stop_the_step_with_their_rows(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model("gpt2", tie_word_embeddings=False), tokenizer)
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.wte.weight[70] = math.nan  # only row 5 holds token 70
    before = parameters(trainer)
    with pytest.raises(NonFiniteError, match="log-probabilities of rows 5 are not finite"):
        step(trainer)
    torch.testing.assert_close(before, parameters(trainer), rtol=0, atol=0, equal_nan=True)


class Heard(Runtime):
    """The runtime of one among two processes that only notes what is summed with the other."""

    shapes: list[tuple[int, ...]]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tensor.shape))
        return tensor


def overheard(trainer: PPOTrainer) -> list[tuple[int, ...]]:
    """The shapes that a trainer sums over processes, filled as it does."""
    runtime = Heard(trainer.model.device)
    object.__setattr__(runtime, "shapes", [])
    trainer.runtime = runtime
    return runtime.shapes


def test_33_every_process_takes_part_in_the_sums_before_one_of_them_stops(
    make_model: MakeModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would wait in a sum that never ends: a bad loss in the first of several forwards is told after the last."""
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 12)
    healthy, ill = make_trainer(make_model(), tokenizer), make_trainer(make_model(), tokenizer)
    expected, heard = overheard(healthy), overheard(ill)
    step(healthy)
    original, calls = update_module.policy_loss, []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        loss, share = original(*arguments, **options)
        return (loss * math.nan if len(calls) == 1 else loss), share

    monkeypatch.setattr(update_module, "policy_loss", spoilt)
    before = parameters(ill)
    with pytest.raises(NonFiniteError, match="losses of rows"):
        step(ill)
    assert len(calls) > 1 and heard == expected[: len(heard)]
    assert torch.equal(before, parameters(ill))


@pytest.mark.parametrize("place", ["score", "loss"])
def test_33_what_is_not_finite_in_another_process_stops_this_one_too(
    place: str, make_model: MakeModel, tokenizer: Any, in_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(runtime: Runtime) -> None:
        trainer = make_trainer(make_model(), tokenizer, batch_size=4, mini_batch_size=4)
        trainer.runtime = runtime
        own = slice(4 * runtime.rank, 4 * runtime.rank + 4)
        scores = [*SCORES[:6], math.nan if place == "score" else 0.0, SCORES[7]]
        if place == "loss":
            monkeypatch.setattr(Update, "backward", one_bad_loss)
        before = parameters(trainer)
        row = "6" if place == "score" else "3"
        with pytest.raises(NonFiniteError, match=f"of rows {row} are not finite"):
            trainer.step(QUERIES[own], RESPONSES[own], scores[own])
        assert torch.equal(before, parameters(trainer))

    original = Update.backward

    def one_bad_loss(self: Update, rows: torch.Tensor, *others: Any, **named: Any) -> Any:
        figures, bad = original(self, rows, *others, **named)
        return figures, bad | (rows == 3)

    in_ranks(2, work)


def test_33_gradients_that_are_not_finite_never_reach_a_parameter(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer)
    trainer.model.v_head.summary.bias.register_hook(lambda gradient: gradient * math.nan)
    before = parameters(trainer)
    with pytest.raises(NonFiniteError, match="gradients"):
        step(trainer)
    assert torch.equal(before, parameters(trainer))


def test_15_empty_answers_are_legal(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer)
    responses = [[], *RESPONSES[1:]]
    stats = trainer.step(QUERIES, responses, SCORES)
    assert math.isfinite(stats["ppo/loss/total"]) and bool(torch.isfinite(parameters(trainer)).all())
    assert trainer.record is not None and not trainer.record.rewards[0].any()


def test_15_a_minibatch_of_empty_answers_alone_changes_nothing_and_is_counted(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, optimizer="adam", mini_batch_size=1, learning_rate=1e-4)
    stats = trainer.step(QUERIES, [[], *RESPONSES[1:]], SCORES)
    assert stats["ppo/empty_minibatches"] == 1.0 and stats["ppo/updates"] == 8.0
    assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=0.1)  # the mean of the seven others
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))
    before = parameters(trainer)
    stats = trainer.step(QUERIES, [[]] * 8, SCORES)  # Adam has momentum by now
    assert stats["ppo/empty_minibatches"] == 8.0 and stats["ppo/loss/total"] == 0.0
    assert torch.equal(before, parameters(trainer))


def test_08_the_value_head_starts_at_zero_and_warm_up_trains_the_value_alone(make_model: MakeModel, tokenizer: Any) -> None:
    fresh = with_value_head(make_model())
    assert not fresh.v_head.summary.weight.any() and not fresh.v_head.summary.bias.any()
    trainer = make_trainer(fresh, tokenizer, critic_warmup_steps=1)
    policy = copy.deepcopy(trainer.model.pretrained_model.state_dict())
    head = trainer.model.v_head.summary.weight.clone()
    step(trainer)
    assert all(torch.equal(value, policy[name]) for name, value in trainer.model.pretrained_model.state_dict().items())
    assert not torch.equal(head, trainer.model.v_head.summary.weight)
    step(trainer)
    assert any(not torch.equal(value, policy[name]) for name, value in trainer.model.pretrained_model.state_dict().items())


def test_08_a_critic_of_its_own_learns_and_leaves_the_policys_head_alone(make_model: MakeModel, tokenizer: Any) -> None:
    critic = Critic(make_model("gpt_neo", 7).transformer)
    trainer = make_trainer(make_model(), tokenizer, critic=critic, optimizer="adam", learning_rate=0.01)
    head = trainer.model.v_head.summary.weight.clone()
    errors = [step(trainer)["ppo/val/error"] for _ in range(12)]
    assert errors[-1] < 0.5 * errors[0]
    assert torch.equal(head, trainer.model.v_head.summary.weight)


def test_08_a_critic_from_a_reward_model_starts_with_its_normalised_score(make_model: MakeModel, tokenizer: Any) -> None:
    reward = RewardModel.from_backbone(make_model("gpt_neo", 7).transformer, seed=3).eval()
    trainer = make_trainer(make_model(), tokenizer, critic=Critic.from_reward_model(reward, mean=0.5, scale=2.0))
    step(trainer)
    record = trainer.record
    assert record is not None
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        ids = torch.tensor([query + response[:-1]])  # the value before a token is read where that token is predicted
        with torch.no_grad():
            score = float(reward(ids, torch.ones_like(ids)))
        assert float(record.values[row, len(response) - 1]) == pytest.approx((score - 0.5) / 2.0, abs=1e-5)


def test_22_whitened_rewards_do_not_leak_through_padding(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4), whiten_rewards=True)
    step(trainer)
    record = trainer.record
    assert record is not None
    shaped = masked_rescale(record.rewards, record.mask)
    _, returns = gae(shaped, record.values, record.mask, 1.0, 0.95)
    torch.testing.assert_close(record.returns, returns, rtol=1e-6, atol=1e-6)


def test_22_the_classic_leak_through_padding_is_there_when_asked_for(make_model: MakeModel, tokenizer: Any) -> None:
    """In the classic trainer's layout every row but the longest has padding after it, whose shifted zeros reach its returns."""
    clean, classic = (
        make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4), whiten_rewards=True, classic_quirks=quirks, lam=1.0)
        for quirks in (False, True)
    )
    step(clean), step(classic)
    assert clean.record is not None and classic.record is not None
    lengths = [len(query) + len(response) for query, response in zip(QUERIES, RESPONSES, strict=True)]
    mean, var = masked_moments(clean.record.rewards, clean.record.mask)
    shift = float(mean - mean * torch.rsqrt(var + 1e-8))  # what a zero of padding becomes
    assert abs(shift) > 1e-3
    for row, response in enumerate(RESPONSES):
        leak = classic.record.returns[row, : len(response)] - clean.record.returns[row, : len(response)]
        torch.testing.assert_close(leak, torch.full_like(leak, shift * (max(lengths) - lengths[row])), rtol=1e-4, atol=1e-4)


def test_the_entropy_bonus_raises_the_entropy(make_model: MakeModel, tokenizer: Any) -> None:
    def entropy_after(coef: float) -> float:
        trainer = make_trainer(make_model(), tokenizer, entropy_coef=coef, learning_rate=0.02)
        step(trainer)
        return float(step(trainer)["ppo/policy/entropy"])

    assert entropy_after(1.0) > entropy_after(0.0) + 1e-3


def test_max_grad_norm_bounds_every_step_but_in_the_classic_way_the_first_alone(make_model: MakeModel, tokenizer: Any) -> None:
    for quirks, bounded in ((False, [True, True]), (True, [True, False])):
        trainer = make_trainer(make_model(), tokenizer, max_grad_norm=1e-6, learning_rate=1.0, classic_quirks=quirks)
        moved = []
        for _ in range(2):
            before = parameters(trainer)
            step(trainer)
            moved.append(float((parameters(trainer) - before).norm()) < 1e-5)
        assert moved == bounded


def test_09_dropout_is_off_in_rollout_and_update(make_model: MakeModel, tokenizer: Any) -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    trainer = make_trainer(model, tokenizer, learning_rate=0.0, ppo_epochs=2)
    assert not any(module.training for module in [*trainer.model.modules(), *trainer.ref_model.modules()])
    stats = step(trainer)
    assert stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_09_recomputed_activations_change_nothing(make_model: MakeModel, tokenizer: Any) -> None:
    plain = make_trainer(make_model("gpt2", resid_pdrop=0.5), tokenizer)
    model = make_model("gpt2", resid_pdrop=0.5)
    recompute_activations(model)
    checkpointed = make_trainer(model, tokenizer)
    assert checkpointed.recomputing and not plain.recomputing
    step(plain), step(checkpointed)
    torch.testing.assert_close(parameters(checkpointed), parameters(plain), rtol=1e-6, atol=1e-7)
    assert not any(module.training for module in checkpointed.model.modules())


@pytest.mark.parametrize("penalty", ["kl", "full"])
def test_10_the_temperature_divides_the_logits_of_policy_and_reference(penalty: str, make_model: MakeModel, tokenizer: Any) -> None:
    def scaled(seed: int) -> Any:
        model = make_model("gpt2", seed, tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight /= 2.0
        return model

    plain, other = (make_model("gpt2", seed, tie_word_embeddings=False) for seed in (0, 4))
    warm = make_trainer(plain, tokenizer, other=other, kl_penalty=penalty)
    cold = make_trainer(scaled(0), tokenizer, other=scaled(4), kl_penalty=penalty)
    first, second = step(warm, temperature=2.0), step(cold)
    assert first["objective/kl"] == pytest.approx(second["objective/kl"], rel=1e-5)
    assert first["ppo/policy/entropy"] == pytest.approx(second["ppo/policy/entropy"], rel=1e-5)
    assert first["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)  # the update divides by it too


def test_18_the_controller_counts_answers_and_sums_over_tokens(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4), target=1e4, horizon=80.0, init_kl_coef=0.5)
    stats = step(trainer)
    assert trainer.record is not None
    by_hand = float((trainer.record.kl * trainer.record.mask).sum()) / 8
    assert stats["objective/kl"] == pytest.approx(by_hand, rel=1e-6) and abs(by_hand) > 0.1
    assert trainer.kl_coef == pytest.approx(0.5 * (1 - 0.2 * 8 / 80))


def test_18_19_state_survives_a_resume(make_model: MakeModel, tokenizer: Any) -> None:
    settings = {"use_score_scaling": True, "use_score_norm": True, "optimizer": "adam", "ppo_epochs": 2, "mini_batch_size": 4}
    straight = make_trainer(make_model(), tokenizer, **settings)
    step(straight), step(straight)
    first = make_trainer(make_model(), tokenizer, **settings)
    step(first)
    resumed = make_trainer(make_model(), tokenizer, **settings)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    step(resumed)
    assert torch.equal(parameters(resumed), parameters(straight))
    assert (resumed.kl_coef, resumed.moments) == (straight.kl_coef, straight.moments)


@pytest.mark.parametrize("penalty", ["kl", "abs", "mse", "k3", "full"])
def test_17_every_estimator_runs_through_the_step(penalty: str, make_model: MakeModel, tokenizer: Any) -> None:
    stats = step(make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4), kl_penalty=penalty))
    assert math.isfinite(stats["objective/kl"])
    if penalty in ("mse", "k3", "full", "abs"):
        assert stats["objective/kl"] > 0


def test_02_response_masks_take_tokens_out_of_every_sum(make_model: MakeModel, tokenizer: Any) -> None:
    masks = [[1] * len(response) for response in RESPONSES]
    masks[3] = [1, 1, 1, 0, 0, 0]
    trainer = make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4))
    trainer.step(QUERIES, RESPONSES, SCORES, masks)
    record = trainer.record
    assert record is not None
    assert not record.advantages[3, 3:].any() and not record.rewards[3, 3:].any()
    assert float(record.rewards[3, 2] - record.non_score_rewards[3, 2]) == pytest.approx(SCORES[3])


def test_lists_that_do_not_fit_together_are_refused(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer)
    with pytest.raises(ValueError, match="responses: got 7, expected batch_size 8"):
        trainer.step(QUERIES, RESPONSES[:7], SCORES)
    with pytest.raises(ValueError, match=r"queries \[0\] are empty"):
        trainer.step([[], *QUERIES[1:]], RESPONSES, SCORES)
    with pytest.raises(ValueError, match="16 is not divisible by mini_batch_size 5"):
        PPOConfig(batch_size=16, mini_batch_size=5)


def test_generate_returns_prompt_and_answer_and_the_reference_answers_alike_at_the_start(make_model: MakeModel, tokenizer: Any) -> None:
    trainer = make_trainer(make_model(), tokenizer)
    queries = [torch.tensor(query) for query in QUERIES]
    options = {"do_sample": True, "max_new_tokens": 5, "pad_token_id": 0}
    answers, reference = trainer.generate(queries, return_prompt=False, generate_ref_response=True, **options)
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in reference]
    whole = make_trainer(make_model(), tokenizer).generate(queries, **options)
    assert [row.tolist() for row in whole] == [query + answer.tolist() for query, answer in zip(QUERIES, answers, strict=True)]
    single = trainer.generate(queries[0], **options)
    assert single.shape[0] == 1 and single[0, :3].tolist() == QUERIES[0]
    longest = trainer.generate(queries, length_sampler=lambda: 2, return_prompt=False, do_sample=True)
    assert max(map(len, longest)) <= 2


def test_an_encoder_decoders_start_token_is_no_part_of_the_answer(make_model: MakeModel, tokenizer: Any) -> None:
    plain, started = (make_trainer(make_model("t5"), tokenizer) for _ in range(2))
    start = plain.policy.model.config.decoder_start_token_id
    plain_stats = step(plain)
    stats = started.step(QUERIES, [[start, *response] for response in RESPONSES], SCORES)
    assert stats["objective/entropy"] == pytest.approx(plain_stats["objective/entropy"], rel=1e-6)
    torch.testing.assert_close(parameters(started), parameters(plain), rtol=1e-6, atol=1e-7)


def test_an_encoder_decoders_start_token_leaves_its_mask_too(make_model: MakeModel, tokenizer: Any) -> None:
    masks = [[1] * len(response) for response in RESPONSES]
    masks[3] = [1, 1, 0, 1, 0, 1]
    plain, started = (make_trainer(make_model("t5"), tokenizer) for _ in range(2))
    start = plain.policy.model.config.decoder_start_token_id
    plain.step(QUERIES, RESPONSES, SCORES, masks)
    started.step(QUERIES, [[start, *response] for response in RESPONSES], SCORES, [[0, *mask] for mask in masks])
    assert plain.record is not None and started.record is not None
    assert torch.equal(started.record.mask, plain.record.mask)
    assert plain.record.mask[3].tolist() == [True, True, False, True, False, True]


def test_forwards_are_bounded_by_tokens_and_by_logits_with_an_encoders_prompt_counted(
    make_model: MakeModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(8)

    def sizes(kind: str, vocab: int = 280) -> list[int]:
        parts = list(chunks_module.chunks(rows, gather_answers(QUERIES, RESPONSES, make_model(kind).config), vocab))
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        return [len(part) for part in parts]

    assert sizes("gpt2") == sizes("t5") == [8]
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 44)
    assert sizes("gpt2") == [6, 2]  # of 3, 4, 5, 5, 6, 6 and 10, 11 tokens
    assert sizes("t5") == [5, 3]  # encoder + decoder: 2+2, 2+3, 3+3, 3+3, 3+4 and 2+5, 4+7, 6+6
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 2048)
    monkeypatch.setitem(chunks_module.CHUNK_LOGITS, "cpu", 6 * 280)  # 24 answer tokens in all
    parts = list(chunks_module.chunks(rows, gather_answers(QUERIES, RESPONSES, make_model("gpt2").config), 280))
    assert len(parts) > 3 and all(sum(len(RESPONSES[row]) for row in part.tolist()) <= 6 for part in parts)
    assert sizes("gpt2", vocab=28) == [8]


def test_weights_that_train_are_float32_unless_the_optimizer_is_the_callers(make_model: MakeModel, tokenizer: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="the weights to train are " + str(dtype).removeprefix("torch.")):
            PPOTrainer(PPOConfig(), with_value_head(make_model().to(dtype)), tokenizer=tokenizer)
        PPOTrainer(PPOConfig(), with_value_head(add_lora(make_model().to(dtype), LoraSettings(), seed=1)), tokenizer=tokenizer)


def test_12_in_bfloat16_the_step_recomputes_what_sampling_met(make_model: MakeModel, tokenizer: Any) -> None:
    model = add_lora(make_model().to(torch.bfloat16), LoraSettings(), seed=1)
    trainer = make_trainer(model, tokenizer, optimizer="adam")
    rollout = trainer.rollout(QUERIES, SAMPLED, seed=0)
    assert rollout.values is not None
    rollout.logprobs.fill_(-7.0), rollout.values.fill_(-7.0)
    assert max(map(abs, trainer.sampled_kl(rollout))) < 1e-5
    stats = trainer.step(rollout.queries, rollout.responses, SCORES, sampled=rollout)
    assert trainer.record is not None
    assert not bool((trainer.record.logprobs == -7.0).any()) and not bool((trainer.record.values == -7.0).any())
    assert abs(stats["objective/kl"]) < 1e-5 and stats["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_rows_of_generate_are_numbered_among_all_processes(make_model: MakeModel, tokenizer: Any) -> None:
    options = {"do_sample": True, "max_new_tokens": 5, "return_prompt": False}
    alone = make_trainer(make_model(), tokenizer)
    queries = [torch.tensor(query) for query in QUERIES[:4]]
    expected = [[answer.tolist() for answer in alone.generate(queries, **options)] for _ in range(2)]
    assert expected[0] != expected[1]
    for rank in range(2):
        trainer = make_trainer(make_model(), tokenizer)
        trainer.runtime = Runtime(trainer.model.device, rank=rank, world_size=2)
        for whole in expected:
            mine = trainer.generate(queries[2 * rank : 2 * rank + 2], **options)
            assert [answer.tolist() for answer in mine] == whole[2 * rank : 2 * rank + 2]


def test_the_kl_of_a_rollout_asks_no_critic(make_model: MakeModel, tokenizer: Any) -> None:
    critic = Critic(make_model("gpt_neo", 7).transformer)
    trainer = make_trainer(make_model(), tokenizer, other=make_model("gpt_neo", 4), critic=critic)
    rollout = trainer.rollout(QUERIES, SAMPLED, seed=0)
    critic.trunk.forward = None
    kept = trainer.sampled_kl(rollout)
    stats_kl = []
    for query, response in zip(rollout.queries, rollout.responses, strict=True):
        ids = torch.tensor([query + response])
        with torch.no_grad():
            both = [
                model(ids).logits[0, len(query) - 1 : -1].log_softmax(-1)
                for model in (trainer.policy.model, trainer.networks.reference.model)
            ]
        tokens = torch.tensor(response)[:, None]
        stats_kl.append(float((both[0] - both[1]).gather(1, tokens).sum()))
    assert kept == pytest.approx(stats_kl, abs=1e-4)


def test_ppo_finds_the_rewarded_token(make_model: MakeModel, tokenizer: Any) -> None:
    """The whole of it: a reward for some tokens makes the policy write them."""
    settings = {"ppo_epochs": 4, "init_kl_coef": 0.0, "batch_size": 64, "mini_batch_size": 64, "learning_rate": 0.02}
    trainer = make_trainer(make_model(), tokenizer, optimizer="adam", **settings)
    params = GenerateParams(do_sample=True, max_new_tokens=3)
    shares = []
    for number in range(25):
        rollout = trainer.rollout([QUERIES[row % 8] for row in range(64)], params, seed=1, step=number)
        hits = [sum(2 <= token < 40 for token in response) / 3 for response in rollout.responses]
        shares.append(sum(hits) / 64)
        trainer.step(rollout.queries, rollout.responses, hits, sampled=rollout)
    assert shares[0] < 0.3 and shares[-1] > 0.8


def test_a_state_of_another_kind_of_trainer_is_refused_before_anything_changes(make_model: MakeModel, tokenizer: Any) -> None:
    plain, scheduled = make_trainer(make_model(), tokenizer), make_trainer(make_model(), tokenizer)
    scheduled.lr_scheduler = torch.optim.lr_scheduler.LinearLR(scheduled.optimizer)
    scheduled.step(QUERIES, RESPONSES, SCORES)
    with pytest.raises(ValueError, match="lr_scheduler: the state has one and this trainer has none"):
        plain.load_state_dict(scheduled.state_dict())
    with pytest.raises(ValueError, match="lr_scheduler: this trainer has one and the state has none"):
        scheduled.load_state_dict(plain.state_dict())
    assert (plain.steps_done, scheduled.steps_done) == (0, 1) and not plain.optimizer.state_dict()["state"]
    with pytest.raises(ValueError, match="critic: the state has one and this trainer has none"):
        plain.load_state_dict({**plain.state_dict(), "critic": {}})
