"""PPO's mathematics against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from rlhf.ppo.advantages import gae
from rlhf.ppo.kl import adapted_kl_coef, full_kl, kl_per_token
from rlhf.ppo.losses import policy_loss, token_stats, value_loss
from rlhf.ppo.masked import masked_mean, masked_moments, masked_rescale, masked_whiten
from rlhf.ppo.rewards import RunningMoments, kl_shaped_rewards, penalised_scores, transform_scores

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def close(got: Tensor, expected: object) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=torch.float64), **EXACT)


# --- scores and rewards -----------------------------------------------------------------------------------------------------------


def test_14_a_missing_eos_costs_the_penalty_or_gets_a_fixed_score() -> None:
    scores, lengths, ended = tensor([1.0, 2.0]), tensor([3, 5]), tensor([True, False])
    close(penalised_scores(scores, lengths, ended, missing_eos_penalty=1.5), [1.0, 0.5])
    close(penalised_scores(scores, lengths, ended, missing_eos_score=-4.0), [1.0, -4.0])
    close(penalised_scores(scores, lengths, ended, length_penalty=0.1), [0.7, 1.5])


def test_15_an_empty_answer_leaves_its_score_nowhere() -> None:
    mask = tensor([[False, False], [True, True]])
    rewards, _ = kl_shaped_rewards(tensor([5.0, 3.0]), torch.zeros(2, 2), mask, 0.1)
    close(rewards, [[0.0, 0.0], [0.0, 3.0]])


def test_16_the_reward_is_minus_kl_and_the_score_once_at_the_last_token() -> None:
    mask = tensor([[True, True, False], [True, True, True]])
    kl = tensor([[0.5, -1.0, 9.0], [0.0, 2.0, 1.0]])
    rewards, non_score = kl_shaped_rewards(tensor([10.0, -3.0]), kl, mask, 0.2)
    close(non_score, [[-0.1, 0.2, 0.0], [0.0, -0.4, -0.2]])
    close(rewards, [[-0.1, 10.2, 0.0], [0.0, -0.4, -3.2]])


def test_16_a_masked_last_token_moves_the_score_to_the_last_that_counts() -> None:
    rewards, _ = kl_shaped_rewards(tensor([1.0]), torch.zeros(1, 3), tensor([[True, False, False]]), 0.2)
    close(rewards, [[1.0, 0.0, 0.0]])


def test_17_kl_estimators_by_hand() -> None:
    logprobs, ref = tensor([-1.0, -2.0]), tensor([-1.5, -1.0])  # d = 0.5, -1
    close(kl_per_token(logprobs, ref, "kl"), [0.5, -1.0])
    close(kl_per_token(logprobs, ref, "abs"), [0.5, 1.0])
    close(kl_per_token(logprobs, ref, "mse"), [0.125, 0.5])
    close(kl_per_token(logprobs, ref, "k3"), [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1])
    with pytest.raises(ValueError, match="full"):
        kl_per_token(logprobs, ref, "full")


def test_17_full_kl_sums_over_the_vocabulary() -> None:
    policy, ref = tensor([0.75, 0.25]), tensor([0.5, 0.5])
    close(full_kl(policy.log(), ref.log()), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    never = tensor([0.0])  # a token that cannot come
    close(full_kl(torch.cat([policy, never]).log(), torch.cat([ref, never]).log()), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_17_k2_k3_and_full_are_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(500, 7, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    for penalty in ("mse", "k3", "abs"):
        assert bool((kl_per_token(first[:, 0], second[:, 0], penalty) >= 0).all())
    assert bool((full_kl(first, second) >= -1e-6).all())


def test_18_the_adaptive_coefficient_inside_and_outside_its_clip() -> None:
    # error = 6.6 / 6 - 1 = 0.1, inside the clip: 0.2 * (1 + 0.1 * 64 / 10000)
    assert adapted_kl_coef(0.2, 6.6, 6.0, 64, 10000) == pytest.approx(0.200128, rel=1e-12)
    assert adapted_kl_coef(0.2, 5.4, 6.0, 64, 10000) == pytest.approx(0.199872, rel=1e-12)
    assert adapted_kl_coef(0.2, 60.0, 6.0, 64, 10000) == pytest.approx(0.2 * (1 + 0.2 * 0.0064), rel=1e-12)
    assert adapted_kl_coef(0.2, -1.0, 6.0, 64, 10000) == pytest.approx(0.2 * (1 - 0.2 * 0.0064), rel=1e-12)


def test_19_running_moments_join_batches_as_if_they_were_one() -> None:
    moments = RunningMoments()
    moments.update(tensor([1.0, 3.0]))
    assert (moments.mean, moments.std) == pytest.approx((2.0, math.sqrt(2.0)), rel=1e-9)
    moments.update(tensor([5.0, 7.0, 9.0]))
    assert (moments.mean, moments.std) == pytest.approx((5.0, math.sqrt(10.0)), rel=1e-9)


def test_19_clipping_scaling_and_centring_are_separate() -> None:
    scores = tensor([1.0, 3.0])

    def transformed(scale: bool, centre: bool, clip: float | None) -> Tensor:
        return transform_scores(scores, RunningMoments(), scale=scale, centre=centre, clip=clip)

    root = math.sqrt(2.0)
    close(transformed(False, False, None), [1.0, 3.0])
    close(transformed(False, False, 2.0), [1.0, 2.0])
    close(transformed(True, False, None), [1 / root, 3 / root])
    close(transformed(True, True, None), [-1 / root, 1 / root])
    close(transformed(True, True, 0.5), [-0.5, 0.5])


# --- advantages -------------------------------------------------------------------------------------------------------------------


def test_20_gae_by_hand_with_nothing_after_the_end() -> None:
    mask = tensor([[True, True, False]])
    rewards, values = tensor([[1.0, 2.0, 0.0]]), tensor([[0.5, 1.0, 99.0]])  # 99 stands in padding
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    second = 2.0 - 1.0
    first = (1.0 + 0.9 * 1.0 - 0.5) + 0.9 * 0.5 * second
    close(advantages, [[first, second, 0.0]])
    close(returns[:, :2], [[first + 0.5, second + 1.0]])


def test_20_gae_with_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    advantages, returns = gae(rewards, values, torch.ones(3, 6, dtype=torch.bool), gamma=1.0, lam=1.0)
    close(returns, rewards.flip(1).cumsum(1).flip(1))
    close(advantages, rewards.flip(1).cumsum(1).flip(1) - values)


def test_21_returns_are_advantages_before_whitening_plus_values() -> None:
    rewards, values = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 4, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    close(returns - values, advantages)
    assert float(advantages.mean().abs()) > 1e-3  # not whitened


def test_22_whitening_counts_the_mask_alone_with_unbiased_variance() -> None:
    values, mask = tensor([[1.0, 2.0, 77.0], [6.0, 88.0, 99.0]]), tensor([[True, True, False], [True, False, False]])
    mean, var = masked_moments(values, mask)
    assert (float(mean), float(var)) == pytest.approx((3.0, 7.0))  # (4 + 1 + 9) / 2
    whitened = masked_whiten(values, mask)
    close(whitened, [[-2 / math.sqrt(7), -1 / math.sqrt(7), 0.0], [3 / math.sqrt(7), 0.0, 0.0]])
    close(masked_rescale(values, mask)[0, :2], [3 - 2 / math.sqrt(7), 3 - 1 / math.sqrt(7)])


def test_22_a_single_token_whitens_to_zero() -> None:
    close(masked_whiten(tensor([[5.0, 1.0]]), tensor([[True, False]])), [[0.0, 0.0]])


def test_22_padding_that_is_not_finite_never_reaches_a_statistic() -> None:
    values, mask = tensor([[1.0, math.nan], [3.0, math.inf]]), tensor([[True, False], [True, False]])
    assert float(masked_mean(values, mask)) == 2.0
    assert bool(torch.isfinite(masked_whiten(values, mask)).all())


def test_23_a_truncated_answer_ends_with_value_zero() -> None:
    advantages, _ = gae(tensor([[0.0, 0.0]]), tensor([[0.0, 4.0]]), torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    close(advantages, [[0.0, -4.0]])  # V after the last token is 0, not bootstrapped from 4


# --- losses -----------------------------------------------------------------------------------------------------------------------

RATIOS = tensor([1.5, 0.5, 1.5, 0.5])
ADVANTAGES = tensor([1.0, 1.0, -1.0, -1.0])
ALL = torch.ones(4, dtype=torch.bool)


def test_24_the_clip_takes_the_worse_of_both() -> None:
    loss, clipped = policy_loss(RATIOS.log(), torch.zeros(4), ADVANTAGES, ALL, 0.2)
    # -min(1.5, 1.2), -min(.5, .8), max(1.5, 1.2), max(.5, .8)
    close(loss, (-1.2 - 0.5 + 1.5 + 0.8) / 4)
    assert float(clipped) == 0.5


def test_24_dual_clip_bounds_the_loss_only_where_the_advantage_is_negative() -> None:
    ratios = tensor([9.0, 9.0])
    loss, _ = policy_loss(ratios.log(), torch.zeros(2), tensor([-1.0, 1.0]), ALL[:2], 0.2, dual_clip=3.0)
    close(loss, (3.0 - 1.2) / 2)


def test_24_masked_tokens_count_nothing() -> None:
    mask = tensor([True, False, False, True])
    loss, _ = policy_loss(RATIOS.log(), torch.zeros(4), ADVANTAGES, mask, 0.2)
    close(loss, (-1.2 + 0.8) / 2)


def test_25_the_value_loss_takes_the_larger_error_of_both() -> None:
    values, old, returns = tensor([1.0, 3.0]), tensor([0.0, 3.0]), tensor([2.0, 1.0])
    # first: clipped to 0.2, (0.2 - 2)^2 = 3.24 > 1; second: unmoved, 4
    loss, clipped = value_loss(values, old, returns, ALL[:2], 0.2)
    close(loss, 0.5 * (3.24 + 4.0) / 2)
    assert float(clipped) == 0.5


def test_28_halves_of_a_batch_add_up_to_its_loss() -> None:
    logprobs, old, advantages = torch.randn(3, 10)
    mask = torch.arange(10) != 4
    whole, _ = policy_loss(logprobs, old, advantages, mask, 0.2)
    parts = [policy_loss(logprobs[half], old[half], advantages[half], mask[half], 0.2, count=9)[0] for half in (slice(3), slice(3, 10))]
    close(sum(parts, torch.tensor(0.0)), float(whole))


def test_31_entropy_of_a_uniform_distribution_and_never_negative() -> None:
    stats = token_stats(torch.zeros(1, 8), tensor([3]), entropy=True)
    assert stats.entropy is not None
    close(stats.entropy, [math.log(8)])
    sharp = token_stats(torch.randn(100, 8) * 50, torch.zeros(100, dtype=torch.long), entropy=True).entropy
    assert sharp is not None and float(sharp.min()) >= 0


def test_10_temperature_divides_the_logits() -> None:
    logits, tokens = tensor([[0.0, 2.0]]), tensor([1])
    close(token_stats(logits, tokens, 2.0).logprobs, [1 - math.log(1 + math.e)])
    close(token_stats(logits, tokens, 2.0, entropy=True).logprobs, [1 - math.log(1 + math.e)])


def test_scores_that_are_all_alike_are_not_blown_up_by_scaling() -> None:
    for scores in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0 + 1e-7, 1.0]), torch.tensor([3.0])):  # no spread, or rounding alone
        assert torch.equal(transform_scores(scores, RunningMoments(), scale=True, centre=False, clip=None), scores)
    apart = torch.tensor([1.0, 1.0, 1.0 + 1e-4, 1.0])
    scaled = transform_scores(apart, RunningMoments(), scale=True, centre=True, clip=None)
    torch.testing.assert_close(scaled, torch.tensor([-0.5, -0.5, 1.5, -0.5]), rtol=1e-2, atol=0)
