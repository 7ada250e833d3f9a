"""Ids on disk are the ids that memory would hold, whole or not there, and of the data and settings that they are asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import parallel, records, token_rows
from common.errors import UserError
from common.models.load import train_tokenizer
from common.records import read_splits
from common.run_lock import hold
from common.token_rows import TokenCache, lengths_of, stored_rows
from common.tokenization import Encoder, encode_answers, encode_preferences

LONG = "word " * 30
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"Question": f"Why {n}?", "Answer": f"{LONG if n % 7 == 3 else ''}since {n}"} for n in range(40)],
    "pair": [
        {"prompt": f"{LONG if n % 5 == 1 else ''}why {n}?", "chosen": f"yes {n}", "rejected": ["no", f"never {n}"][: 1 + n % 2]}
        for n in range(40)
    ],
    "prompt": [{"prompt": f"{LONG if n % 5 == 1 else ''}why {n}?"} for n in range(40)],
}
ROWS["pair"][13]["chosen"] = f"{LONG}a"
ROWS["pair"][13]["rejected"] = [f"{LONG}b"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for row in ROWS["sft"] for text in row.values()] * 2, 300)


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "STREAMED_BYTES", 0)
    monkeypatch.setattr(parallel, "STRETCH", 9)
    monkeypatch.setattr(parallel, "cores", lambda **_: 1)
    monkeypatch.setattr(token_rows, "RESIDENT_BYTES", 2**18)


def read(path: Path, kind: Any = "sft") -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    return read_splits(str(path), kind, validation_split_percentage=10).train


def encoder(tokenizer: Any, **changes: Any) -> Encoder:
    return Encoder(tokenizer, **{"max_length": 40, **changes})


def answers(ids: Any, records: Any, row: int) -> Any:
    return ids.answers(row)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "pair"])
def test_rows_counts_and_lengths(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str, processes: int) -> None:
    monkeypatch.setattr(parallel, "cores", lambda **_: processes)
    found, memory = read(tmp_path / "data.jsonl", kind), encoder(tokenizer)
    expected: list[Any] = (encode_answers if kind == "sft" else encode_preferences)(memory, list(found), "drop")  # type: ignore[operator]
    kept = [record for record, group in zip(found, expected, strict=True) if group is not None]
    groups = [group if kind == "pair" else [group] for group in expected if group is not None]
    notes = memory.take_notes("train", remedy="mend")
    for cache in (TokenCache(tmp_path / "ids", "data"), TokenCache(tmp_path / "ids", "data")):  # written, then read
        disk = encoder(tokenizer)
        rows = stored_rows(answers, disk, found, cache, "train", "drop")
        assert list(rows) == groups and list(rows.records) == kept and len(kept) == len(found) - (kind == "pair")
        assert lengths_of(rows).tolist() == [max(one.length for one in group) for group in groups]  # type: ignore[union-attr]
        assert rows.answers.tolist() == [max(len(one.answer_ids) for one in group) for group in groups]
        assert disk.take_notes("train", remedy="mend") == notes and len(notes) > 0
        for name, lengths in memory.lengths["train"].items():
            np.testing.assert_array_equal(disk.lengths["train"][name].tokens, lengths.tokens)
        assert list(pickle.loads(pickle.dumps(rows))) == groups


def test_prompts(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path / "data.jsonl", "prompt")
    ids = TokenCache(tmp_path / "ids", "data").ids(encoder(tokenizer), found, "train")
    assert [ids.prompt(row) for row in range(len(ids))] == encoder(tokenizer).prompts([record.prompt for record in found])


def made(cache: TokenCache, tokenizer: Any, found: Any, split: str = "train", unusable_rows: Any = "drop", **changes: Any) -> int:
    """How many folders of ids there are once these are there."""
    assert cache.folder is not None
    cache.ids(encoder(tokenizer, **changes), found, split, unusable_rows)
    return len(list(cache.folder.glob("*/manifest.json")))


def test_other_data_settings_and_tokenizers_have_ids_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    found, cache = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data")
    assert made(cache, tokenizer, found) == made(cache, tokenizer, found) == 1
    assert made(TokenCache(tmp_path / "ids", "other data"), tokenizer, found) == 2
    assert made(cache, tokenizer, found, "val") == 3
    assert made(cache, tokenizer, found.take(np.arange(5))) == 4
    assert made(cache, tokenizer, found, max_length=41) == 5
    assert made(cache, tokenizer, found, max_prompt_length=30) == 6
    assert made(cache, train_tokenizer([LONG], 280), found) == 7


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "manifest"])
def test_damaged_ids_are_made_anew(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    found, cache = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data")
    whole = list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop"))
    [folder] = (tmp_path / "ids").glob("*/")
    if damage == "changed":
        data = bytearray((folder / "tokens").read_bytes())
        data[5] ^= 1
        (folder / "tokens").write_bytes(data)
    elif damage == "cut":
        (folder / "ends").write_bytes((folder / "ends").read_bytes()[:-8])
    elif damage == "missing":
        (folder / "places").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    capsys.readouterr()
    assert list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop")) == whole
    assert "its rows are tokenized anew" in capsys.readouterr().out


def test_what_a_killed_run_left_is_not_read_and_goes(tmp_path: Path, tokenizer: Any) -> None:
    found, cache = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data")
    whole = list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop"))
    [folder] = (tmp_path / "ids").glob("*/")
    half = folder.with_name(f".{folder.name}.staging-1-0")
    shutil.move(folder, half)
    (half / "tokens").write_bytes((half / "tokens").read_bytes()[:9])
    assert list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop")) == whole
    assert not half.exists()


def test_a_bad_row_ends_it_and_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    found, cache = read(tmp_path / "data.jsonl", "pair"), TokenCache(tmp_path / "ids", "data")
    told = []
    for make in (
        lambda: encode_preferences(encoder(tokenizer), list(found)),
        lambda: cache.ids(encoder(tokenizer), found, "train"),
    ):
        with pytest.raises(UserError, match=r"train row 14: chosen and rejected are the same after cutting") as raised:
            make()
        told.append(raised.value.problems)
    assert told[0] == told[1] and [path.suffix for path in (tmp_path / "ids").iterdir()] == [".lock"]


def test_a_disk_that_refuses_is_a_line(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path / "data.jsonl")
    (tmp_path / "ids").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"ids: token ids cannot be kept there: .*; make room, or name another data\.cache_dir"):
        TokenCache(tmp_path / "ids", "data").ids(encoder(tokenizer), found, "train", "drop")


def test_a_folder_that_goes_while_its_ids_are_used_is_used_on(tmp_path: Path, tokenizer: Any) -> None:
    found, cache = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data")
    rows = stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop")
    whole = list(rows)
    shutil.rmtree(tmp_path / "ids")
    assert list(rows) == whole
    assert list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop")) == whole  # made anew


def test_ids_that_go_before_they_are_read_are_a_line(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, write = read(tmp_path / "data.jsonl"), TokenCache._write
    monkeypatch.setattr(TokenCache, "_write", lambda *arguments: (write(*arguments), shutil.rmtree(arguments[1]))[0])
    with pytest.raises(UserError, match="token ids that were just written are gone or damaged"):
        TokenCache(tmp_path / "ids", "data").ids(encoder(tokenizer), found, "train", "drop")


def test_a_run_that_is_making_them_is_waited_for(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, cache = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data")
    waited = []

    def another_holds_it(path: Path, *, wait: bool = False) -> Any:
        waited.append(wait)
        if not wait:
            raise BlockingIOError
        return hold(path)

    monkeypatch.setattr(token_rows, "hold", another_holds_it)
    assert made(cache, tokenizer, found) == 1 and waited == [False, True]


def test_without_locks_the_first_to_end_makes_them_and_no_other_is_disturbed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, cache, write = read(tmp_path / "data.jsonl"), TokenCache(tmp_path / "ids", "data"), TokenCache._write
    monkeypatch.setattr(token_rows, "hold", lambda path, wait=False: hold(path)._replace(alone=False))

    def overtaken(*arguments: Any) -> None:
        write(*arguments)
        write(*arguments)

    monkeypatch.setattr(TokenCache, "_write", overtaken)
    whole = list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop"))
    [folder] = (tmp_path / "ids").glob("*/")
    of_another = folder.with_name(f".{folder.name}.staging-1-0")
    shutil.move(folder, of_another)
    assert list(stored_rows(answers, encoder(tokenizer), found, cache, "train", "drop")) == whole
    assert of_another.exists() and folder.exists()
