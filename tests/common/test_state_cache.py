"""States on disk: what is written is what is read, a kill or a flipped byte costs one shard, and another model's states are never taken."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import cached_rows, run_lock, state_cache
from common.cached_rows import CachedRows
from common.errors import UserError
from common.models.backbone import RewardInput
from common.state_cache import StateCache, wider
from common.state_facts import TORCH_DTYPES, StateFacts, row_digests
from common.training_state import weights_digest

FACTS = StateFacts(
    weights="w", config="{}", code="c", tokenizer="t", part="encoder", token="all", layers=2, hidden_size=3
)  # fmt: skip
ROWS = [RewardInput(list(range(length))) for length in (3, 1, 4, 2, 5)]


def states_of(row: RewardInput) -> Tensor:
    """Something that tells row, token, layer and unit: (tokens, layers, D)."""
    numbers = torch.arange(row.length * 6, dtype=torch.float32).view(row.length, 2, 3)
    return numbers + 100 * row.length


class Computer:
    """Fills a cache as training does, one row to a batch, and counts what it computes."""

    def __init__(self, root: Path, facts: StateFacts = FACTS, *, stop_after: int | None = None) -> None:
        self.cache, self.computed, self.stop_after = StateCache(root, facts), [], stop_after

    def fill(self, rows: list[RewardInput] = ROWS) -> CachedRows:
        digests = row_digests(rows)
        if len(self.cache.missing(digests)):
            with self.cache.writing() as writer:
                for place in self.cache.missing(digests):
                    if len(self.computed) == self.stop_after:
                        raise RuntimeError("stopped")
                    self.computed.append(rows[place].length)
                    kept = states_of(rows[place]).to(TORCH_DTYPES[self.cache.facts.dtype])
                    writer.add(digests[[place]], [rows[place].length], kept)
        return self.cache.rows(digests)


@pytest.fixture
def row_to_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "SHARD_BYTES", 1)


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("*/shard-*.states"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [1, 150, 2**20])
def test_rows_come_back_one_behind_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, dtype: Any) -> None:
    monkeypatch.setattr(state_cache, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(cached_rows, "OPEN_SHARDS", 2)
    monkeypatch.setattr(cached_rows, "RESIDENT_BYTES", 1)
    rows = Computer(tmp_path, replace(FACTS, dtype=dtype)).fill()
    values, lengths = rows.gather([4, 1, 2])
    assert values.shape == (10, 2, 3) and values.dtype == TORCH_DTYPES[dtype] and lengths == [5, 1, 4]
    assert torch.equal(values, torch.cat([states_of(ROWS[row]) for row in (4, 1, 2)]).to(values.dtype))
    top, _ = rows.gather([4, 1, 2], layers=1)
    assert torch.equal(top, values[:, -1:])
    assert len(shards(tmp_path)) == {1: 5, 150: 2 if dtype == "float32" else 1, 2**20: 1}[shard_bytes]


def test_rows_of_one_token_come_from_several_shards_at_once(tmp_path: Path, row_to_a_shard: None) -> None:
    rows = [RewardInput([number]) for number in range(4)]
    cache = StateCache(tmp_path, replace(FACTS, token="last"))
    digests = row_digests(rows)
    kept = torch.randn(4, 2, 3)
    with cache.writing() as writer:
        for part in ([0, 1], [2, 3]):
            writer.add(digests[part], [1, 1], kept[part])
    asked = np.array([3, 0, 2, 3, 1])
    values, lengths = cache.rows(digests).gather(asked)
    assert torch.equal(values, kept[asked]) and lengths == [1] * 5
    top, _ = cache.rows(digests).gather(asked, layers=1)
    assert torch.equal(top, values[:, -1:])


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    Computer(tmp_path).fill(ROWS[:2])
    again = Computer(tmp_path)
    found = again.fill([*ROWS, ROWS[2]])  # a row that stands there twice is computed once
    assert again.computed == [4, 2, 5]
    values, _ = found.gather([5, 0])
    assert torch.equal(values, torch.cat([states_of(ROWS[2]), states_of(ROWS[0])]))
    assert json.loads((tmp_path / FACTS.key / "cache.json").read_text())["part"] == "encoder"


def test_after_an_error_whole_rows_stay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        Computer(tmp_path, stop_after=3).fill()
    again = Computer(tmp_path)
    again.fill()
    assert again.computed == [2, 5]


def test_after_a_kill_all_shards_but_the_one_in_work_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "SHARD_BYTES", 2 * 3 * 2 * 3 * 4)  # two rows of three tokens
    digests = row_digests([RewardInput([number] * 3) for number in range(6)])
    child = os.fork()
    if child == 0:
        with StateCache(tmp_path, FACTS).writing() as writer:
            for number in range(5):
                writer.add(digests[[number]], [3], torch.full((3, 2, 3), float(number)))
            writer._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cache = StateCache(tmp_path, FACTS)
    assert cache.missing(digests).tolist() == [4, 5]
    assert len(list((tmp_path / FACTS.key).glob(".shard-*"))) == 1
    with cache.writing() as writer:  # the lock of the killed run is free, and what it left goes
        assert not list((tmp_path / FACTS.key).glob(".shard-*"))
        writer.add(digests[4:], [3, 3], torch.full((6, 2, 3), 4.0))
    values, _ = StateCache(tmp_path, FACTS).rows(digests).gather(range(6))
    assert values[::3, 0, 0].tolist() == [0, 1, 2, 3, 4, 4]


def test_a_file_without_its_manifest_is_not_there(tmp_path: Path, row_to_a_shard: None) -> None:
    Computer(tmp_path).fill()
    shards(tmp_path)[0].with_suffix(".json").unlink()
    again = Computer(tmp_path)
    again.fill()
    assert len(again.computed) == 1 and len(shards(tmp_path)) == 5


@pytest.mark.parametrize("place", [0, -1, "size", "gone", "manifest"])
def test_a_damaged_shard_is_named_and_computed_anew(
    tmp_path: Path, row_to_a_shard: None, capsys: pytest.CaptureFixture[str], place: Any
) -> None:
    Computer(tmp_path).fill()
    damaged = shards(tmp_path)[2]
    content = bytearray(damaged.read_bytes())
    if place == "size":
        damaged.write_bytes(content[:-1])
    elif place == "gone":
        damaged.unlink()
    elif place == "manifest":
        damaged.with_suffix(".json").write_text("{")
    else:
        content[place] ^= 1
        damaged.write_bytes(content)
    capsys.readouterr()
    again = Computer(tmp_path)
    found = again.fill()
    assert len(again.computed) == 1
    problem = {"size": "has ", "gone": "is missing", "manifest": "its shard-"}.get(place, "its content differs from its checksum")
    assert f"{damaged}: {problem}" in capsys.readouterr().out
    assert not damaged.exists() and not damaged.with_suffix(".json").exists()
    for number, row in enumerate(ROWS):
        assert torch.equal(found.gather([number])[0], states_of(row))
    third = Computer(tmp_path)
    third.fill()
    assert third.computed == []


def test_a_shard_is_verified_whole_however_large_it_is(tmp_path: Path) -> None:
    facts = replace(FACTS, hidden_size=2**18)  # 2 MiB to a token
    digests = row_digests(ROWS[:1])
    with StateCache(tmp_path, facts).writing() as writer:
        writer.add(digests, [3], torch.randn(3, 2, 2**18))
    assert len(StateCache(tmp_path, facts).missing(digests)) == 0
    with shards(tmp_path)[0].open("r+b") as file:
        file.write(b"\xff")
    assert len(StateCache(tmp_path, facts).missing(digests)) == 1


def test_a_shard_that_is_old_enough_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_cache, "SHARD_SECONDS", 0.0)
    Computer(tmp_path).fill()
    assert len(shards(tmp_path)) == len(ROWS)


@pytest.mark.parametrize("noted", [0, 1])
def test_an_interrupt_in_the_middle_of_a_row_costs_no_more_than_its_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], noted: int
) -> None:
    digests = row_digests(ROWS)
    with pytest.raises(KeyboardInterrupt), StateCache(tmp_path, FACTS).writing() as writer:
        if noted:
            writer.add(digests[:1], [3], states_of(ROWS[0]))
        else:
            writer._begin()
        writer._write(states_of(ROWS[1]).view(torch.uint8).numpy())  # of a row that is not noted yet
        raise KeyboardInterrupt
    again = Computer(tmp_path)
    found = again.fill()
    assert len(again.computed) == len(ROWS) and torch.equal(found.gather([1])[0], states_of(ROWS[1]))
    assert ("its content differs from what its shard-" in capsys.readouterr().out) == bool(noted)


@pytest.mark.parametrize("name", [field.name for field in fields(StateFacts)])
def test_the_key_changes_with_each_fact(name: str) -> None:
    value = getattr(FACTS, name)
    other = replace(FACTS, **{name: value + 1 if isinstance(value, int) else f"{value}x"})
    assert other.key != FACTS.key


def test_rows_go_by_their_ids_in_each_part() -> None:
    rows = [
        RewardInput([1, 2]),
        RewardInput([1, 2, 3]),
        RewardInput([1, 2], [3]),
        RewardInput([1], [2, 3]),
        RewardInput([2, 1]),
        RewardInput([1, 2]),
    ]
    digests = row_digests(rows)
    assert len(set(digests.tolist())) == 5 and digests[0] == digests[5]


def test_weights_are_told_apart_by_value_name_type_and_shape() -> None:
    def model(bias: float = 0.0, dtype: torch.dtype = torch.float32, name: str = "a", shape: tuple[int, ...] = (2, 2)) -> nn.Module:
        found = nn.Module()
        found.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype) + bias))
        return found

    digests = [
        weights_digest(found.state_dict())
        for found in (model(), model(1e-7), model(dtype=torch.float64), model(name="b"), model(shape=(4,)))
    ]
    assert len(set(digests)) == 5 and weights_digest(model().state_dict()) == digests[0]


def test_states_that_do_not_fit_onto_the_disk_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2**30))  # type: ignore[attr-defined]
    cache = StateCache(tmp_path / "not" / "made", FACTS)
    assert cache.needed_bytes(100) == 100 * 2 * 3 * 4
    cache.check_room(2**29)
    with pytest.raises(UserError) as refused:
        cache.check_room(2**30)
    assert len(refused.value.problems) == 1 and "1.00 GiB, and 1.00 GiB are free" in str(refused.value)
    assert not (tmp_path / "not").exists()


def refusing(number: int) -> Callable[..., None]:
    """A call of the system that fails."""

    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_is_an_error_and_what_was_whole_stays(tmp_path: Path, row_to_a_shard: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StateCache(tmp_path, FACTS)
    digests = row_digests(ROWS)
    with pytest.raises(UserError, match=r"No space left on device.*; make room, or name another"), cache.writing() as writer:
        writer.add(digests[:1], [3], states_of(ROWS[0]))
        monkeypatch.setattr(writer, "_write", refusing(errno.ENOSPC))
        writer.add(digests[1:2], [1], states_of(ROWS[1]))
    assert StateCache(tmp_path, FACTS).missing(digests[:2]).tolist() == [1]
    assert not list((tmp_path / FACTS.key).glob(".shard-*"))


@pytest.mark.parametrize("call", ["hold", "write_text_atomically", "os.fsync", "Path.mkdir", "Path.rename"])
def test_whatever_the_system_refuses_is_a_line_and_leaves_whole_shards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_to_a_shard: None, call: str
) -> None:
    Computer(tmp_path).fill(ROWS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(f"common.state_cache.{call}", refusing(errno.EACCES))
        with pytest.raises(UserError) as refused:
            Computer(tmp_path).fill(ROWS[:2])
    assert list(refused.value.problems) == [
        f"{tmp_path / FACTS.key}: states cannot be kept there (Permission denied); let this user write there, or name another "
        "model_params.cache_dir; whole shards stay, and the same command goes on from them"
    ]
    again = Computer(tmp_path)
    again.fill(ROWS[:2])
    assert again.computed == [ROWS[1].length]


def test_states_that_went_during_a_run_are_told(tmp_path: Path) -> None:
    found = Computer(tmp_path).fill()
    shards(tmp_path)[0].unlink()
    with pytest.raises(UserError, match=r"\.states: states that were there can be read no more \(No such file or directory\)"):
        found.gather([0])


def test_a_second_run_waits_for_the_first_and_finds_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()
    monkeypatch.setattr(state_cache, "say", lambda note: waits.set() if "waiting for it" in note else None)
    first, second = Computer(tmp_path), Computer(tmp_path)
    digests = row_digests(ROWS)
    with first.cache.writing() as writer:
        other = threading.Thread(target=second.fill)
        other.start()
        assert waits.wait(timeout=60)
        for place, row in enumerate(ROWS):
            writer.add(digests[[place]], [row.length], states_of(row))
    other.join(timeout=60)
    assert second.computed == [] and not other.is_alive()


def test_without_locks_both_write_and_either_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock.fcntl, "flock", refusing(errno.ENOLCK))
    first, second = Computer(tmp_path), Computer(tmp_path)
    with first.cache.writing() as writer:
        second.fill()
        for place, row in enumerate(ROWS):
            writer.add(row_digests(ROWS)[[place]], [row.length], states_of(row))
    found = Computer(tmp_path).fill()
    assert len(shards(tmp_path)) == 2 and torch.equal(found.gather([2])[0], states_of(ROWS[2]))


def test_a_cache_of_more_layers_serves_fewer(tmp_path: Path) -> None:
    Computer(tmp_path).fill()
    digests, narrow = row_digests(ROWS), replace(FACTS, layers=1)
    assert wider(tmp_path, narrow, digests).facts == FACTS
    assert wider(tmp_path, narrow, row_digests([RewardInput([9])])).facts == narrow  # not all rows are there
    assert wider(tmp_path, replace(narrow, weights="others"), digests).facts.layers == 1
    assert wider(tmp_path, replace(narrow, dtype="bfloat16"), digests).facts.layers == 1
    assert wider(tmp_path, replace(FACTS, layers=3), digests).facts.layers == 3  # fewer do not serve more


def test_a_data_worker_maps_the_files_itself(tmp_path: Path) -> None:
    found = Computer(tmp_path).fill()
    found.gather([0])
    copy = pickle.loads(pickle.dumps(found))
    assert torch.equal(copy.gather([2])[0], found.gather([2])[0])


def test_a_reader_keeps_few_files_open(tmp_path: Path, row_to_a_shard: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(cached_rows, "OPEN_SHARDS", 2)
    rows = Computer(tmp_path).fill()
    before = len(list(opened.iterdir()))
    rows.gather(range(5))
    assert len(list(opened.iterdir())) == before + 2


def test_a_reader_keeps_few_pages(tmp_path: Path) -> None:
    """The resident memory of a process that reads everything grows by less than the file."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    facts = replace(FACTS, layers=8, hidden_size=2048)  # 64 KiB to a token
    cache = StateCache(tmp_path, facts)
    digests = row_digests([RewardInput([number]) for number in range(64)])
    with cache.writing() as writer:
        writer.add(digests, [32] * 64, torch.zeros(64 * 32, 8, 2048))
    rows = cache.rows(digests)
    rows.gather([0])
    before, most = resident(), 0
    for row in range(64):
        rows.gather([row])
        most = max(most, resident() - before)
    assert rows.paths[0].stat().st_size > 128 * 2**20
    assert most < 96 * 2**20
