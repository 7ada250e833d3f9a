"""Every shape of a file gives the same rows, and everything unreadable is named with row, line and column."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from common.json_rows import RawRows, parse_file, parse_rows

ROWS: list[dict[str, Any]] = [
    {"Question": "a\nb", "Answer": 'c"d'},
    {"Question": "é", "Answer": "{}"},
    {"Question": "x", "Answer": ["y", "z"]},
]
SHAPES = {
    "array": json.dumps(ROWS),
    "array, pretty": json.dumps(ROWS, indent=2),
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines, no newline at the end": "\n".join(json.dumps(row) for row in ROWS),
    "lines, blank ones between": "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "lines of Windows": "\r\n".join(json.dumps(row) for row in ROWS),
    "pretty objects one after another": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "one line, several objects": " ".join(json.dumps(row) for row in ROWS),
    "some lines, some pretty": "\n".join([json.dumps(ROWS[0]), json.dumps(ROWS[1], indent=1), json.dumps(ROWS[2])]),
    "one split": json.dumps({"train": ROWS}),
}


def values(rows: RawRows, split: str = "train") -> list[Any]:
    assert rows.problems == []
    return [row.value for row in rows.rows if row.split == split]


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("wrap", [lambda data: data, gzip.compress, lambda data: b"\xef\xbb\xbf" + data], ids=["plain", "gzip", "BOM"])
def test_every_shape_gives_the_same_rows(text: str, wrap: Any) -> None:
    assert values(parse_file(wrap(text.encode()), "f")) == ROWS


def test_splits_and_their_other_names() -> None:
    for name in ("val", "valid", "validation", "dev", "Validation"):
        rows = parse_rows(json.dumps({"train": ROWS[:2], name: ROWS[2:], "test": []}), "f")
        assert values(rows) == ROWS[:2] and values(rows, "val") == ROWS[2:] and values(rows, "test") == []
        assert rows.named_splits


def test_rows_know_their_number_and_line() -> None:
    text = '{\n"train": [\n{"a": 1},\n\n{"a":\n 2}],\n"test": [{"a": 3}]}'
    assert [(row.split, row.number, row.line) for row in parse_rows(text, "f").rows] == [("train", 1, 3), ("train", 2, 5), ("test", 1, 7)]


def test_a_first_answer_that_is_a_list_makes_no_split() -> None:
    row = {"Answer": ["a", "b"], "Question": "q"}
    assert values(parse_rows(json.dumps(row) + "\n" + json.dumps(row), "f")) == [row, row]


def test_keys_that_stand_twice_are_found() -> None:
    rows = parse_rows('{"a": 1, "b": 2, "a": 3}\n{"a": {"c": 1, "c": 2}}\n{"a": 1}', "f").rows
    assert [row.duplicates for row in rows] == [("a",), ("c",), ()]


PROBLEMS = {
    "empty": ("", ["f: got an empty file, expected rows"]),
    "blank": (" \n \n", ["f: got an empty file, expected rows"]),
    "no JSON": ("Question,Answer\n1,2", ["f: train row 1: line 1, column 1: broken JSON: Expecting value"]),
    "a broken line among good ones": (
        '{"a": 1}\n{"a": 2,}\n{"a": 3}\n{"a" 4}\n',
        [
            "f: train row 2: line 2, column 8: broken JSON: Illegal trailing comma before end of object",
            "f: train row 4: line 4, column 6: broken JSON: Expecting ':' delimiter",
        ],
    ),
    "a line cut off among good ones": (
        '{"a": "b\n{"a": "c"}\n',
        ["f: train row 1: line 1, column 7: broken JSON: Unterminated string starting at"],
    ),
    "the last line cut off": (
        '{"a": 1}\n{"a": ',
        ["f: train row 2: line 2, column 6: broken JSON: Expecting value; the file ends inside this row (was it cut off?)"],
    ),
    "an array cut off": (
        '[{"a": 1},\n{"a": 2}',
        [
            "f: train row 2: line 2, column 9: broken JSON: expected ',' or ']' after the row; "
            "the file ends inside this row (was it cut off?)",
        ],
    ),
    "text after the array": (
        '[{"a": 1}]\n[{"a": 2}]',
        ['f: line 2: got "[{\\"a\\": 2}]" after the end of the data, expected nothing more'],
    ),
    "a misspelt split": (
        '{"tain": [{"a": 1}], "test": []}',
        ['f: line 1: "tain": unknown split, expected train, val or test (did you mean train?)'],
    ),
    "a split twice": ('{"val": [],\n"dev": []}', ['f: line 2: "dev": the val split is there already, as "val"']),
    "a split that is no list": ('{"train": [], "test": {"a": 1}}', ['f: line 1: "test": got {"a": 1}, expected an array of rows']),
    "something beside splits": (
        '{"version": 1, "train": [{"a": 1}]}',
        ['f: got "version" beside splits, expected train, val and test only'],
    ),
    "a raw control character": (
        '{"a": "b\x00"}',
        ["f: train row 1: line 1, column 9: broken JSON: a raw control character inside a text, expected \\u0000"],
    ),
    "a line break in a text": (
        '{"a": "b\n"}',
        ["f: train row 1: line 1, column 9: broken JSON: a line break inside a text (is its closing quote missing?)"],
    ),
    "nested without end": ("[" * 100000, ["f: train row 1: line 1, column 2: broken JSON: nested too deeply"]),
    "digits without end": (
        '{"a": ' + "1" * 5000 + "}",
        [
            "f: train row 1: line 1, column 1: broken JSON: "
            "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_cannot_be_read_is_named(text: str, expected: list[str]) -> None:
    problems = parse_rows(text, "f").problems
    # Python 3.13 words trailing commas better than 3.11
    older = [line.replace("column 8: broken JSON: Illegal trailing comma before end of object", OLD_COMMA) for line in expected]
    assert problems in (expected, older)


OLD_COMMA = "column 9: broken JSON: Expecting property name enclosed in double quotes"


def test_rows_after_a_broken_one_are_still_read() -> None:
    rows = parse_rows('{"a": 1}\n{"a": \n{"a": 3}\n', "f")
    assert [(row.number, row.value) for row in rows.rows] == [(1, {"a": 1}), (3, {"a": 3})]


BYTES = {
    "Latin-1": (b'{"a": "caf\xe9"}', "f: byte 10: got 0xe9, expected UTF-8 text"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "f: byte 0: got a UTF-16 byte order mark, expected UTF-8 text"),
    "not UTF-8 after a BOM": (b"\xef\xbb\xbf\xff", "f: byte 3: got 0xff, expected UTF-8 text"),
    "gzip cut off": (gzip.compress(b'{"a": 1}' * 50)[:-9], "f: broken gzip data: "),
    "gzip, changed": (
        gzip.compress(b'{"a": 1}', mtime=0)[:12] + b"\xff\xff" + gzip.compress(b'{"a": 1}', mtime=0)[14:],
        "f: broken gzip data: ",
    ),
    "Parquet": (b"PAR1\x15", "f: got a Parquet file"),
}


def test_a_csv_is_named_and_not_called_broken_json() -> None:
    assert parse_file(b"question,answer\na,b\n", "f.csv").problems == [
        "f.csv: got a CSV file, expected JSON or JSON Lines; reward_model/score.py alone reads CSV"
    ]
    assert not parse_file(b'{"a": 1}', "rows.csv").problems


@pytest.mark.parametrize(("data", "expected"), BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_text_are_named(data: bytes, expected: str) -> None:
    problems = parse_file(data, "f").problems
    assert len(problems) == 1 and problems[0].startswith(expected)
