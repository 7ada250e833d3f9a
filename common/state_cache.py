"""Hidden states of a transformer that does not change, kept on disk: computed once, read in every epoch, by every readout and seed.

A cache is a folder named by a digest over everything its states depend on (`StateFacts`); a row in it goes by a digest of its token ids.
So rows of several data sets share a cache, and what is missing is computed and added.

    FOLDER/KEY/cache.json            the facts, for people
    FOLDER/KEY/shard-ID.states       states of some rows one behind the other, then the rows' digests, then their numbers of tokens
    FOLDER/KEY/shard-ID.json         rows, tokens and checksum of that file; a shard without this one is not there

Shards are written under another name and renamed, and never changed: whatever kills a run, whole shards stay, and a run beside it reads
whole shards only. Nothing is lost by deleting a folder but the time to compute it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.cached_rows import CachedRows, Integers
from common.disk import amount, is_out_of_space
from common.errors import UserError
from common.notes import say
from common.run_lock import Held, hold, release
from common.runs import write_text_atomically
from common.state_facts import DIGEST_BYTES, TORCH_DTYPES, Digests, StateFacts

FACTS_FILE = "cache.json"
SHARD_BYTES = 256 * 2**20
"""States of a shard, at most one batch more."""
SHARD_SECONDS = 120.0
"""A shard is closed after so long, however small it is: what a kill costs at most."""
_FREE_BYTES = 256 * 2**20  # left for others when states are written


@dataclass(frozen=True)
class Shard:
    """A complete file of states: how many rows and tokens it has, and CRC-32 and size of all its bytes."""

    rows: int
    tokens: int
    bytes: int
    crc32: int


class StateCache:
    """The cache of these facts below `root`; nothing is made there before rows are written."""

    def __init__(self, root: Path, facts: StateFacts) -> None:
        self.root, self.facts = root, facts
        self.folder = root / facts.key
        self._shards: dict[str, tuple[Digests, Integers]] = {}  # verified ones: digests and numbers of tokens of their rows

    def missing(self, digests: Digests) -> NDArray[np.intp]:
        """Places in `digests` of the rows that no whole shard has, each row once."""
        self._look()
        unique, first = np.unique(digests, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for rows, _ in self._shards.values():
            known |= np.isin(unique, rows)
        return np.sort(first[~known])

    def rows(self, digests: Digests) -> CachedRows:
        """The states of these rows, in this order. All of them have to be there."""
        self._look()
        return CachedRows(self.facts, {self.path(name): shard for name, shard in self._shards.items()}, digests)

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}.states"

    def needed_bytes(self, tokens: int) -> int:
        """Bytes that the states of so many tokens take."""
        return tokens * self.facts.bytes_per_token

    def check_room(self, size: int) -> None:
        """Raise UserError where `size` bytes do not fit onto the disk."""
        there = next(folder for folder in (self.root, *self.root.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        if size + _FREE_BYTES > free:
            raise UserError(
                f"{self.root}: the states take {amount(size)}, and {amount(free)} are free; name another model_params.cache_dir, "
                "or cache fewer layers or a shorter type (model_params.cache_states)"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[ShardWriter]:
        """The right to add rows: another run that has it is waited for. What killed runs left unfinished, and damaged shards, go.

        Rows that the other run has added are there afterwards: ask `missing` inside.
        """
        with telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = self._hold()
        try:
            with telling(self.folder):
                if held.alone:
                    self._clean()
                if not (self.folder / FACTS_FILE).exists():
                    write_text_atomically(self.folder / FACTS_FILE, json.dumps(asdict(self.facts), indent=2) + "\n")
            writer = ShardWriter(self)
            try:
                yield writer
            finally:  # after an error, too: whole rows are whole rows
                writer.close()
        finally:
            release(held)

    def _hold(self) -> Held:
        lock = self.folder / "lock"
        try:
            return hold(lock)
        except BlockingIOError:
            say(f"{self.folder}: another run is writing states; waiting for it")
            return hold(lock, wait=True)

    def _clean(self) -> None:
        for shard, problem in self._look().items():
            say(f"{self.path(shard)}: {problem}; its states are computed anew")
            (self.folder / f"{shard}.json").unlink(missing_ok=True)  # first: without it the shard is not there
            self.path(shard).unlink(missing_ok=True)
        for path in (*self.folder.glob(".shard-*"), *self.folder.glob("shard-*.states")):
            if path.stem not in self._shards:
                path.unlink(missing_ok=True)

    def _look(self) -> dict[str, str]:
        """Take in the shards that are there and not known yet; those that are damaged are returned, with what is wrong."""
        problems = {}
        for manifest in sorted(self.folder.glob("shard-*.json")):
            if manifest.stem not in self._shards:
                try:
                    self._shards[manifest.stem] = self._read(manifest)
                except _Damaged as damage:
                    problems[manifest.stem] = str(damage)
        return problems

    def _read(self, manifest: Path) -> tuple[Digests, Integers]:
        """Digests and numbers of tokens of a shard's rows, once all its bytes are what they were."""
        path = self.path(manifest.stem)
        try:
            shard = Shard(**json.loads(manifest.read_bytes()))
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != shard.bytes:
                    raise _Damaged(f"has {os.fstat(file.fileno()).st_size} bytes, expected {shard.bytes}")
                crc = 0
                while part := file.read(2**20):
                    crc = zlib.crc32(part, crc)
                if crc != shard.crc32:
                    raise _Damaged("its content differs from its checksum")
                file.seek(shard.tokens * self.facts.bytes_per_token)
                digests = np.frombuffer(file.read(shard.rows * DIGEST_BYTES), dtype=f"S{DIGEST_BYTES}")
                tokens = np.frombuffer(file.read(), dtype="<i8")
        except FileNotFoundError:
            raise _Damaged("is missing") from None
        except (OSError, ValueError, TypeError, OverflowError):
            raise _Damaged(f"its {manifest.name} cannot be read") from None
        if not len(digests) == len(tokens) == shard.rows or tokens.sum() != shard.tokens or tokens.min(initial=0) < 0:
            raise _Damaged(f"its content differs from what its {manifest.name} says")
        return digests, tokens


class _Damaged(Exception):
    """Why a shard cannot be used."""


@contextlib.contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Raise UserError where the system refuses to write or read the states in this folder."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if is_out_of_space(error) else "let this user write there"
        raise UserError(
            f"{folder}: states cannot be kept there ({error.strerror or error}); {remedy}, or name another model_params.cache_dir; whole "
            "shards stay, and the same command goes on from them"
        ) from None


class ShardWriter:
    """Appends rows to a shard, and begins another one where it is large or old enough."""

    def __init__(self, cache: StateCache) -> None:
        self.cache = cache
        self._file: Any = None

    def add(self, digests: Digests, tokens: Sequence[int], states: Tensor) -> None:
        """Rows by their digests, with the number of tokens of each, and their states (all tokens, layers, D), row after row.

        Raises UserError where the system refuses to write them.
        """
        facts = self.cache.facts
        assert states.shape == (sum(tokens), facts.layers, facts.hidden_size) and len(digests) == len(tokens)
        assert states.dtype == TORCH_DTYPES[facts.dtype]
        with self._dropping():
            if self._file is None:
                self._begin()
            self._write(states.detach().cpu().contiguous().view(torch.uint8).numpy())
        self._digests.append(digests)
        self._tokens += tokens
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._begun >= SHARD_SECONDS:
            self.close()

    def _begin(self) -> None:
        self._name = f"shard-{uuid.uuid4().hex[:12]}"
        self._path = self.cache.folder / f".{self._name}"
        self._file = self._path.open("wb")
        self._begun, self._crc, self._bytes = time.monotonic(), 0, 0
        self._digests: list[Digests] = []
        self._tokens: list[int] = []

    def _write(self, data: NDArray[Any]) -> None:
        self._file.write(data.data)
        self._crc = zlib.crc32(data.data, self._crc)
        self._bytes += data.nbytes

    def close(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self._file is None:
            return
        if not self._tokens:
            self._drop()
            return
        digests, tokens = np.concatenate(self._digests), np.array(self._tokens, dtype="<i8")
        with self._dropping():
            for part in (digests, tokens):
                self._write(part.view(np.uint8))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.rename(self.cache.path(self._name))
            shard = Shard(len(digests), int(tokens.sum()), self._bytes, self._crc)
            write_text_atomically(self.cache.folder / f"{self._name}.json", json.dumps(asdict(shard)) + "\n")
        self._file = None
        self.cache._shards[self._name] = digests, tokens

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Leave nothing of a shard that the system refuses to write. Raises UserError then."""
        try:
            with telling(self.cache.folder):
                yield
        except UserError:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # what is in the buffer may not fit either
            self._file.close()
        self._file = None
        for path in (self._path, self.cache.path(self._name)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def wider(root: Path, facts: StateFacts, digests: Digests) -> StateCache:
    """The cache of these facts, or, where it lacks rows, one below `root` that differs in having more layers and has all of them."""
    own = StateCache(root, facts)
    if not len(own.missing(digests)):
        return own
    for path in sorted(root.glob(f"*/{FACTS_FILE}")):
        try:
            other = StateFacts(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            continue
        if other.layers > facts.layers and replace(other, layers=facts.layers) == facts:
            cache = StateCache(root, other)
            if not len(cache.missing(digests)):
                return cache
    return own
