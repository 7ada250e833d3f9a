"""Rows that stay in their file are those that memory would hold: the same splits, notes, fingerprint and errors."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import file_records, json_stream, parallel, records, scratch, splits
from common.errors import UserError
from common.file_records import FileRecords, tokenizer_rows
from common.records import read_splits, source_kind

GOOD: dict[str, list[dict[str, Any]]] = {
    "sft": [{"Question": f"Q {n % 40} é?", "Answer": f"a {n}", "id": n} for n in range(150)],
    "score": [{"Question": f"Q {n % 40}?", "Answer": f"a {n}", "Score": n / 7} for n in range(60)],
    "pair": [
        {"prompt": f"q {n}", "chosen": "yes", "rejected": ["no", "never"], **({"margin": n} if n % 3 else {}), f"c{n % 2}": 1}
        for n in range(60)
    ],
    "prompt": [{"prompt": f"q {n % 9}", **{name: n for name in ("b", "a")[: n % 3]}} for n in range(60)],
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(monkeypatch: pytest.MonkeyPatch, path: str, kind: Any, *, streamed: bool, **options: Any) -> Any:
    """What is read, or the lines of the error."""
    monkeypatch.setattr(records, "STREAMED_BYTES", 0 if streamed else 2**30)
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 300)
    monkeypatch.setattr(parallel, "STRETCH", 16)
    monkeypatch.setattr(parallel, "cores", lambda **_: 1)
    try:
        return read_splits(path, kind, **options)
    except UserError as error:
        return error.problems


def both_ways(monkeypatch: pytest.MonkeyPatch, path: str, kind: Any, **options: Any) -> tuple[Any, Any]:
    return tuple(read(monkeypatch, path, kind, streamed=streamed, **options) for streamed in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", GOOD)
def test_splits_of_a_streamed_file_are_those_of_one_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD[kind])
    memory, streamed = both_ways(monkeypatch, path, kind, validation_split_percentage=20, seed=3)
    assert isinstance(streamed.train, FileRecords) and isinstance(memory.train, list)
    assert (streamed.train, streamed.val, streamed.test) == (memory.train, memory.val, memory.test)
    assert (streamed.fingerprint, streamed.notes) == (memory.fingerprint, memory.notes)
    assert len(streamed.val) > 0 and pickle.loads(pickle.dumps(streamed.train)) == memory.train


def test_a_folder_and_a_validation_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in {"train": GOOD["sft"], "validation": GOOD["sft"][:7], "test": GOOD["sft"][140:]}.items():
        write(folder / f"{name}.jsonl", rows)
    other = write(tmp_path / "other.jsonl", GOOD["sft"][20:60])
    for options in ({}, {"validation_file": other}):
        memory, streamed = both_ways(monkeypatch, str(folder), "sft", **options)
        assert isinstance(streamed.val, FileRecords) and streamed == memory
        assert sum("flatter the model" in note for note in streamed.notes) == 2


BAD: dict[str, list[Any]] = {
    "values": [GOOD["sft"][0], {"Question": 1, "Answer": "a"}, {"Question": "q", "Answer": ["a"]}, {"Question": "q", "Answer": None}],
    "unusable": [*GOOD["sft"][:3], {"Question": " ", "Answer": "a"}, *GOOD["sft"][3:6], {"Question": "q", "Answer": ""}],
    "shapes": [GOOD["sft"][0], {"question": "q", "Answer": "a"}, 12, {"instruction": "q", "response": "a"}, GOOD["pair"][0]],
    "broken": [GOOD["sft"][0], '{"Question": "q", "Answer": "a"', GOOD["sft"][1], '{"Question": "a\tb"}', "", GOOD["sft"][2]],
    "twice": ['{"Question": "q", "Question": "r", "Answer": "a"}', GOOD["sft"][1]],
    "mended": ['{"Question": "\\u0000 \\ud800", "Answer": "a"}', *GOOD["sft"][:5], '{"Question": "q", "Answer": "\\udfff"}'],
    "no UTF-8": [*GOOD["sft"][:9], {"Question": 1, "Answer": "a"}],
}


@pytest.mark.parametrize("unusable_rows", ["error", "drop"])
@pytest.mark.parametrize("name", BAD)
def test_problems_and_notes_have_the_same_words_and_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, unusable_rows: Any
) -> None:
    path = write(tmp_path / "data.jsonl", BAD[name])
    if name == "no UTF-8":
        with open(path, "ab") as file:
            file.write(b'{"Question": "\xff"}\n')
    memory, streamed = both_ways(monkeypatch, path, "sft", unusable_rows=unusable_rows, validation_split_percentage=0.0)
    assert streamed == memory
    assert name == "mended" or isinstance(memory, tuple) or (name == "unusable" and unusable_rows == "drop")


def test_renamed_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"title": row["Question"], "Answer": row["Answer"]} for row in GOOD["sft"]])
    for columns in ({"Question": "title"}, {"Question": "title", "context": "nowhere"}, {"Question": "titel"}):
        memory, streamed = both_ways(monkeypatch, path, "sft", columns=columns)
        assert streamed == memory


def test_what_an_index_knows_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = read(monkeypatch, write(tmp_path / "p.jsonl", GOOD["pair"]), "pair", streamed=True, validation_split_percentage=0.0).train
    np.testing.assert_array_equal(list(pairs.values), [row.margin if row.margin is not None else np.nan for row in pairs])
    some = pairs.take(np.array([9, 2, 5])).take(np.array([0, 2]))
    assert list(some) == [pairs[9], pairs[5]] and some.column_names() == ["c1"]
    asked = pairs.questions[4]
    assert list(pairs.where_question(lambda digests: digests == asked)) == [pairs[4]]
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert list(some.sizes) == [len(lines[9]), len(lines[5])]
    prompts = read(monkeypatch, write(tmp_path / "q.jsonl", GOOD["prompt"]), "prompt", streamed=True, validation_split_percentage=0.0).train
    assert prompts.column_names() == ["b", "a"] and len(set(prompts.questions)) == 9
    assert source_kind(str(tmp_path / "p.jsonl")) == "pair"


def test_a_fresh_tokenizer_learns_from_some_rows_of_a_large_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, streamed = (found.train for found in both_ways(monkeypatch, write(tmp_path / "data.jsonl", GOOD["sft"]), "sft"))
    assert list(tokenizer_rows(memory)) == list(tokenizer_rows(streamed)) == memory
    monkeypatch.setattr(file_records, "TAUGHT_BYTES", sum(streamed.sizes) // 3 + 1)
    chosen = tokenizer_rows(streamed)
    assert "learns from" not in capsys.readouterr().out  # a tokenizer that is there already asks for none
    assert list(chosen) == memory[::3] and list(tokenizer_rows(memory)) == memory
    assert "learns from one row in 3 of a large file" in capsys.readouterr().out


def test_what_is_known_of_many_rows_is_not_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = 100_000
    path = write(tmp_path / "data.jsonl", GOOD["prompt"][:1])
    records = read(monkeypatch, path, "prompt", streamed=True, validation_split_percentage=0.0).train
    index = np.repeat(records.source.index, rows)
    index["question"] = np.random.default_rng(0).integers(0, 2**63, size=rows)
    index["question"][::2] = index["question"][1::2]
    records.source.index = index
    many = FileRecords(records.source, range(rows))
    monkeypatch.setattr(scratch, "MAPPED_BYTES", 0)
    monkeypatch.setattr(scratch, "STRETCH", 1000)
    tracemalloc.start()
    train, val, _ = splits.hold_out(many, 30.0, 0, path)
    notes = list(splits.overlap_notes(path, {"train": many, "val": val, "test": []}, 0))
    first = many.take(train.places).first_of_each_question()
    names = first.column_names()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first) == len(train) // 2 == 35_000 and names == [] and len(notes) == 1
    assert peak < 2 * rows


def test_a_file_that_cannot_be_read_any_more_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = read(monkeypatch, write(tmp_path / "data.jsonl", GOOD["sft"]), "sft", streamed=True).train

    def stale(descriptor: int, size: int, start: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(UserError, match=r"data\.jsonl: train row 1: cannot be read any more: Stale file handle"):
        rows[0]


def test_a_file_that_takes_its_place_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD["sft"])
    rows = read(monkeypatch, path, "sft", streamed=True, validation_split_percentage=0.0).train
    os.replace(write(tmp_path / "other.jsonl", GOOD["prompt"]), path)
    assert rows[149].answer == "a 149"
    with pytest.raises(UserError, match="was changed"):  # by a process that opens it anew
        pickle.loads(pickle.dumps(rows))[149]


def test_a_file_that_changes_under_a_run_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD["sft"])
    rows = read(monkeypatch, path, "sft", streamed=True).train
    with open(path, "r+b") as file:
        file.write(b"{ ")
    with pytest.raises(UserError, match=r"data\.jsonl: the file was changed while it was read"):
        rows[0]


def test_many_faults_end_the_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "MOST_FAULTS", 5)
    path = write(tmp_path / "data.jsonl", [{"Question": "q", "Answer": 1}] * 9)
    assert read(monkeypatch, path, "sft", streamed=True) == (
        f"{path}: not read on after 5 faults",
        f"{path}: train rows 1, 2, 3 and 2 more: Answer: got 1 (a number), expected text",
    )


def test_several_processes_give_the_results_in_order_and_their_errors() -> None:
    rows = range(10_500)
    assert [list(part) for part in parallel.in_stretches(list, rows, 2)] == [list(rows[at : at + 1000]) for at in range(0, 10_500, 1000)]
    with pytest.raises(UserError, match="row 5000"):
        list(parallel.in_stretches(_refuse, rows, 2))
    with pytest.raises(UserError, match="has ended early"):
        list(parallel.in_stretches(_die, rows, 2))


def test_what_processes_share_is_left_alone_when_they_look_for_garbage() -> None:
    before = gc.get_freeze_count()
    assert all(count > 10_000 for count in parallel.in_stretches(_frozen, range(1500), 2))
    assert gc.get_freeze_count() == before


def test_a_stretch_of_long_rows_has_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "STRETCH", 3)
    monkeypatch.setattr(parallel, "STRETCH_BYTES", 10)
    parts = parallel.in_stretches(list, range(9), 1, sizes=[1, 1, 1, 1, 9, 1, 50, 10, 1])
    assert list(parts) == [[0, 1, 2], [3, 4], [5], [6], [7], [8]]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_workers_use_the_cores_that_the_process_was_started_with() -> None:
    """OpenMP narrows those of the main thread (OMP_PROC_BIND)."""
    before = os.sched_getaffinity(0)
    cores = parallel.cores()
    os.sched_setaffinity(0, {min(before)})
    try:
        assert parallel.cores() == cores
        assert list(parallel.in_stretches(_affinity, range(1500), 2)) == [before] * 2
    finally:
        os.sched_setaffinity(0, before)


def test_processes_that_train_together_divide_the_cores_unless_they_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_AFFINITY", {0, 1, 2, 3, 4})
    assert parallel.cores() == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (parallel.cores(), parallel.cores(others_wait=True)) == (2, 5)


def _affinity(part: range) -> set[int]:
    return os.sched_getaffinity(0)


def _frozen(part: range) -> int:
    return gc.get_freeze_count()


def _refuse(part: range) -> None:
    if 5000 in part:
        raise UserError("row 5000")


def _die(part: range) -> None:
    if 5000 in part:
        os._exit(9)
