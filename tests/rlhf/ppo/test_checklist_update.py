"""Details 24 to 32 of docs/ppo_checklist.md: losses, epochs and minibatches, what stops them, what is logged, what never moves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, tensor

import common.chunks as common_chunks
from common.freezing import apply_freezing
from common.launch.runtime import Runtime
from common.lora import add_lora
from common.optim import lr_lambda
from common.schema import FreezeSettings, GenerateParams, LoraSettings
from rlhf.config import PPOParams
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.losses import policy_loss, token_stats, value_loss
from rlhf.ppo.models import with_value_head
from rlhf.ppo.update import Update, minibatch_order

SAMPLED = GenerateParams(do_sample=True, max_new_tokens=6)
Build = Callable[..., PPOTrainer]
InRanks = Callable[[int, Callable[[Runtime], Any]], list[Any]]


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.parameters])


# --- 24 ---------------------------------------------------------------------------------------------------------------------------


def test_24_the_clipped_loss_by_hand() -> None:
    """Clip range 0.5: the larger of -A * ratio and -A * clipped ratio, averaged over five of six tokens."""
    ratios = tensor([2.0, 0.25, 1.25, 2.0, 0.25, 9.0])
    advantages = tensor([2.0, 2.0, 2.0, -2.0, -2.0, -9.0])
    mask = tensor([True, True, True, True, True, False])
    loss, share = policy_loss(ratios.log() - 1.0, torch.full((6,), -1.0), advantages, mask, 0.5)
    # -2 * min(2, 1.5), -2 * min(0.25, 0.5), -2 * 1.25, 2 * max(2, 1.5), 2 * max(0.25, 0.5)
    assert float(loss) == pytest.approx((-3.0 - 0.5 - 2.5 + 4.0 + 1.0) / 5, rel=1e-6)
    assert float(share) == pytest.approx(2 / 5)  # the first and the fifth


def test_24_no_gradient_where_the_clip_decides() -> None:
    logprobs = tensor([2.0, 0.25, 2.0, 0.25]).log().requires_grad_()
    loss, _ = policy_loss(logprobs, torch.zeros(4), tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4, dtype=torch.bool), 0.5)
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([0.0, -0.25, 2.0, 0.0]) / 4, rtol=1e-6, atol=1e-8)


def test_24_dual_clip_binds_where_the_advantage_is_negative_alone() -> None:
    ratios, advantages = tensor([8.0, 8.0, 2.0]), tensor([-1.5, 1.5, -1.5])
    every = torch.ones(3, dtype=torch.bool)
    loss, _ = policy_loss(ratios.log(), torch.zeros(3), advantages, every, 0.2, dual_clip=4.0)
    assert float(loss) == pytest.approx((1.5 * 4.0 - 1.5 * 1.2 + 1.5 * 2.0) / 3, rel=1e-6)
    unbound, _ = policy_loss(ratios.log(), torch.zeros(3), advantages, every, 0.2)
    assert float(unbound) == pytest.approx((1.5 * 8.0 - 1.5 * 1.2 + 1.5 * 2.0) / 3, rel=1e-6)


# --- 25 ---------------------------------------------------------------------------------------------------------------------------


def test_25_the_value_loss_by_hand() -> None:
    """Clip range 0.5 around the old value: moved too far towards the return, too far away from it, a little, and masked."""
    values, old, returns = tensor([2.0, -1.0, 0.25, 99.0]), torch.zeros(4), tensor([2.0, 2.0, 1.0, 0.0])
    mask = tensor([True, True, True, False])
    loss, share = value_loss(values, old, returns, mask, 0.5)
    # (0.5 - 2)^2 > 0; (-1 - 2)^2 > (-0.5 - 2)^2; (0.25 - 1)^2
    assert float(loss) == pytest.approx(0.5 * (2.25 + 9.0 + 0.5625) / 3, rel=1e-6)
    assert float(share) == pytest.approx(1 / 3)


def test_25_the_value_loss_weighs_a_tenth(build: Build, batch: Any) -> None:
    assert PPOConfig().vf_coef == PPOParams(model_name="x").vf_coef == 0.1
    trainer = build()
    stats = trainer.step(*batch)
    assert trainer.record is not None
    mask = trainer.record.mask
    error = float((trainer.record.values - trainer.record.returns)[mask].square().mean())
    assert stats["ppo/loss/value"] == pytest.approx(0.5 * error, rel=1e-5) and error > 0.1
    assert stats["ppo/loss/total"] == pytest.approx(stats["ppo/loss/policy"] + 0.1 * 0.5 * error, rel=1e-5)


# --- 26 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 2, 1])
def test_26_the_first_minibatch_has_ratio_one_and_loss_minus_its_mean_advantage(
    size: int, build: Build, batch: Any, on_updates: Any
) -> None:
    trainer = build(mini_batch_size=size, ppo_epochs=2)
    seen: list[dict[str, float]] = []
    on_updates(seen.append)
    first_rows = minibatch_order(4, trainer.config.seed, step=0, epoch=0)[:size]
    trainer.step(*batch)
    assert trainer.record is not None
    mask = trainer.record.mask[first_rows]
    advantage = float(trainer.record.advantages[first_rows][mask].mean())
    first = seen[0]
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/approxkl"] == pytest.approx(0.0, abs=1e-10)
    assert first["policy/clipfrac"] == 0.0
    assert first["loss/policy"] == pytest.approx(-advantage, abs=1e-6)
    assert abs(advantage) < 1e-6 if size == 4 else abs(advantage) > 1e-3
    assert seen[1]["policy/approxkl"] > 1e-6


# --- 27 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_27_with_learning_rate_zero_every_update_of_every_epoch_has_ratio_one(
    optimizer: str, build: Build, batch: Any, on_updates: Any
) -> None:
    trainer = build(learning_rate=0.0, ppo_epochs=3, mini_batch_size=2, optimizer=optimizer)
    seen: list[dict[str, float]] = []
    on_updates(seen.append)
    before = weights(trainer)
    trainer.step(*batch)
    assert len(seen) == 6
    for figures in seen:
        assert figures["policy/ratio"] == pytest.approx(1.0, abs=1e-6) and figures["policy/approxkl"] < 1e-10
        assert figures["policy/clipfrac"] == 0.0 and figures["gradient_norm"] > 0
    assert torch.equal(weights(trainer), before)


# --- 28 ---------------------------------------------------------------------------------------------------------------------------


def test_28_each_epoch_visits_every_answer_once_in_an_order_of_its_own(build: Build, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(ppo_epochs=6, mini_batch_size=1, learning_rate=0.0)
    visited: list[int] = []
    original = Update.backward
    monkeypatch.setattr(Update, "backward", lambda *given, **named: visited.extend(given[1].tolist()) or original(*given, **named))
    trainer.step(*batch)
    epochs = [tuple(visited[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and len(set(epochs)) >= 4
    visited.clear()
    trainer.step(*batch)
    assert [tuple(visited[start : start + 4]) for start in range(0, 24, 4)] != epochs


def test_28_microbatches_accumulation_and_processes_leave_the_update_unchanged(
    build: Build, batch: Any, make_model: Any, in_ranks: InRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers have 3, 5, 2 and 4 tokens, so that means of means would differ from the mean over all tokens."""

    def update(runtime: Runtime, **settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        share = slice(2 * runtime.rank, 2 * runtime.rank + 2) if runtime.world_size > 1 else slice(None)
        usual = {"ppo_epochs": 2, "entropy_coef": 0.01, "max_grad_norm": 0.5}
        trainer = build(make_model(), reference=make_model("gpt_neo", 4), **{**usual, **settings})
        trainer.runtime = runtime
        stats = trainer.step(*(part[share] for part in batch))
        return weights(trainer), stats

    alone = Runtime.local("cpu")
    start = weights(build(make_model()))
    whole, stats = update(alone)
    assert float((whole - start).abs().max()) > 1e-3
    results = [update(alone, mini_batch_size=1, gradient_accumulation_steps=4)]
    results += in_ranks(2, lambda runtime: update(runtime, batch_size=2, mini_batch_size=2))
    results += in_ranks(2, lambda runtime: update(runtime, batch_size=2, mini_batch_size=1, gradient_accumulation_steps=2))
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 12)
    results.append(update(alone))
    figures = ["loss/total", "loss/policy", "loss/value", "policy/entropy", "policy/approxkl", "val/error", "returns/var", "gradient_norm"]
    for moved, others in results:
        torch.testing.assert_close(moved, whole, rtol=1e-5, atol=1e-6)
        for name in [f"ppo/{figure}" for figure in figures] + ["objective/kl", "objective/entropy", "tokens/responses_len_mean"]:
            assert others[name] == pytest.approx(stats[name], rel=1e-4, abs=1e-6), name


# --- 29 ---------------------------------------------------------------------------------------------------------------------------


def test_29_updates_stop_once_the_policy_moved_beyond_one_and_a_half_targets(build: Build, batch: Any, on_updates: Any) -> None:
    """1.5 * 0.5 = 0.75 itself does not stop."""
    trainer = build(early_stopping=True, target_kl=0.5, ppo_epochs=6, learning_rate=0.0)
    moves = iter([0.1, 0.7, 0.75, 0.76, 0.1, 0.1])
    on_updates(lambda figures: {**figures, "policy/policykl": next(moves)})
    stats = trainer.step(*batch)
    assert (stats["ppo/updates"], stats["ppo/early_stopped"], stats["ppo/policy/last_policykl"]) == (4.0, 1.0, 0.76)


def test_29_what_stops_is_the_mean_of_old_minus_new_logprobs(build: Build, batch: Any) -> None:
    """Old log-probabilities 0.3 above the true ones: the policy seems to have moved 0.3 nats per token before any update."""
    for target, stopped in ((0.19, True), (0.21, False)):
        trainer = build(early_stopping=True, target_kl=target, ppo_epochs=3, learning_rate=0.0)
        rollout = trainer.rollout(batch.queries, SAMPLED, seed=0)
        rollout.logprobs[rollout.logprobs != 0] += 0.3
        stats = trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout)
        assert stats["ppo/policy/policykl"] == pytest.approx(0.3, abs=1e-5)
        assert stats["ppo/policy/ratio"] == pytest.approx(math.exp(-0.3), rel=1e-5)
        assert (stats["ppo/updates"], stats["ppo/early_stopped"]) == ((1.0, 1.0) if stopped else (3.0, 0.0))


def test_29_a_batch_beyond_the_ratio_threshold_is_skipped_and_counted(build: Build, batch: Any) -> None:
    """Old log-probabilities ln 20 below the true ones make every ratio 20."""
    for threshold, skipped in ((10.0, True), (20.1, False)):
        trainer = build(ratio_threshold=threshold, ppo_epochs=2, learning_rate=1e-9, optimizer="adam")
        rollout = trainer.rollout(batch.queries, SAMPLED, seed=0)
        rollout.logprobs[rollout.logprobs != 0] -= math.log(20.0)
        before = weights(trainer)
        stats = trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout)
        assert stats["ppo/policy/ratio"] == pytest.approx(20.0, rel=1e-4)
        assert stats["ppo/skipped_minibatches"] == (2.0 if skipped else 0.0)
        assert torch.equal(before, weights(trainer)) is skipped and bool(trainer.optimizer.state) is not skipped
    assert PPOConfig().ratio_threshold == 10.0


# --- 30 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1.0])
def test_30_adams_eps_is_an_option(eps: float, build: Build, batch: Any) -> None:
    """Adam's first step moves a number by learning_rate * g / (|g| + eps); g of the value head's bias is 0.1 * mean(V - R)."""
    params = PPOParams(model_name="x", batch_size=4, adam_eps=eps, learning_rate=0.01)
    settings = PPOConfig.from_params(params, seed=0)
    trainer = build(optimizer="adam", adam_eps=settings.adam_eps, learning_rate=settings.learning_rate)
    before = float(trainer.model.v_head.summary.bias.detach())
    trainer.step(*batch)
    assert trainer.record is not None
    gradient = 0.1 * float((trainer.record.values - trainer.record.returns)[trainer.record.mask].mean())
    moved = float(trainer.model.v_head.summary.bias.detach()) - before
    assert moved == pytest.approx(-0.01 * gradient / (abs(gradient) + eps), rel=1e-4) and abs(gradient) > 1e-3


def test_30_the_learning_rate_may_fall_linearly_to_zero(build: Build, batch: Any) -> None:
    factors = lr_lambda("linear", 0, 4)
    assert [factors(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    trainer = build(learning_rate=0.08)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, factors)
    rates = [trainer.step(*batch)["ppo/learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])
    before = weights(trainer)
    trainer.step(*batch)
    assert torch.equal(weights(trainer), before)


# --- 31 ---------------------------------------------------------------------------------------------------------------------------


def test_31_metrics_count_the_mask_alone(build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(make_model("gpt2"), reference=make_model("gpt2", 4), learning_rate=0.0)
    masks = [[1, 0, 1], [0, 0, 0, 0, 0], [1, 1], [1, 1, 0, 1]]
    stats = trainer.step(*batch, masks)
    record = trainer.record
    assert record is not None
    kl, surprise, entropy, errors = [], [], [], []
    for row, (query, response) in enumerate(zip(batch.queries, batch.responses, strict=True)):
        ids = torch.tensor([query + response])
        with torch.no_grad():
            ours, _, values = trainer.model(ids)
            theirs = trainer.networks.reference.model(ids).logits
        for token, counts in enumerate(masks[row]):
            if counts:
                place = len(query) - 1 + token
                policy, reference = (logits[0, place].log_softmax(-1) for logits in (ours, theirs))
                kl.append(float(policy[response[token]] - reference[response[token]]))
                surprise.append(-float(policy[response[token]]))
                entropy.append(-float((policy.exp() * policy).sum()))
                errors.append(float((values[0, place] - record.returns[row, token]) ** 2))
    assert len(kl) == 7
    assert stats["objective/kl"] == pytest.approx(sum(kl) / 4, abs=1e-5)
    assert stats["objective/entropy"] == pytest.approx(sum(surprise) / 4, rel=1e-5)
    assert stats["ppo/policy/entropy"] == pytest.approx(sum(entropy) / 7, rel=1e-5)
    assert stats["ppo/val/error"] == pytest.approx(sum(errors) / 7, rel=1e-4)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * sum(kl) / 7, abs=1e-5)


def test_31_entropy_by_hand_and_never_negative() -> None:
    half = token_stats(tensor([[0.0, 0.0, -1e4], [0.0, -1e4, -1e4]]), tensor([0, 0]), entropy=True).entropy
    assert half is not None and half.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-7)
    sharp = token_stats(torch.randn(500, 9, generator=torch.Generator().manual_seed(0)) * 100, torch.zeros(500).long(), entropy=True)
    assert sharp.entropy is not None and float(sharp.entropy.min()) >= 0.0


@pytest.mark.parametrize("what", ["full", "frozen", "adapters"])
def test_31_kl_at_step_0_is_zero(what: str, build: Build, batch: Any, make_model: Any) -> None:
    """With adapters that were trained before: the reference is the model that starts, not the base under them."""
    model = make_model()
    if what == "adapters":
        model = add_lora(model, LoraSettings(), seed=1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
        ids = torch.tensor([batch.queries[0]])
        with torch.no_grad(), model.disable_adapter():
            base = model(ids).logits
        with torch.no_grad():
            assert float((model(ids).logits - base).abs().max()) > 0.1
    policy = with_value_head(model)
    if what == "frozen":
        apply_freezing(policy, FreezeSettings(freeze_emb=True, layers_not_to_freeze=[-1]), always_train=("v_head",))
    trainer = build(policy, ppo_epochs=2)
    rollout = trainer.rollout(batch.queries, SAMPLED, seed=0)
    stats = trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout)
    assert trainer.record is not None and float(trainer.record.kl.abs().max()) < 1e-5
    assert abs(stats["objective/kl"]) < 1e-4
    trainer.step(*batch)
    assert float(trainer.record.kl.abs().max()) > 1e-3


# --- 32 ---------------------------------------------------------------------------------------------------------------------------


def checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_32_frozen_parameters_get_no_gradient_and_no_decay(own_optimizer: bool, build: Build, batch: Any, make_model: Any) -> None:
    """Also under a caller's optimizer that holds them all."""
    policy = with_value_head(make_model())
    apply_freezing(policy, FreezeSettings(freeze_emb=True, freeze_ln=True, layers_not_to_freeze=[1]), always_train=("v_head",))
    trainer = build(policy, optimizer="adam", weight_decay=0.5, ppo_epochs=2)
    if own_optimizer:
        trainer.optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.5)
    frozen = {name: value.detach().clone() for name, value in policy.named_parameters() if not value.requires_grad}
    trained = {name: value.detach().clone() for name, value in policy.named_parameters() if value.requires_grad}
    assert frozen and trained
    trainer.step(*batch)
    now = dict(policy.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(now[name], value) and now[name].grad is None and now[name] not in trainer.optimizer.state, name
    assert not any(torch.equal(now[name], value) for name, value in trained.items())


@pytest.mark.parametrize("given", [False, True])
def test_32_the_reference_never_changes(given: bool, build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(reference=with_value_head(make_model("gpt_neo", 4)) if given else None, optimizer="adam", weight_decay=0.5)
    before, started = checksum(trainer.ref_model), checksum(trainer.model)
    for _ in range(2):
        trainer.step(*batch)
    assert checksum(trainer.ref_model) == before and checksum(trainer.model) != started
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in trainer.ref_model.parameters())
    mine = {id(parameter) for parameter in trainer.ref_model.parameters()}
    assert not mine & {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
