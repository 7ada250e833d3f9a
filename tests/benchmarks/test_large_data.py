"""The benchmark of large files writes what it says, and reads memory and moments of the command that it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import large_data
from benchmarks.large_data import Found, run, table_row, write_rows
from benchmarks.processes import ContenderFailed
from common.records import read_splits


@pytest.mark.parametrize(("stage", "kind"), [("sft", "sft"), ("pairs", "pair"), ("ppo", "prompt")])
def test_a_file_has_its_size_and_rows_of_its_stage(tmp_path: Path, stage: str, kind: str) -> None:
    path = tmp_path / "data.jsonl"
    rows = write_rows(path, stage, 0.1)
    assert 1e5 <= path.stat().st_size < 1.1e5
    splits = read_splits(str(path), kind, require=("train", "val"))  # type: ignore[arg-type]
    assert len(splits.train) + len(splits.val) == rows == len(set(path.read_text().splitlines()))


def test_configs_are_those_of_the_stages(tmp_path: Path) -> None:
    for stage, script in large_data.SCRIPTS.items():
        settings = large_data.settings(stage, tmp_path / "data.jsonl", tmp_path, tmp_path, 2)
        assert json.loads(json.dumps(settings)) == settings and (large_data.ROOT / script).is_file()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc of Linux")
def test_memory_and_moments_are_those_of_the_command() -> None:
    held = "held = bytearray(b'x' * 60_000_000); print('note: 2 held out for validation'); time.sleep(0.7)"
    found = run([sys.executable, "-c", f"import time; {held}; print('data: 2 train rows; 9 PPO steps')"])
    assert 60e6 / 2**20 < found.anonymous < 120 and found.resident > found.anonymous
    assert found.moments["run"] - found.moments["read"] > 0.5 and list(found.moments) == ["read", "run", "end"]
    with pytest.raises(ContenderFailed, match="no such thing"):
        run([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_line_of_the_table() -> None:
    found = Found(anonymous=512.4, resident=600.0, moments={"read": 10.0, "train": 20.0, "val": 40.0, "run": 70.0, "end": 80.0})
    assert table_row("sft", 200.0, 1234, found, 90.0) == ["sft", "200", "1,234", "512", "600", "10.0", "50.0", "4.0", "80.0", "90"]
    found.moments = {"read": 1.0, "run": 2.0, "end": 3.0}
    assert table_row("sft", 20.0, 12, found, 0.0)[5:] == ["1.0", "-", "-", "3.0", "-"]


def test_a_tokenizer_of_whole_words() -> None:
    tokenizer = large_data.word_tokenizer(["one two two", "two three. two"], 5)
    assert len(tokenizer) == 5 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("two four one")["input_ids"][:2] == [3, 2]
