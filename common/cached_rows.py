"""Rows of a cache of hidden states as tensors, mapped from its files."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.state_facts import STORED, TORCH_DTYPES, Digests, StateFacts

RESIDENT_BYTES = 64 * 2**20
"""Mapped pages that a reader keeps, about; without a limit the peak memory of a run would be the data set's size."""
OPEN_SHARDS = 256
_TOUCHED_BYTES = 64 * 2**10  # what the kernel maps around a page that is read
Integers = NDArray[np.int64]


class CachedRows:
    """States of R rows in the files of a cache, read where they are asked for."""

    def __init__(self, facts: StateFacts, shards: Mapping[Path, tuple[Digests, Integers]], digests: Digests) -> None:
        """`shards`: digests and numbers of tokens of the rows of each file; `digests`: those of the R rows."""
        self.facts = facts
        self.paths = list(shards)
        self.shard = np.full(len(digests), -1, dtype=np.int32)
        """(R,): which of the paths has the row."""
        self.start = np.zeros(len(digests), dtype=np.int64)
        """(R,): tokens before it there."""
        self.tokens = np.zeros(len(digests), dtype=np.int64)
        """(R,): its tokens."""
        for number, (rows, tokens) in enumerate(shards.values()):
            order = np.argsort(rows)
            place = order[np.minimum(np.searchsorted(rows, digests, sorter=order), len(rows) - 1)]
            here = (rows[place] == digests) & (self.shard < 0)
            self.shard[here] = number
            self.start[here] = (np.cumsum(tokens) - tokens)[place[here]]
            self.tokens[here] = tokens[place[here]]
        assert bool((self.shard >= 0).all()), "a row has no states: write them first"
        self._maps: dict[int, tuple[mmap.mmap, NDArray[Any]]] = {}
        self._touched = 0

    def __len__(self) -> int:
        return len(self.shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_touched": 0}  # a data worker maps the files itself

    def gather(self, rows: Sequence[int] | Integers, *, layers: int | None = None) -> tuple[Tensor, list[int]]:
        """States (N, L, D) of all tokens of these rows, row after row, and how many tokens each has. `layers`: the last so many of them."""
        places = np.asarray(rows, dtype=np.int64)
        layers = layers or self.facts.layers
        tokens, shard, start = self.tokens[places], self.shard[places], self.start[places]
        ends = np.cumsum(tokens)
        states = torch.empty(int(tokens.sum()), layers, self.facts.hidden_size, dtype=TORCH_DTYPES[self.facts.dtype])
        out = states.view(torch.uint16).numpy() if self.facts.dtype == "bfloat16" else states.numpy()
        for number in np.unique(shard).tolist():
            stored = self._map(number)
            here = np.flatnonzero(shard == number)
            if len(states) == len(places):  # a token each
                out[here] = stored[start[here], -layers:]
                continue
            for begin, count, end in zip(start[here].tolist(), tokens[here].tolist(), ends[here].tolist(), strict=True):
                out[end - count : end] = stored[begin : begin + count, -layers:]
        self._forget(out.nbytes + len(places) * _TOUCHED_BYTES)
        return states, tokens.tolist()

    def _map(self, number: int) -> NDArray[Any]:
        """A shard's states (tokens, layers, D), mapped."""
        if number not in self._maps:
            while len(self._maps) >= OPEN_SHARDS:  # each is an open file
                self._maps.pop(next(iter(self._maps)))
            facts = self.facts
            try:
                with self.paths[number].open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # mmap: an empty file
                raise UserError(
                    f"{self.paths[number]}: states that were there can be read no more ({getattr(error, 'strerror', None) or error}); "
                    "they are computed anew when the run goes on"
                ) from None
            # The last tokens of a shard are followed by digests and counts, which no place points to.
            whole = len(mapped) // facts.bytes_per_token
            flat = np.frombuffer(mapped, dtype=STORED[facts.dtype], count=whole * facts.layers * facts.hidden_size)
            self._maps[number] = mapped, flat.reshape(whole, facts.layers, facts.hidden_size)
        return self._maps[number][1]

    def _forget(self, touched: int) -> None:
        """Give mapped pages back now and then; they stay in the system's file cache, which is not this process's memory."""
        self._touched += touched
        if self._touched >= RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for mapped, _ in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
