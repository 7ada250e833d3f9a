"""A file that is read a stretch at a time has the rows, places and problems that the whole of it has."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from common import json_stream
from common.json_rows import parse_file
from common.json_stream import JsonLines, UnreadableFile

ROW = '{"Question": "é𝄞?", "Answer": "a"}'
FILES = {
    "lines": f"{ROW}\n{ROW}\n",
    "windows line ends": f"{ROW}\r\n{ROW}\r\n",
    "no line end": f"{ROW}\n{ROW}",
    "byte order mark": f"\ufeff{ROW}\n{ROW}\n",
    "blank lines": f"\n\n  {ROW}\n\n \n{ROW}\n\n\n",
    "several on a line": f"{ROW}{ROW} {ROW}\n",
    "over several lines": json.dumps({"a": {"b": [1, {"c": None}]}}, indent=1) + "\n" + ROW + "\n",
    "unindented": '{\n"a":\n{\n"b": 1\n}\n}\n' + ROW,
    "no objects": f'{ROW}\n12\n-1.5e3\n"text"\n[1,\n2]\nnull\nNaN\n',
    "a key twice": f'{{"a": 1, "a": 2}}\n{ROW}\n',
    "a brace that is missing": f'{{"a": 1\n{ROW}\n{ROW}\n',
    "a quote that is missing": f'{ROW}\n{{"a": "b}}\n{ROW}\n',
    "words between rows": f"{ROW}\n...\n\n...\n{ROW}\n",
    "cut off": f'{ROW}\n{ROW}\n{{"a": "b',
    "cut off behind a comma": f'{ROW}\n{{"a": 1,\n\n',
    "many digits": f'{{"a": {"1" * 5000}}}\n{ROW}\n',
    "a row that is never closed and no other": f'{ROW}\n{{"a": [\n' + ' {"a": 1},\n' * 30,
    "a broken row before others that are indented": f'{ROW}\n{{"a"}}\n' + f"  {ROW}\n" * 30 + ROW,
    "a broken row before blank lines": '{"a"}\n' + "\n" * 40 + ROW,
    "broken at the end of a line": f'{{"a": \n{ROW}\n{ROW}',
    "no UTF-8": f"{ROW}\n{ROW}\n".encode() + b'{"a": "\xff"}\n',
    "broken row before no UTF-8": b'{"a"}\n{"a": "\xe2\x82\n"}\n',
}


@pytest.mark.parametrize("stretch", [1, 7, 50, 1000])
@pytest.mark.parametrize("name", FILES)
def test_rows_and_problems_are_those_of_the_whole_file(monkeypatch: pytest.MonkeyPatch, name: str, stretch: int) -> None:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", stretch)
    content = FILES[name]
    _compare(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("seed", range(100))
def test_rows_and_problems_of_files_that_chance_broke(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", rng.choice([1, 3, 16, 64]))
    rows = [json.dumps({"a": rng.choice(["é", "{x", "\n", 1, [{}]]), "b": {}}, indent=rng.choice([None, None, 0, 2])) for _ in range(8)]
    text = rng.choice(["\n", "\r\n", " \n", "\n\n"]).join(rows)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(1, len(text))
        text = text[: place - rng.randint(0, 1)] + rng.choice(["", '"', "{", "}", "\n", "\n{", ",", "]", "\\"]) + text[place:]
    if text.startswith("{"):
        _compare(text.encode())


def _compare(data: bytes) -> None:
    whole = parse_file(data, "f.jsonl")
    try:
        lines = JsonLines(io.BytesIO(data), "f.jsonl")
        rows, problems = list(lines), lines.out.problems
    except UnreadableFile as error:
        rows, problems = [], [str(error)]
    assert (repr([replace(row, place=None) for row in rows]), problems) == (repr(whole.rows), whole.problems)  # NaN is not NaN
    for row in rows:
        assert row.place is not None
        start, size = row.place
        assert repr(json.loads(data[start : start + size])) == repr(row.value)


@pytest.mark.parametrize(
    ("content", "suits"),
    [
        (f"\ufeff\n {ROW}", True),
        ('{"broken', True),
        (b'{"a": "\xff"}', True),
        (f"[{ROW}]", False),
        (f'{{"train": [{ROW}]}}', False),
        (f'{{"meta": 1, "val": [{ROW}]}}', False),
        ("question,answer\n", False),
        ("\n\n", False),
        (b"\x1f\x8b\x08\x00", False),
        (ROW.encode("utf-16"), False),
        (b"PAR1", False),
    ],
)
def test_which_files_suit(tmp_path: Path, content: str | bytes, suits: bool) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert JsonLines.suits(path) is suits


def test_memory_holds_a_stretch_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 1000)
    lines = JsonLines(io.BytesIO(f"{ROW}\n".encode() * 2000), "f.jsonl")
    assert max(len(lines.text) + len(lines.line_starts) for _ in lines) < 4000


def test_memory_holds_no_more_behind_a_broken_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 1000)
    held = []
    extend = JsonLines._extend
    monkeypatch.setattr(JsonLines, "_extend", lambda lines, least=0: (extend(lines, least), held.append(len(lines.text)))[0])
    data = b'{"a"}\n' + b' {"indented": 1}\n' * 5000 + f"{ROW}\n".encode()
    lines = JsonLines(io.BytesIO(data), "f.jsonl")
    assert [row.value["Answer"] for row in lines] == ["a"] and len(lines.out.problems) == 1
    assert len(held) > 50 and max(held) < 3000


def test_a_row_of_many_stretches_is_begun_anew_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 10)
    begun, value = [], JsonLines._value
    monkeypatch.setattr(JsonLines, "_value", lambda lines, position: begun.append(position) or value(lines, position))
    [row] = JsonLines(io.BytesIO(json.dumps(list(range(5000)), indent=0).encode()), "f.jsonl")
    assert row.value == list(range(5000)) and len(begun) < 15


def test_a_file_of_nothing_but_broken_rows_is_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MOST_BROKEN", 3)
    lines = JsonLines(io.BytesIO(b'{"a"}\n' * 10), "f.jsonl")
    assert list(lines) == []
    assert len(lines.out.problems) == 4 and lines.out.problems[-1] == "f.jsonl: not read on after 3 broken rows"
