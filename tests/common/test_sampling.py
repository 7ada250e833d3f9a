"""Counter-based sampling: fixed vectors, good statistics, and the filters of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from common import sampling
from common.sampling import (
    Stream,
    _mix64,
    _mix64_tensor,
    _signed,
    apply_repetition_penalty,
    filter_logits,
    gumbel_noise,
    hash_bits,
    stream_keys,
)

MASK32 = (1 << 32) - 1


def reference_bits(key: int, token: int) -> int:
    """The same hash in Python's unbounded integers."""
    x = (key + token) & MASK32
    x ^= x >> 17
    x = (x * 0xED5AD4BB) & MASK32
    x ^= (key >> 32) & MASK32
    x ^= x >> 11
    x = (x * 0xAC4C1B51) & MASK32
    x ^= x >> 15
    x = (x * 0x31848BAB) & MASK32
    return x ^ (x >> 14)


def test_splitmix_finalizer_gives_the_published_sequence() -> None:
    """splitmix64 seeded with 0 begins with these numbers in every implementation."""
    golden = 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix64(golden * n) for n in (1, 2, 3)] == published
    tensor = torch.tensor([_signed(golden * n, 64) for n in (1, 2, 3)])
    assert [value & ((1 << 64) - 1) for value in _mix64_tensor(tensor).tolist()] == published


def test_hash_equals_unbounded_integer_arithmetic() -> None:
    keys = stream_keys(3, 5, torch.tensor([0, 1, 10**6]), 7)
    bits = hash_bits(keys, 600)
    for row, key in enumerate(keys.tolist()):
        for token in (0, 1, 2, 255, 599):
            assert bits[row, token].item() & MASK32 == reference_bits(key & ((1 << 64) - 1), token)


def test_fixed_vectors() -> None:
    """These must never change: a change means that no earlier run can be repeated."""
    rows = torch.tensor([0, 1, 123456789])
    assert stream_keys(42, 7, rows, 3).tolist() == VECTOR_KEYS
    assert (hash_bits(stream_keys(42, 7, rows, 3), 3).long() & MASK32).tolist() == VECTOR_BITS
    torch.testing.assert_close(gumbel_noise(42, 7, rows, 3, 3), torch.tensor(VECTOR_NOISE), rtol=1e-6, atol=1e-6)


def test_purposes_have_keys_of_their_own() -> None:
    rows = torch.arange(200)
    keys = torch.cat([stream_keys(seed, step, rows, 0, stream) for seed in range(3) for step in range(3) for stream in Stream])
    assert len(keys.unique()) == 3 * 3 * len(Stream) * 200
    assert torch.equal(stream_keys(42, 7, rows, 3, Stream.TOKENS), stream_keys(42, 7, rows, 3))


VECTOR_KEYS: list[int] = [4123032109804094045, 575175475526402283, 6760198863330076416]
VECTOR_BITS: list[list[int]] = [
    [3101143470, 1229537664, 1539254420],
    [1275763406, 62690142, 3055543735],
    [2347595362, 2562682728, 205662467],
]
VECTOR_NOISE: list[list[float]] = [[0.5325, 0.1626207, -0.2323016], [0.1036026, 3.5190709, 0.5984729], [2.324667, 1.5377889, 2.2959027]]


def test_a_row_has_the_same_noise_in_any_batch_and_order() -> None:
    rows = torch.tensor([5, 0, 9, 2])
    positions = torch.tensor([1, 0, 4, 4])
    together = gumbel_noise(1, 2, rows, positions, 50)
    for i in range(4):
        alone = gumbel_noise(1, 2, rows[i : i + 1], int(positions[i]), 50)
        assert torch.equal(alone[0], together[i])
    # and a larger vocabulary only adds tokens
    assert torch.equal(gumbel_noise(1, 2, rows, positions, 70)[:, :50], together)


def test_each_part_of_the_counter_changes_the_noise() -> None:
    rows = torch.arange(4)
    base = gumbel_noise(1, 2, rows, 3, 100)
    for other in (
        gumbel_noise(2, 2, rows, 3, 100),
        gumbel_noise(1, 3, rows, 3, 100),
        gumbel_noise(1, 2, rows + 4, 3, 100),
        gumbel_noise(1, 2, rows, 4, 100),
    ):
        assert (other != base).float().mean() > 0.999
    swapped = gumbel_noise(2, 1, rows, 3, 100)  # (seed, step) and (row, position) are no sums
    assert (swapped != base).float().mean() > 0.999
    assert (gumbel_noise(1, 2, torch.tensor([3]), 5, 100) != gumbel_noise(1, 2, torch.tensor([5]), 3, 100)).float().mean() > 0.999


def test_every_bit_is_fair_and_independent_of_its_neighbours() -> None:
    """2**21 words from consecutive rows, positions, tokens: each bit and each pair of neighbouring words within 5 standard errors."""
    keys = torch.cat([stream_keys(0, 0, torch.arange(64), position) for position in range(64)])
    words = hash_bits(keys, 512)
    bits = torch.stack([(words >> n) & 1 for n in range(32)]).float()  # (32, 4096, 512)
    bound = 5 * 0.5 / math.sqrt(words.numel())
    assert (bits.mean(dim=(1, 2)) - 0.5).abs().max() < bound
    centred = bits - 0.5
    for shifted in (centred.roll(1, 2), centred.roll(1, 1), centred.roll(64, 1), centred.roll(1, 0)):  # next token, row, position, bit
        assert (centred * shifted).mean(dim=(1, 2)).abs().max() < 5 * 0.25 / math.sqrt(words.numel())


def test_noise_is_uniform_before_the_logarithms() -> None:
    noise = gumbel_noise(11, 0, torch.arange(512), 0, 2048)
    uniform = torch.exp(-torch.exp(-noise.double()))
    counts = torch.histc(uniform.flatten(), bins=256, min=0, max=1)
    expected = uniform.numel() / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * 1.2825 / math.sqrt(noise.numel()))
    assert noise.isfinite().all()


def test_noise_of_the_outermost_bits_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    outermost = torch.tensor([[0, (1 << 31) - 1]], dtype=torch.int32)
    monkeypatch.setattr(sampling, "hash_bits", lambda keys, vocab: outermost)
    highest, lowest = gumbel_noise(0, 0, torch.tensor([0]), 0, 2)[0].tolist()
    assert highest == pytest.approx(-math.log(2**-32), abs=1e-5)  # v = 2**-32: -log(-log(1 - v)) ~ -log(v)
    assert lowest == pytest.approx(-math.log(24 * math.log(2)), abs=1e-5)  # v = 1 - 2**-24


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
    n = 200_000
    tokens = (filter_logits(logits[None], temperature) + gumbel_noise(3, 0, torch.arange(n), 1, 5)).argmax(-1)
    probs = (logits / temperature).softmax(-1)
    shares = torch.bincount(tokens, minlength=5) / n
    assert ((shares - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt()).all()


def test_rare_tokens_are_sampled_as_often_as_they_should() -> None:
    """The upper tail is fine enough for a probability of 1e-5."""
    noise = gumbel_noise(5, 0, torch.arange(2000), 0, 4096)
    n = noise.numel()
    for p in (1e-3, 1e-5):
        # a token of probability p beats the rest where noise - log(1/p) > logistic: P(G > t) = 1 - exp(-exp(-t)) ~ exp(-t)
        count = (noise > -math.log(p)).sum().item()
        expected = n * (1 - math.exp(-p))
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_filters_equal_those_of_transformers() -> None:
    logits = torch.randn(16, 97, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(filter_logits(logits, top_k=7), TopKLogitsWarper(7)(None, logits))
    assert torch.equal(filter_logits(logits, top_p=0.8), TopPLogitsWarper(0.8)(None, logits))
    both = TopPLogitsWarper(0.6)(None, TopKLogitsWarper(9)(None, logits / 0.7))
    assert torch.equal(filter_logits(logits, 0.7, 9, 0.6), both)
    assert torch.equal(filter_logits(logits, 1.0, 0, 1.0), logits)


def test_top_p_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = filter_logits(probs.log(), top_p=0.7).isfinite()
    assert kept.tolist() == [[True, True, False, False]]
    for least in (0.01, 1e-12):  # 1 - 1e-12 is 1 in float32: every token would go
        assert filter_logits(probs.log(), top_p=least).isfinite().tolist() == [[True, False, False, False]]


def test_repetition_penalty_by_hand_and_as_transformers_without_padding() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5]])
    ids = torch.tensor([[0, 2, 1, 1]])
    mask = torch.tensor([[False, True, True, True]])  # token 0 is padding here
    assert apply_repetition_penalty(logits, ids, mask, 2.0).tolist() == [[2.0, -2.0, 1.5, 0.5]]
    torch.testing.assert_close(
        apply_repetition_penalty(logits, ids, torch.ones_like(mask), 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    )
    assert apply_repetition_penalty(logits, ids, mask, 1.0) is logits
