"""Sampling whose randomness is a function of where a token stands, not of what was drawn before it.

The noise of a token is a hash of (seed, step, row, position, token): whatever batch a row is in, in whatever order or on
whichever rank, it samples the same answer. No generator has state, so nothing has to be saved to resume.
The hash is integer arithmetic, the same on a CPU and on a GPU; only the last logarithms may differ there by rounding.

    logits = filter_logits(logits, temperature, top_k, top_p)
    token = (logits + gumbel_noise(seed, step, rows, position, vocab, device)).argmax(-1)        # a sample of softmax(logits)
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: Weyl increment of splitmix64


def _signed(value: int, bits: int) -> int:
    """The integer with the same `bits` bits in two's complement, as torch's signed types hold it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix64_tensor(value: Tensor) -> Tensor:
    """`_mix64` of an int64 tensor; torch shifts arithmetically, so the sign bits that come in are masked away."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


class Stream(IntEnum):
    """What a key is for. Keys of different purposes differ even where seed and numbers are the same."""

    TOKENS = 0
    PROMPT_ORDER = 1
    MINIBATCHES = 2
    BOOTSTRAP = 3


def stream_keys(seed: int, step: int, rows: Tensor, position: int | Tensor, stream: Stream = Stream.TOKENS) -> Tensor:
    """One 64-bit key per row, (B,) int64, of (stream, seed, step, row, position).

    `rows` (B,) and `position` (B,) or an int are >= 0.
    """
    start = _mix64(seed * _GOLDEN + 1)
    if stream != Stream.TOKENS:
        start = _mix64(start + stream * _GOLDEN + 3)
    base = _mix64(start + step * _GOLDEN + 2)
    rows = rows.to(torch.int64)
    keys = _mix64_tensor(rows * _signed(_GOLDEN, 64) + _signed(base, 64))
    return _mix64_tensor(keys + (position + 1) * torch.full_like(rows, _signed(_GOLDEN, 64)))


def hash_bits(keys: Tensor, vocab: int) -> Tensor:
    """32 random bits per (row, token), (B, V) int32, from 64-bit keys (B,).

    Wellons' `triple32` (three multiplications, bias below 0.02 bits) of token + low key word, with the high key word
    entering after the first multiplication, so that two rows' bits are no permutation of one another.
    """
    low = keys.to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = low + torch.arange(vocab, dtype=torch.int32, device=keys.device)
    bits ^= (bits >> 17) & 0x7FFF
    bits *= _signed(0xED5AD4BB, 32)
    bits ^= high
    bits ^= (bits >> 11) & 0x1FFFFF
    bits *= _signed(0xAC4C1B51, 32)
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _signed(0x31848BAB, 32)
    bits ^= (bits >> 14) & 0x3FFFF
    return bits


def gumbel_noise(
    seed: int, step: int, rows: Tensor, position: int | Tensor, vocab: int, device: torch.device | str | None = None
) -> Tensor:
    """Standard Gumbel noise (B, V) float32: `(logits + noise).argmax(-1)` is a sample of softmax(logits).

    `rows` (B,) are global row numbers and `position` is the number of the answer token (an int or (B,)); both >= 0.
    `step` separates what the same row samples at different times (0 where there is only one). V is at most 2**31.
    """
    bits = hash_bits(stream_keys(seed, step, rows.to(device), position.to(device) if isinstance(position, Tensor) else position), vocab)
    # v is uniform in (0, 1) in steps of 2**-31, finest near 0, where the large noise values -log(-log(1 - v)) come from
    v = (bits & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) float32 divided by the temperature, with -inf where a token may not be sampled.

    As in transformers: first the temperature, then the `top_k` likeliest (0: all; ties with the k-th stay), then of those the
    smallest set of likeliest tokens whose probability reaches `top_p`. At least one token stays.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        remove = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        remove[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter_(1, order, remove), float("-inf"))
    return logits


def apply_repetition_penalty(logits: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with every token that stands in the text made less likely (Keskar et al. 2019, eq. 2).

    `ids` (B, S) is the text so far and `mask` (B, S) is True on its tokens: padding is not penalised, so it changes nothing.
    Positive logits are divided by `penalty`, negative ones multiplied by it.
    """
    if penalty == 1.0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, ids, mask.to(torch.int32)) > 0
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
