"""Details 20 to 23 of docs/ppo_checklist.md: advantages, returns and whitening."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from common.launch.runtime import Runtime
from rlhf.config import PPOParams
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.advantages import gae
from rlhf.ppo.masked import masked_moments, masked_rescale, masked_whiten

EXACT = {"rtol": 1e-6, "atol": 1e-6}
Build = Callable[..., PPOTrainer]
InRanks = Callable[[int, Callable[[Runtime], Any]], list[Any]]

# --- 20 ---------------------------------------------------------------------------------------------------------------------------


def test_20_gae_of_three_tokens_by_hand() -> None:
    """delta = r + V' / 2 - V, A = delta + A' / 4; 64 stands where no token is."""
    rewards, values = tensor([[1.0, 0.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]]), tensor([[2.0, 4.0, 1.0, 64.0], [1.0, 64.0, 64.0, 64.0]])
    mask = tensor([[True, True, True, False], [True, False, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas: 1 + 2 - 2 = 1, 0 + 0.5 - 4 = -3.5, 2 + 0 - 1 = 1
    by_hand = tensor([[1 + 0.25 * -3.25, -3.5 + 0.25, 1.0, 0.0], [3.0, 0, 0, 0]])
    torch.testing.assert_close(advantages, by_hand, **EXACT)
    torch.testing.assert_close(returns, tensor([[2.1875, 0.75, 2.0, 0.0], [4.0, 0, 0, 0]]), **EXACT)


def test_20_lambda_zero_is_one_step_and_lambda_one_the_whole_return() -> None:
    rewards, values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    every = torch.ones(3, 5, dtype=torch.bool)
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(gae(rewards, values, every, 0.9, 0.0)[0], rewards + 0.9 * after - values, **EXACT)
    discounted = [sum(0.9 ** (later - t) * rewards[:, later] for later in range(t, 5)) for t in range(5)]
    torch.testing.assert_close(gae(rewards, values, every, 0.9, 1.0)[1], torch.stack(discounted, 1), **EXACT)


def test_20_gamma_1_and_lambda_095_are_the_defaults(build: Build, batch: Any) -> None:
    for settings in (PPOConfig(), PPOParams(model_name="x")):
        assert (settings.gamma, settings.lam) == (1.0, 0.95)
    trainer = build()
    trainer.step(*batch)
    record = trainer.record
    assert record is not None
    before_last, last = record.rewards[2, :2]  # an answer of two tokens
    first_value, second_value = record.values[2, :2]
    advantage = before_last + second_value - first_value + 0.95 * (last - second_value)
    assert float(record.returns[2, 0]) == pytest.approx(float(advantage + first_value), abs=1e-6)


# --- 21 ---------------------------------------------------------------------------------------------------------------------------


def test_21_returns_are_old_values_plus_advantages_before_whitening(build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(reference=make_model("gpt_neo", 4))
    trainer.step(*batch)
    record = trainer.record
    assert record is not None
    raw, _ = gae(record.rewards, record.values, record.mask, 1.0, 0.95)
    torch.testing.assert_close(record.returns[record.mask], (raw + record.values)[record.mask], **EXACT)
    # the whitened advantages are another tensor: 0 on average, which the raw ones are not
    assert float(record.advantages[record.mask].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(record.advantages[record.mask].std()) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(raw[record.mask].mean())) > 0.01
    torch.testing.assert_close(record.advantages, masked_whiten(raw, record.mask), rtol=1e-5, atol=1e-6)


# --- 22 ---------------------------------------------------------------------------------------------------------------------------


def test_22_whitening_by_hand() -> None:
    """2, 4, 9 count: mean 5, variance (9 + 1 + 16) / 2 = 13."""
    values, mask = tensor([[2.0, math.nan, 4.0], [9.0, 1e9, -1e9]]), tensor([[True, False, True], [True, False, False]])
    mean, var = masked_moments(values, mask)
    assert (float(mean), float(var)) == (5.0, 13.0)
    root = math.sqrt(13.0)
    torch.testing.assert_close(masked_whiten(values, mask), tensor([[-3 / root, 0, -1 / root], [4 / root, 0, 0]]), **EXACT)
    rescaled = tensor([[5 - 3 / root, 0, 5 - 1 / root], [5 + 4 / root, 0, 0]])
    torch.testing.assert_close(masked_rescale(values, mask), rescaled, **EXACT)


def test_22_the_variance_gets_1e_8_before_the_root() -> None:
    """Two values 2e-4 apart: variance 2e-8, so +-1e-4 / sqrt(3e-8)."""
    whitened = masked_whiten(tensor([[0.0, 2e-4]]), tensor([[True, True]]))
    torch.testing.assert_close(whitened, tensor([[-1.0, 1.0]]) / math.sqrt(3), rtol=1e-5, atol=0)


def test_22_a_single_token_becomes_zero_and_no_token_nothing() -> None:
    one = tensor([[False, True]])
    assert masked_whiten(tensor([[7.0, 3.0]]), one).tolist() == [[0.0, 0.0]]
    assert masked_rescale(tensor([[7.0, 3.0]]), one).tolist() == [[0.0, 3.0]]
    assert masked_whiten(tensor([[7.0, 3.0]]), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_22_rewards_keep_their_mean_when_they_are_whitened(build: Build, batch: Any, make_model: Any) -> None:
    """With gamma = lambda = 1 and values of 0 returns are sums of rewards, so differences of returns are the whitened rewards."""
    trainer = build(reference=make_model("gpt_neo", 4), whiten_rewards=True, lam=1.0)
    torch.nn.init.zeros_(trainer.model.v_head.summary.weight)
    trainer.step(*batch)
    record = trainer.record
    assert record is not None
    later = torch.nn.functional.pad(record.returns[:, 1:], (0, 1))
    shaped, given = (record.returns - later)[record.mask], record.rewards[record.mask]
    assert float(shaped.mean()) == pytest.approx(float(given.mean()), abs=1e-5)
    assert float(shaped.std()) == pytest.approx(1.0, abs=1e-4) and abs(float(given.std()) - 1.0) > 0.05


def test_22_statistics_span_all_processes_and_all_accumulated_parts(build: Build, batch: Any, make_model: Any, in_ranks: InRanks) -> None:
    def advantages(runtime: Runtime, **settings: Any) -> Tensor:
        share = slice(2 * runtime.rank, 2 * runtime.rank + 2) if runtime.world_size > 1 else slice(None)
        trainer = build(make_model(), reference=make_model("gpt_neo", 4), whiten_rewards=True, **settings)
        trainer.runtime = runtime
        trainer.step(*(part[share] for part in batch))
        assert trainer.record is not None
        return trainer.record.advantages

    whole = advantages(Runtime.local("cpu"))
    accumulated = advantages(Runtime.local("cpu"), mini_batch_size=2, gradient_accumulation_steps=2)
    assert torch.equal(accumulated, whole)
    parts = in_ranks(2, lambda runtime: advantages(runtime, batch_size=2, mini_batch_size=2))
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


# --- 23 ---------------------------------------------------------------------------------------------------------------------------


def test_23_a_truncated_answer_ends_with_value_zero(build: Build, batch: Any) -> None:
    """The second answer has no EOS; what its last token returns is its own reward, with nothing of a value after it."""
    trainer = build(lam=1.0, init_kl_coef=0.0)
    trainer.step(*batch)
    record = trainer.record
    assert record is not None and batch.responses[1][-1] != 1
    assert float(record.values[1].abs().min()) > 1e-3
    torch.testing.assert_close(record.returns[1], torch.full((5,), batch.scores[1]), **EXACT)
    assert "V after the end is 0, also for an answer that was cut off" in " ".join((gae.__doc__ or "").split())
