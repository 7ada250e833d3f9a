"""Details 16 to 19 of docs/ppo_checklist.md: from scores and log-probabilities to rewards."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import tensor

from common.launch.runtime import Runtime
from rlhf.ppo import NonFiniteError, PPOTrainer
from rlhf.ppo.kl import KLPenalty, adapted_kl_coef, full_kl, kl_per_token
from rlhf.ppo.rewards import RunningMoments, kl_shaped_rewards, transform_scores

EXACT = {"rtol": 1e-6, "atol": 1e-7}
Build = Callable[..., PPOTrainer]
InRanks = Callable[[int, Callable[[Runtime], Any]], list[Any]]

# --- 16 ---------------------------------------------------------------------------------------------------------------------------


def test_16_rewards_by_hand() -> None:
    """Three tokens, one token, and three of which the second is masked; what stands outside the mask counts nothing."""
    kl = tensor([[1.0, -2.0, 4.0], [3.0, 50.0, 50.0], [1.0, 50.0, 2.0]])
    mask = tensor([[True, True, True], [True, False, False], [True, False, True]])
    rewards, non_score = kl_shaped_rewards(tensor([7.0, -1.0, 0.5]), kl, mask, 0.25)
    torch.testing.assert_close(non_score, tensor([[-0.25, 0.5, -1.0], [-0.75, 0, 0], [-0.25, 0, -0.5]]), **EXACT)
    torch.testing.assert_close(rewards, tensor([[-0.25, 0.5, 6.0], [-1.75, 0, 0], [-0.25, 0, 0.0]]), **EXACT)


def test_16_a_step_rewards_minus_kl_and_the_score_at_the_last_token(build: Build, batch: Any, make_model: Any) -> None:
    """At EOS where there is one; the second answer has none, so at its last token."""
    trainer = build(reference=make_model("gpt_neo", 4), init_kl_coef=0.3)
    trainer.step(*batch)
    record = trainer.record
    assert record is not None
    difference = torch.where(record.mask, record.logprobs - record.ref_logprobs, 0.0)
    assert float(difference.abs().max()) > 0.1
    torch.testing.assert_close(record.non_score_rewards, -0.3 * difference, **EXACT)
    for row, response in enumerate(batch.responses):
        paid = torch.zeros(record.rewards.shape[1])
        paid[len(response) - 1] = batch.scores[row]
        torch.testing.assert_close(record.rewards[row] + 0.3 * difference[row], paid, rtol=1e-6, atol=1e-6)


# --- 17 ---------------------------------------------------------------------------------------------------------------------------

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("penalty", "by_hand"),
    [
        ("kl", [LN2, -LN2, 0.0]),
        ("abs", [LN2, LN2, 0.0]),
        ("mse", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [0.5 - 1 + LN2, 2.0 - 1 - LN2, 0.0]),
    ],
)
def test_17_estimators_of_a_token_twice_and_half_as_likely(penalty: KLPenalty, by_hand: list[float]) -> None:
    logprobs, ref_logprobs = tensor([0.5, 0.125, 0.3]).log(), tensor([0.25, 0.25, 0.3]).log()
    torch.testing.assert_close(kl_per_token(logprobs, ref_logprobs, penalty), tensor(by_hand), rtol=1e-5, atol=1e-7)


def test_17_full_kl_is_of_the_policy_from_the_reference_and_k1_and_k3_are_unbiased() -> None:
    policy, reference = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.5, 0.25])
    forward = 0.5 * LN2 - 0.25 * LN2
    assert float(full_kl(policy.log(), reference.log())) == pytest.approx(forward, rel=1e-6)
    lopsided = tensor([0.5, 0.375, 0.125])
    there, back = full_kl(lopsided.log(), reference.log()), full_kl(reference.log(), lopsided.log())
    assert float(there) == pytest.approx(0.5 * LN2 + 0.375 * math.log(0.75) - 0.125 * LN2, rel=1e-5)
    assert abs(float(there) - float(back)) > 1e-3
    for penalty in ("kl", "k3"):
        each = kl_per_token(lopsided.log(), reference.log(), penalty)  # type: ignore[arg-type]
        assert float((lopsided * each).sum()) == pytest.approx(float(there), rel=1e-5)


def test_17_k2_k3_and_full_are_never_negative() -> None:
    first, second = (torch.randn(2000, 5, generator=torch.Generator().manual_seed(seed)).mul(4).log_softmax(-1) for seed in (0, 1))
    for penalty in ("mse", "k3", "abs"):
        assert float(kl_per_token(first[:, 0], second[:, 0], penalty).min()) >= 0.0  # type: ignore[arg-type]
    assert float(full_kl(first, second).min()) >= 0.0
    assert float(kl_per_token(first[:, 0], second[:, 0], "kl").min()) < 0.0
    near = torch.linspace(-1e-2, 1e-2, 2000)  # where exp(-d) - 1 + d, computed as it is written, cancels
    assert float(kl_per_token(near, torch.zeros(2000), "k3").min()) >= 0.0


def test_17_full_kl_of_a_step_is_over_the_vocabulary(build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(reference=make_model("gpt_neo", 4), kl_penalty="full")
    reference = make_model("gpt_neo", 4)
    ids = torch.tensor([batch.queries[0] + batch.responses[0]])
    with torch.no_grad():
        policy, other = (model(ids).logits[0, 2:-1].log_softmax(-1) for model in (trainer.model.pretrained_model, reference))
    trainer.step(*batch)
    assert trainer.record is not None
    by_hand = (policy.exp() * (policy - other)).sum(-1)
    torch.testing.assert_close(trainer.record.kl[0, :3], by_hand, rtol=1e-5, atol=1e-5)


# --- 18 ---------------------------------------------------------------------------------------------------------------------------


def test_18_the_coefficient_inside_its_clip_and_at_it() -> None:
    # 3.15 / 3 - 1 = 0.05; 0.05 * 256 / 1000 = 0.0128
    assert adapted_kl_coef(0.1, 3.15, 3.0, 256, 1000) == pytest.approx(0.1 * 1.0128, rel=1e-12)
    assert adapted_kl_coef(0.1, 2.70, 3.0, 256, 1000) == pytest.approx(0.1 * (1 - 0.0256), rel=1e-12)  # -0.1
    assert adapted_kl_coef(0.1, 3.00, 3.0, 256, 1000) == 0.1
    assert adapted_kl_coef(0.1, 3.59, 3.0, 256, 1000) < adapted_kl_coef(0.1, 3.60, 3.0, 256, 1000)
    for kl in (3.60, 3.61, 1e9):
        assert adapted_kl_coef(0.1, kl, 3.0, 256, 1000) == pytest.approx(0.1 * 1.0512, rel=1e-12)
    for kl in (2.40, 0.0, -5.0):
        assert adapted_kl_coef(0.1, kl, 3.0, 256, 1000) == pytest.approx(0.1 * 0.9488, rel=1e-12)


@pytest.mark.parametrize("penalty", ["kl", "mse", "full"])
def test_18_the_controller_sees_answers_of_all_processes(
    penalty: str, build: Build, batch: Any, make_model: Any, in_ranks: InRanks
) -> None:
    """Two processes with two answers each; their KL per answer is a tenth above the target, so e = 0.1 and n = 4."""

    def work(runtime: Runtime, target: float) -> PPOTrainer:
        share = slice(2 * runtime.rank, 2 * runtime.rank + 2) if runtime.world_size > 1 else slice(None)
        count = 4 // runtime.world_size
        settings = {"batch_size": count, "mini_batch_size": count, "init_kl_coef": 0.2, "target": target, "horizon": 100.0}
        trainer = build(make_model("gpt_neo", 4), reference=make_model(), kl_penalty=penalty, **settings)
        trainer.runtime = runtime
        trainer.step(*(part[share] for part in batch))
        return trainer

    alone = work(Runtime.local("cpu"), 1.0)
    assert alone.record is not None
    kl = float(alone.record.kl[alone.record.mask].sum()) / 4  # summed over tokens, mean over answers
    halves = [float(alone.record.kl[rows].sum()) / 2 for rows in (slice(2), slice(2, 4))]
    assert kl > 0.1 and abs(halves[0] - halves[1]) > 0.05 * kl
    for trainer in [work(Runtime.local("cpu"), kl / 1.1), *in_ranks(2, lambda runtime: work(runtime, kl / 1.1))]:
        assert trainer.kl_coef == pytest.approx(0.2 * (1 + 0.1 * 4 / 100), rel=1e-6)


def test_18_a_fixed_coefficient_stays(build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(reference=make_model("gpt_neo", 4), adap_kl_ctrl=False, horizon=1.0)
    assert trainer.step(*batch)["objective/kl_coef"] == trainer.kl_coef == 0.2


def resumed(trainer: PPOTrainer, build: Build, **settings: Any) -> PPOTrainer:
    """Another trainer that took the state back from bytes, read without pickle's powers."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    other = build(**settings)
    other.model.load_state_dict(trainer.model.state_dict())
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_18_the_coefficient_survives_a_resume(build: Build, batch: Any, make_model: Any) -> None:
    settings = {"reference": make_model("gpt_neo", 4), "horizon": 40.0}
    trainer = build(**settings)
    trainer.step(*batch)
    assert trainer.kl_coef != 0.2
    other = resumed(trainer, build, **settings)
    assert other.step(*batch)["objective/kl_coef"] == trainer.kl_coef
    trainer.step(*batch)
    assert other.kl_coef == trainer.kl_coef


# --- 19 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "centre", "clip", "by_hand"),
    [
        (False, False, None, [5.0, 7.0, 9.0]),
        (False, False, 6.0, [5.0, 6.0, 6.0]),
        (True, False, None, [5.0 / 10**0.5, 7.0 / 10**0.5, 9.0 / 10**0.5]),
        (True, True, None, [0.0, 2.0 / 10**0.5, 4.0 / 10**0.5]),
        (True, True, 1.0, [0.0, 2.0 / 10**0.5, 1.0]),
        (True, False, 2.0, [5.0 / 10**0.5, 2.0, 2.0]),
    ],
)
def test_19_clipping_scaling_and_centring_of_a_second_batch(scale: bool, centre: bool, clip: float | None, by_hand: list[float]) -> None:
    """1 and 3 came before: of all five the mean is 5 and the variance (16 + 4 + 0 + 4 + 16) / 4 = 10."""
    moments = RunningMoments()
    transform_scores(tensor([1.0, 3.0]), moments, scale=scale, centre=centre, clip=clip)
    result = transform_scores(tensor([5.0, 7.0, 9.0]), moments, scale=scale, centre=centre, clip=clip)
    torch.testing.assert_close(result, tensor(by_hand), rtol=1e-6, atol=1e-6)


def test_19_the_running_figures_are_of_all_processes(build: Build, batch: Any, make_model: Any, in_ranks: InRanks) -> None:
    scores = [[1.0, 3.0, 5.0, 7.0], [9.0, 2.0, 4.0, 6.5]]

    def work(runtime: Runtime) -> tuple[float, float]:
        trainer = build(make_model(), batch_size=2, mini_batch_size=2, use_score_scaling=True)
        trainer.runtime = runtime
        share = slice(2 * runtime.rank, 2 * runtime.rank + 2)
        for of_all in scores:
            trainer.step(batch.queries[share], batch.responses[share], of_all[share])
        return trainer.moments.mean, trainer.moments.std

    together = torch.tensor(scores, dtype=torch.float64)
    for mean, std in in_ranks(2, work):
        assert (mean, std) == pytest.approx((float(together.mean()), float(together.std())), rel=1e-12)


def test_19_the_running_figures_survive_a_resume(build: Build, batch: Any) -> None:
    settings = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 3.0}
    trainer = build(**settings)
    trainer.step(*batch)
    trainers = [resumed(trainer, build, **settings), build(**settings)]
    trainers[1].model.load_state_dict(trainer.model.state_dict())
    for each in (trainer, *trainers):
        each.step(batch.queries, batch.responses, [9.0, -2.0, 4.0, 5.0])
    straight, back, forgetful = (each.record.scores for each in (trainer, *trainers))
    assert torch.equal(back, straight) and not torch.allclose(forgetful, straight, atol=0.1)
    seen = torch.tensor([*batch.scores, 9.0, -2.0, 4.0, 5.0], dtype=torch.float64)
    by_hand = (seen[4:] - seen.mean()) / seen.std()
    torch.testing.assert_close(straight.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_a_refused_step_leaves_the_running_figures_alone(build: Build, batch: Any) -> None:
    trainer = build(use_score_scaling=True)
    trainer.step(*batch)
    before = vars(trainer.moments).copy()
    trainer.model.v_head.summary.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        trainer.step(*batch)
    assert vars(trainer.moments) == before and before["count"] == pytest.approx(4)
