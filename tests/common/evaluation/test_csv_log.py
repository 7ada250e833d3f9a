"""The CSV of an evaluation survives being killed and knows what it is of."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from common.errors import UserError
from common.evaluation.csv_log import CsvLog

COLUMNS = ("question", "answer", "score")
ROWS = [
    {"question": 'a "quoted", text\nof two lines', "answer": "", "score": 0.1 + 0.2},
    {"question": "二", "answer": None, "score": -1},
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_read_back_as_written(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "sub" / "out.csv", COLUMNS, {"model": "m"})
    log.append(ROWS)
    rows = read(tmp_path / "sub" / "out.csv")
    assert rows == log.rows
    assert rows[0]["question"] == ROWS[0]["question"]
    assert float(rows[0]["score"]) == 0.1 + 0.2  # the exact float
    assert rows[1]["answer"] == ""


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    CsvLog(path, COLUMNS, {"model": "m"}).append(ROWS)
    again = CsvLog(path, COLUMNS, {"model": "m"})
    assert again.rows == read(path)
    assert len(again.rows) == 2
    assert again.note is not None and "2 rows" in again.note
    again.append(ROWS[:1])
    assert len(read(path)) == 3


@pytest.mark.parametrize("junk", [b"half a ro", b'"open quote\n', b"a,b,c\n"])
def test_what_a_killed_process_left_half_written_is_cut_off(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "out.csv"
    CsvLog(path, COLUMNS, {}).append(ROWS)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(junk)
    assert len(CsvLog(path, COLUMNS, {}).rows) == 2
    assert path.read_bytes() == whole


def test_any_character_that_a_model_may_write_reads_back(tmp_path: Path) -> None:
    texts = ["a\rb", "\r", "\r\n", "\x00 \x1c \x85 \u2028", " lead ", '"', ",", "'", "=1+1", "\ufeff"]
    log = CsvLog(tmp_path / "out.csv", COLUMNS, {})
    log.append([{"question": text, "answer": text, "score": 0.5} for text in texts])
    assert [row["answer"] for row in CsvLog(tmp_path / "out.csv", COLUMNS, {}).rows] == texts


@pytest.mark.parametrize("change", ["identity", "columns", "state lost"])
def test_rows_of_another_evaluation_are_put_aside(tmp_path: Path, change: str) -> None:
    path = tmp_path / "out.csv"
    CsvLog(path, COLUMNS, {"model": "m"}).append(ROWS)
    old = path.read_bytes()
    if change == "state lost":
        (tmp_path / "out.csv.state.json").unlink()
    columns = COLUMNS[:2] if change == "columns" else COLUMNS
    log = CsvLog(path, columns, {"model": "other" if change == "identity" else "m"})
    assert log.rows == []
    assert read(path) == []
    assert (tmp_path / "out.previous.csv").read_bytes() == old


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    CsvLog(path, COLUMNS, {}).append([{"question": "q", "answer": "a\nb", "score": 1}])
    path.write_bytes(path.read_bytes().replace(b'"a\nb"', b"aa\nbbb"))
    with pytest.raises(UserError, match="edited"):
        CsvLog(path, COLUMNS, {})


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        CsvLog(tmp_path / "file" / "out.csv", COLUMNS, {})
