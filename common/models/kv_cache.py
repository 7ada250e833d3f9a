"""A cache of keys and values with room for the whole answer: a decoding step writes one column, where transformers copies all before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` in buffers (B, heads, `room`, d); `keys` and `values` are views of the columns written so far."""

    def __init__(self, filled: DynamicLayer, room: int) -> None:
        """Take over what `filled` holds."""
        super().__init__()
        assert filled.keys is not None and filled.values is not None
        self.room, self.length = room, filled.get_seq_length()
        self.dtype, self.device, self.is_initialized = filled.keys.dtype, filled.keys.device, True
        self._store(filled.keys, filled.values)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        self._buffers = tuple(part.new_empty((*part.shape[:2], self.room, part.shape[3])) for part in (keys, values))
        for buffer, part in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, : self.length] = part
        self._look()

    def _look(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values."""
        end = self.length + key_states.shape[-2]
        assert end <= self.room, "more tokens than there is room for"
        for buffer, part in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = part
        self.length = end
        self._look()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns."""
        self.length -= abs(tokens_to_remove)
        self._look()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep some rows, by transformers' other name for it."""
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        assert self.keys is not None and self.values is not None
        self._store(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        assert self.keys is not None and self.values is not None
        self._store(self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0))


def make_room(cache: Any, tokens: int) -> None:
    """Give every layer of plain keys and values room for `tokens` more, in place; other kinds of cache stay as they are."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            cache.layers[index] = RoomyLayer(layer, layer.get_seq_length() + tokens)
