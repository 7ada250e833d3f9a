"""A CSV that an interrupted evaluation continues: appended in steps, each step on disk before it counts.

Beside `NAME.csv` lies `NAME.csv.state.json` with the number of bytes and rows that are complete and what was evaluated. Started again
on the same, an evaluation keeps those rows; started on something else (another model, other data), the old file is kept aside as
`NAME.previous.csv` and a new one begins; under `--resume` it is refused. `NAME.csv.lock` is held as long as an evaluation writes; it may
be deleted afterwards.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run_lock import hold, release
from common.runs import write_text_atomically

# Answers of any length must come back; the module's default stops at 128 kB per field.
csv.field_size_limit(2**31 - 1)


class CsvLog:
    """`rows` are the complete rows found (all values as text, in file order); `append` adds to file and `rows` alike.

    `identity` says what is evaluated (model, data, settings): plain JSON values; rows of another identity are not continued.
    While it is open (until `close`, or the end of object or process), no other one opens the same file.
    """

    def __init__(self, path: Path | str, columns: Sequence[str], identity: Mapping[str, Any], *, only_resume: bool = False) -> None:
        """`only_resume`: raise UserError where there is nothing of this evaluation to go on with."""
        self.path = Path(path)
        self.columns = tuple(columns)
        self.rows: list[dict[str, str]] = []
        self.note: str | None = None
        self._identity = json.loads(json.dumps({"columns": list(columns), **identity}))
        self._state_path = self.path.with_name(self.path.name + ".state.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = hold(self.path.with_name(self.path.name + ".lock"))
        except BlockingIOError:
            raise UserError(f"{self.path}: another evaluation is writing it; wait for its end or set another log_file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        self._release = weakref.finalize(self, release, lock)
        try:
            if not self._continue(only_resume):
                self._begin()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from None
            raise

    def close(self) -> None:
        """Let others write the file; a second call does nothing."""
        self._release()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (keys exactly the columns) and flush them to disk; floats are written so that they read back equal.

        Raises UserError where the system refuses to write them.
        """
        if not rows:
            return
        for row in rows:
            assert set(row) == set(self.columns), f"row has {sorted(row)}, expected {sorted(self.columns)}"
        plain = [{column: _plain(row[column]) for column in self.columns} for row in rows]
        try:
            self._write("".join(_line(list(row.values())) for row in plain), "ab")
            self.rows.extend(plain)
            self._save_state()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror or error}; the rows before are complete, and the same command goes on "
                "from them"
            ) from None

    def _continue(self, only_resume: bool) -> bool:
        if not self.path.is_file():
            if only_resume:
                raise UserError(f"--resume: {self.path} is not there to go on with; without --resume the evaluation begins")
            return False
        state = self._read_state()
        if state is None or state["identity"] != self._identity or self.path.stat().st_size < state["bytes"]:
            if only_resume:
                raise UserError(f"--resume: {self.path} is of another model, other data or settings; without --resume it is kept aside")
            previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
            self.path.replace(previous)
            self.note = f"{self.path.name} was of another evaluation and is now {previous.name}"
            return False
        with self.path.open("r+b") as file:
            file.truncate(state["bytes"])  # whatever a killed process left half written
        with self.path.open(newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))
        if len(self.rows) != state["rows"]:
            raise UserError(f"{self.path} was edited: it holds {len(self.rows)} rows, expected {state['rows']}; move it away")
        if self.rows:
            self.note = f"{self.path.name} holds {len(self.rows)} rows of this evaluation already; it goes on from there"
        return True

    def _begin(self) -> None:
        # Without the state of an older file first: a kill between the two writes must not leave it beside a new file.
        self._state_path.unlink(missing_ok=True)
        self._write(_line(self.columns), "wb")
        self._save_state()

    def _write(self, text: str, mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))  # generated bytes may decode to lone surrogates
            file.flush()
            os.fsync(file.fileno())

    def _save_state(self) -> None:
        state = {"identity": self._identity, "rows": len(self.rows), "bytes": self.path.stat().st_size}
        write_text_atomically(self._state_path, json.dumps(state, indent=2) + "\n")

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and {"identity", "rows", "bytes"} <= state.keys() else None


def add_resume_option(parser: argparse.ArgumentParser) -> None:
    """`--resume` of an evaluation, which goes on by itself where it can: as `options.only_resume`."""
    parser.add_argument("--resume", dest="only_resume", action="store_true", help="only go on with the rows in log_file, never begin anew")


def _line(values: Sequence[str]) -> str:
    """One CSV line. The writer quotes what its line ending is made of: with \\r\\n a lone \\r in an answer is quoted, too."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _plain(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
