"""The CSV of an evaluation survives being killed and knows what it is of."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
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
    log.close()
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


def test_a_disk_that_is_full_in_between_is_told_and_the_rows_before_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = CsvLog(tmp_path / "out.csv", COLUMNS, {"model": "m"})
    log.append(ROWS[:1])
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"out\.csv: cannot be written: No space left on device; the rows"):
        patch.setattr(os, "fsync", full)
        log.append(ROWS[1:])
    log.close()
    again = CsvLog(tmp_path / "out.csv", COLUMNS, {"model": "m"})
    assert len(again.rows) == 1


def test_two_evaluations_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    first = CsvLog(path, COLUMNS, {"model": "m"})
    for identity in ({"model": "m"}, {"model": "other"}):
        with pytest.raises(UserError, match=r"out\.csv: another evaluation is writing it"):
            CsvLog(path, COLUMNS, identity)
    first.append(ROWS)
    CsvLog(tmp_path / "other.csv", COLUMNS, {}).append(ROWS)
    first.close()
    assert len(CsvLog(path, COLUMNS, {"model": "m"}).rows) == 2


def test_a_killed_evaluation_holds_its_file_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    script = f"""
import time
from common.evaluation.csv_log import CsvLog
log = CsvLog({str(path)!r}, {COLUMNS!r}, {{}})
print("open", flush=True)
time.sleep(20)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="another evaluation"):
            CsvLog(path, COLUMNS, {})
        process.send_signal(signal.SIGKILL)
    assert CsvLog(path, COLUMNS, {}).rows == []


def test_a_refused_file_can_be_opened_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    CsvLog(path, COLUMNS, {}).append([{"question": "q", "answer": "a\nb", "score": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a\nb", b'a"\n"'))
    with pytest.raises(UserError, match="was edited") as caught:
        CsvLog(path, COLUMNS, {})
    path.write_bytes(whole)
    assert len(CsvLog(path, COLUMNS, {}).rows) == 1 and caught.value.problems


def test_resume_goes_on_or_refuses(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with pytest.raises(UserError, match="is not there to go on with"):
        CsvLog(path, COLUMNS, {"model": "m"}, only_resume=True)
    CsvLog(path, COLUMNS, {"model": "m"}).append(ROWS)
    with pytest.raises(UserError, match="is of another model, other data or settings"):
        CsvLog(path, COLUMNS, {"model": "other"}, only_resume=True)
    assert not (tmp_path / "out.previous.csv").exists()
    assert len(CsvLog(path, COLUMNS, {"model": "m"}, only_resume=True).rows) == len(ROWS)
