"""A cache with room for the answer holds what transformers' own holds."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, EncoderDecoderCache

from common.models.kv_cache import RoomyLayer, make_room


def columns(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 3, generator=torch.Generator().manual_seed(seed))


def test_it_grows_and_shrinks_as_transformers_own_cache() -> None:
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        cache.update(columns(3, 4, 0), columns(3, 4, 1), 0)
    make_room(caches[0], 3)
    assert isinstance(caches[0].layers[0], RoomyLayer)

    def same() -> None:
        ours, theirs = (cache.layers[0] for cache in caches)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        assert caches[0].get_mask_sizes(1, 0) == caches[1].get_mask_sizes(1, 0)

    same()
    for step in range(2):
        got, expected = (cache.update(columns(3, 1, 10 + step), columns(3, 1, 20 + step), 0) for cache in caches)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    for cache in caches:
        cache.batch_select_indices(torch.tensor([2, 0]))
    same()
    for cache in caches:
        cache.batch_repeat_interleave(2)
        cache.update(columns(4, 1, 30), columns(4, 1, 31), 0)
    same()
    for cache in caches:
        cache.crop(-2)
        cache.update(columns(4, 1, 40), columns(4, 1, 41), 0)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    same()
    caches[0].reset()
    assert caches[0].get_seq_length() == 0


def test_a_step_writes_one_column_and_copies_nothing() -> None:
    cache = DynamicCache()
    cache.update(columns(1, 4, 0), columns(1, 4, 1), 0)
    make_room(cache, 2)
    before = cache.layers[0].keys.data_ptr()
    keys, _ = cache.update(columns(1, 1, 2), columns(1, 1, 3), 0)
    assert keys.data_ptr() == before and keys.shape[2] == 5


def test_other_kinds_of_layers_stay_as_they_are() -> None:
    window = DynamicCache()
    window.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    window.update(columns(1, 3, 0), columns(1, 3, 1), 0)
    make_room(window, 5)
    assert type(window.layers[0]) is DynamicSlidingWindowLayer
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for part in (pair.self_attention_cache, pair.cross_attention_cache):
        part.update(columns(1, 3, 0), columns(1, 3, 1), 0)
    make_room(pair, 5)
    assert isinstance(pair.self_attention_cache.layers[0], RoomyLayer)
    assert not isinstance(pair.cross_attention_cache.layers[0], RoomyLayer)
    make_room(None, 5)
