"""Attention over short texts in bfloat16 is what the kernel computes, and as near to float32 as that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.models import packed, short_texts
from common.models.packed import Shared, attend_to_own_text

LENGTHS = [7, 1, 30, 3, 12]


def attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, *, kernel: bool = False, shared: list[Shared] | None = None
) -> list[Tensor]:
    """Attention over a line of texts, and the gradients of its inputs (1, heads, N, d)."""
    monkeypatch.setattr(packed, "serves", (lambda *_: False) if kernel else short_texts.serves)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, sum(LENGTHS), 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    weights = torch.randn(1, sum(LENGTHS), 2, 8, generator=generator).to(dtype)
    with packed._reading(SimpleNamespace(_attn_implementation="eager"), packed.Texts(LENGTHS, shared)):
        mixed = attend_to_own_text(*inputs, scale=0.5, window=window)
    (mixed * weights).sum().backward()
    return [mixed.detach(), *(part.grad for part in inputs if part.grad is not None)]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("most", [1, 2 * 2 * 12**2, 2**20], ids=["alone", "in groups", "all together"])
def test_products_give_what_the_kernel_gives(window: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_texts, "LOGITS_AT_ONCE", most)
    exact = attention(monkeypatch, torch.float32, window)
    from_kernel, ours = (attention(monkeypatch, torch.bfloat16, window, kernel=kernel) for kernel in (True, False))
    for tensor, reference, other in zip(ours, exact, from_kernel, strict=True):
        error, usual = (float((part - reference).norm() / reference.norm()) for part in (tensor, other))
        assert tensor.dtype == torch.bfloat16 and error < min(0.01, 1.5 * usual)


def test_texts_share_a_group_by_length_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_texts, "LOGITS_AT_ONCE", 2 * 2 * 12**2)
    groups = short_texts.groups_of_like_length(LENGTHS, 2, "cpu")
    assert groups.shapes == [(1, 30), (2, 12), (2, 3)]
    assert [int(part.sum()) for part in groups.real.split([30, 12, 12, 3, 3])] == [30, 12, 7, 3, 1]
    assert groups.places[groups.back].tolist() == list(range(sum(LENGTHS))) and bool(groups.real[groups.back].all())


def test_what_does_not_fit_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 4, 9, 8, dtype=torch.bfloat16)
    assert short_texts.serves(query, query, [9])
    assert not short_texts.serves(query.float(), query.float(), [9])
    assert not short_texts.serves(query, query[:, :2], [9])  # fewer heads of keys
    assert not short_texts.serves(query, query, [short_texts.LONGEST + 1])
    shared = [Shared(0, 0), Shared(0, 2), *[Shared(0, 0)] * 3]
    got, expected = (attention(monkeypatch, torch.bfloat16, None, kernel=kernel, shared=shared) for kernel in (False, True))
    assert all(map(torch.equal, got, expected))


def test_under_autocast_logits_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(monkeypatch, torch.bfloat16, None)
    assert torch.equal(inside[0], attention(monkeypatch, torch.bfloat16, None)[0])
