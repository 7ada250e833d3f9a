"""Whatever lies in a data file: records or clear problems, never a traceback, and never a row that is lost without a word.

Files are built as people have them (an array, lines, splits, pretty-printed; gzipped, with a byte order mark) and then damaged.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.json_rows import SPLIT_ALIASES
from common.records import RecordKind, Splits, read_splits, source_kind
from reward_model.answers import read_csv


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


DIALOGUE = "\n\nHuman: a\n\nAssistant: b"
ODD_TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(["", " ", "\x00", "\ud83d", DIALOGUE + "c"])
OTHER_KEYS = ["Question", "Answer", "Score", "instruction", "chosen", "rejected", "prompt", "context", "margin", "train", "Anwser"]
KEYS = st.sampled_from(OTHER_KEYS) | ODD_TEXT
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 1e308, 5e-324])
VALUES = st.recursive(
    ODD_TEXT | st.none() | st.booleans() | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=3,
)
SPACES = st.sampled_from(["", " ", "\t", "\r", "\n\n", "\r\n", "\x0b", "\x0c", "\u00a0", "\u2028", "\ufeff", "\x85", "\x1a", "\x00"])
PIECES = st.sampled_from([b'"', b"}", b"]", b",", b"\xef\xbb\xbf", b"\x00", b"{", b"\\", b"\n{"])
# Keys that make rows of a kind.
FORMS: dict[RecordKind, list[tuple[str, ...]]] = {
    "sft": [("Question", "Answer"), ("instruction", "response"), ("Question", "Answer", "Score")],
    "score": [("Question", "Answer", "Score")],
    "pair": [("Question", "Accepted_Answer", "Answer"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")],
    "prompt": [("prompt",), ("Question", "Answer"), ("instruction", "chosen", "rejected"), ("chosen", "rejected")],
}


def rarely(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 11)) == 11


@st.composite
def row_texts(draw: st.DrawFn, form: tuple[str, ...]) -> str:
    """A row as JSON, mostly a good one; now and then with odd values, a key that stands twice, endless digits, endless nesting."""
    row: dict[str, Any] = {}
    for number, key in enumerate(form):
        text = f"{draw(st.sampled_from('abcd'))}{number}"
        row[key] = draw(st.integers(0, 9)) if key == "Score" else text
    if form == ("chosen", "rejected"):
        row = {key: f"{DIALOGUE}\n\nHuman: {row['chosen']}\n\nAssistant: {key}" for key in form}
    if rarely(draw) or rarely(draw):  # a row of which nothing can be learnt
        row[form[-1]] = draw(st.sampled_from(["", " \n", row[form[0]]]))
    if rarely(draw):
        row[draw(st.sampled_from(form))] = draw(ODD_TEXT | VALUES)
    if rarely(draw):
        row[draw(KEYS)] = draw(VALUES)
    whole: Any = draw(VALUES) if rarely(draw) and rarely(draw) else row
    text = json.dumps(whole, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 1])))
    if rarely(draw):
        match draw(st.integers(0, 2)):
            case 0:
                return "{" + json.dumps(form[0]) + ": " + json.dumps(draw(VALUES)) + ", " + text.removeprefix("{")
            case 1:
                return text.replace(": ", ": " + draw(st.sampled_from(["9" * 5000, "1e400", "-0.0e-9999", "[" * 2000, "0x1", "01"])), 1)
            case _:
                depth = draw(st.sampled_from([10, 60, 70, 3000]))
                return text.replace("}", ', "deep": ' + "[" * depth + "]" * depth + "}", 1)
    return text


@st.composite
def files(draw: st.DrawFn) -> tuple[RecordKind, bytes]:
    """Rows for a kind of record, in one of the shapes."""
    kind: RecordKind = draw(st.sampled_from(sorted(FORMS)))
    form = draw(st.sampled_from(FORMS[kind]))
    rows = draw(st.lists(row_texts(form), max_size=5))
    space = draw(SPACES) if rarely(draw) else "\n"
    match draw(st.sampled_from(["lines", "array", "splits"])):
        case "lines":
            text = space.join(rows)
        case "array":
            text = "[" + ("," + space).join(rows) + "]"
        case _:
            cut = draw(st.integers(0, len(rows)))
            names = draw(st.sampled_from([("train", "test"), ("test", "dev"), ("train", "validation"), ("train", "x"), ("val", "valid")]))
            text = f'{{"{names[0]}": [{",".join(rows[:cut])}],{space}"{names[1]}": [{",".join(rows[cut:])}]}}'
    if rarely(draw):
        text = draw(SPACES) + text + draw(SPACES)
    return kind, text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> tuple[RecordKind, bytes]:
    """A file that was cut, had bytes changed, put in, taken out or repeated, or stayed as it was; gzipped before or after that, or not."""
    kind, data = draw(files())
    if early := rarely(draw):
        data = gzip.compress(data, mtime=0)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(1, 6)))
        match draw(st.sampled_from(["cut", "flip", "insert", "delete", "repeat"])):
            case "cut":
                data = data[:at]
            case "flip":
                data = data[:at] + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in data[at : at + 1]) + data[at + 1 :]
            case "insert":
                piece = draw(
                    st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"]", b",", b"\xef\xbb\xbf", b"\x00", b"{", b"\\", b"\n{"])
                )
                data = data[:at] + piece + data[at:]
            case "delete":
                data = data[:at] + data[end:]
            case _:
                data = data[:end] + data[at:]
    if draw(st.booleans()):
        data = b"\xef\xbb\xbf" + data
    return kind, gzip.compress(data, mtime=0) if not early and draw(st.booleans()) else data


def rows_of(data: bytes) -> list[Any]:
    """The rows of a file that was accepted, read another way than by the reader."""
    text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig").strip()
    try:
        whole = json.loads(text)
    except ValueError:  # one after another
        rows = []
        while text:
            row, end = json.JSONDecoder().raw_decode(text)
            rows.append(row)
            text = text[end:].lstrip()
        return rows
    if isinstance(whole, dict) and whole and all(key.lower() in SPLIT_ALIASES and isinstance(part, list) for key, part in whole.items()):
        return [row for part in whole.values() for row in part]
    return whole if isinstance(whole, list) else [whole]


def read(path: Path, data: bytes, kind: RecordKind, drop: bool) -> Splits[Any] | None:
    """What is read of a file with this content; None where it was refused, in lines that can be printed and name the file."""
    path.write_bytes(data)
    try:
        return read_splits(str(path), kind, validation_split_percentage=0, require=(), unusable_rows="drop" if drop else "error")
    except UserError as error:
        assert 0 < len(error.problems) <= 21
        assert all(problem.isprintable() and len(problem) < 1000 for problem in error.problems)
        assert all(problem.startswith((str(path), "... and ")) for problem in error.problems)
        return None


@examples(500)
@given(given=st.tuples(st.sampled_from(sorted(FORMS)), st.binary(max_size=60)) | damaged() | damaged(), drop=st.booleans())
@example(given=("sft", b""), drop=False)
@example(given=("sft", b"\x1f\x8b"), drop=False)
@example(given=("sft", b"[" * 100_000), drop=False)
@example(given=("prompt", b'{"a":' * 100_000), drop=True)
def test_any_bytes_give_every_row_or_a_clear_error(tmp_path: Path, given: tuple[RecordKind, bytes], drop: bool) -> None:
    kind, data = given
    splits = read(tmp_path / "any", data, kind, drop)
    if splits is None:
        return
    records = [*splits.train, *splits.val, *splits.test]
    counted = [re.search(r"(\d+) of (\d+) rows dropped as unusable", note) for note in splits.notes]
    dropped, of = next(((int(match[1]), int(match[2])) for match in counted if match), (0, len(records)))
    rows = rows_of(data)
    assert len(records) + dropped == len(rows) == of
    assert drop or not dropped
    if not any("read as U+FFFD" in note for note in splits.notes):  # what was read is what stood there
        texts = {text for row in rows if isinstance(row, dict) for text in row.values() if isinstance(text, str)}
        assert kind != "sft" or {record.answer for record in records} <= texts | {text.removeprefix(" ") for text in texts}


@examples(150)
@given(given=files())
def test_every_bad_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[RecordKind, bytes]) -> None:
    """In a file of rows that is no broken JSON: a row that is refused alone is named by its number."""
    kind, data = given
    monkeypatch.setattr("common.problem_lines.SHOWN_ROWS", 6)
    try:
        rows = rows_of(data)
    except (ValueError, RecursionError):
        return
    path = tmp_path / "rows"
    path.write_text(json.dumps(rows))
    alone = [read(tmp_path / "row", json.dumps([row]).encode(), kind, drop=False) is not None for row in rows]
    try:
        splits = read_splits(str(path), kind, validation_split_percentage=0, require=())
        assert len(splits.train) == len(rows) and all(alone)
    except UserError as error:
        listed = [re.match(rf"{re.escape(str(path))}: train rows? ([0-9, and]+)", problem) for problem in error.problems]
        named = {int(number) for match in listed if match for number in re.findall("[0-9]+", match[1])}
        assert {number for number, good in enumerate(alone, 1) if not good} <= named


@examples(150)
@given(given=damaged())
def test_what_rows_hold_is_told_of_any_bytes(tmp_path: Path, given: tuple[RecordKind, bytes]) -> None:
    data = given[1]
    path = tmp_path / "any"
    path.write_bytes(data)
    try:
        assert source_kind(str(path)) in ("sft", "score", "pair", "prompt")
    except UserError as error:
        assert all(problem.isprintable() for problem in error.problems)


CELLS = st.sampled_from(["a", "", '"', '"a"', "a\nb", '"a\nb"', "\x00", "\r", "é", "a,b"])
CSV = st.lists(st.lists(CELLS, max_size=3).map(",".join), max_size=5).map(lambda lines: "\n".join(["question,answer", *lines]).encode())


@examples(150)
@given(data=CSV | st.binary(max_size=40), drop=st.booleans())
def test_any_csv_gives_every_row_or_a_clear_error(tmp_path: Path, data: bytes, drop: bool) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(data)
    try:
        records, notes = read_csv(str(path), "drop" if drop else "error")
    except UserError as error:
        assert all(problem.isprintable() and problem.startswith(str(path)) for problem in error.problems)
        return
    dropped = next((int(match[1]) for note in notes if (match := re.search(r": (\d+) of \d+ rows dropped", note))), 0)
    assert drop or not dropped
    _, *rows = filter(None, csv.reader(io.StringIO(data.decode(), newline="")))
    assert len(records) + dropped == len(rows) and all(len(row) == 2 for row in rows)
