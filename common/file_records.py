"""Records that stay in their JSON Lines file: an index of where each stands, and a row that is read where it is asked for.

The index lies in a temporary file that is mapped into memory, so that neither rows nor index count among what a process holds.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.json_rows import RawRow, SplitName
from common.lazy import Lazy
from common.notes import say
from common.record_types import PairRecord, Record, RecordKind, ScoreRecord, question_digest
from common.row_formats import RowFormat, RowReader
from common.row_parser import read_row
from common.scratch import Column, distinct, first_places, refusal, scratch, stretches

R = TypeVar("R", bound=Record)

_ENTRY = np.dtype([("start", "<i8"), ("size", "<u4"), ("number", "<u4"), ("question", "<u8"), ("value", "<f8"), ("columns", "<u4")])
_PACKED = struct.Struct("<qIIQdI")
_BUFFER_BYTES = 2**20
TAUGHT_BYTES = 64 * 2**20
"""What a fresh tokenizer learns from a file, about, at most: what its training holds grows with the words that it has seen."""


class RecordFile(Generic[R]):
    """A file of rows that were checked once, and can be read again. Its rows are entered with `add`, then asked for with `records`."""

    def __init__(self, path: Path, name: str, split: SplitName, kind: RecordKind, reader: RowReader, seed: int) -> None:
        """`name`: what errors call the file. `seed`: of the digests of questions."""
        self.path, self.name, self.split, self.kind, self.reader, self.seed = path, name, split, kind, reader, seed
        self.columns: dict[tuple[str, ...], int] = {}
        """The names of columns that rows have beside their parts, numbered."""
        self.index: NDArray[Any] = np.empty(0, dtype=_ENTRY)
        self._forms: dict[tuple[str, ...], RowFormat] = {}
        self._handle = path.open("rb", buffering=0)
        self._state = self._look()
        self._buffer = bytearray()
        self._written: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_written")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle, self._written = self.path.open("rb", buffering=0), None

    def opened(self) -> BinaryIO:
        """The file, to be read from its begin."""
        return os.fdopen(os.dup(self._handle.fileno()), "rb")

    def add(self, row: RawRow, record: Record) -> None:
        """Enter the row of a record."""
        assert row.place is not None
        value = record.score if isinstance(record, ScoreRecord) else record.margin if isinstance(record, PairRecord) else None
        columns = self.columns.setdefault(tuple(record.columns), len(self.columns))
        question = question_digest(record.prompt, self.seed)
        self._buffer += _PACKED.pack(*row.place, row.number, question, float("nan") if value is None else value, columns)
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            if self._written is None:
                self._written = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the index)
            self._written.write(self._buffer)
            self._written.flush()
        except OSError as error:
            raise UserError(f"{self.name}: {refusal(error)}") from None
        self._buffer = bytearray()

    def records(self) -> FileRecords[R]:
        """All of the records that were entered."""
        if self._written is None:
            self.index = np.frombuffer(bytes(self._buffer), dtype=_ENTRY)
        else:
            self._flush()
            self.index = np.memmap(self._written, dtype=_ENTRY, mode="r").view(np.ndarray)
        return FileRecords(self, range(len(self.index)))

    def read(self, columns: Sequence[str], place: int) -> R:
        """The record of an entry, with None in those of `columns` that it lacks.

        Raises UserError where the file is no longer what was checked.
        """
        start, size, number, *_ = self.index[place].item()
        try:
            data = os.pread(self._handle.fileno(), size, start)
        except OSError as error:
            raise UserError(f"{self.name}: {self.split} row {number}: cannot be read any more: {error.strerror or error}") from None
        if self._look() != self._state:
            raise UserError(f"{self.name}: the file was changed while it was read; start again")
        value = json.loads(data.decode())
        row = self.reader.renamed(value)
        keys = tuple(value)
        if keys not in self._forms:
            form, _ = self.reader.check_keys(value, row)
            assert form is not None, "a row that was checked"
            self._forms[keys] = form
        record, _ = read_row(self._forms[keys], self.kind, row, f"{self.name}: {self.split} row {number}")
        assert record is not None, "a row that was checked"
        if columns:
            record = replace(record, columns={**dict.fromkeys(columns), **record.columns})
        return record  # type: ignore[return-value]

    def _look(self) -> tuple[int, int, int]:
        state = os.fstat(self._handle.fileno())
        return state.st_ino, state.st_size, state.st_mtime_ns


class FileRecords(Lazy[R]):
    """Records of a file, or some of them, read where they are asked for."""

    def __init__(self, source: RecordFile[R], places: range | NDArray[Any], columns: Sequence[str] = ()) -> None:
        """`columns`: those that every record is to have, None where its row has none."""
        super().__init__(partial(source.read, columns), places)
        self.source, self.columns = source, tuple(columns)

    def take(self, chosen: NDArray[Any]) -> FileRecords[R]:
        """Some of these records, by their places here."""
        if isinstance(self.places, range):
            assert self.places == range(len(self))
            places = chosen
        else:
            places = scratch(len(chosen))
            for part in stretches(len(chosen)):
                places[part] = self.places[chosen[part]]
        return FileRecords(self.source, places, self.columns)

    def where_question(self, test: Callable[[NDArray[Any]], NDArray[Any]]) -> FileRecords[R]:
        """Those whose question has a digest of which `test`, which gets and gives arrays, is true."""
        chosen, questions = scratch(len(self)), self.questions
        count = 0
        for part in stretches(len(self)):
            found = np.flatnonzero(test(questions[part]))
            chosen[count : count + len(found)] = found + part.start
            count += len(found)
        return self.take(chosen[:count])

    def first_of_each_question(self) -> FileRecords[R]:
        """The first record of each question."""
        _, first = first_places(self.questions)
        first.sort()
        return self.take(first)

    def with_columns(self, names: Iterable[str]) -> FileRecords[R]:
        """The same records, each with all of these columns."""
        return FileRecords(self.source, self.places, tuple(names))

    @property
    def questions(self) -> Column:
        """(N,), eight bytes each: digests of what is asked."""
        return self._column("question")

    @property
    def values(self) -> Column:
        """(N,), float64: scores, or margins (NaN where there is none)."""
        return self._column("value")

    @property
    def sizes(self) -> Column:
        """(N,): bytes of each row in the file."""
        return self._column("size")

    def column_names(self) -> list[str]:
        """Names of all columns of these rows, in the order of their appearance."""
        known = list(self.source.columns)
        kinds, seen = self._column("columns"), dict[int, None]()
        for part in stretches(len(self)):
            found, first = np.unique(kinds[part], return_index=True)
            seen.update(dict.fromkeys(found[np.argsort(first)].tolist()))
        return list(dict.fromkeys(name for kind in seen for name in known[kind]))

    def _column(self, name: str) -> Column:
        """One of the index."""
        column, places = self.source.index[name], self.places

        def read(part: slice) -> NDArray[Any]:
            if isinstance(places, range):
                return column[places.start + part.start : places.start + part.stop]
            found: NDArray[Any] = column[places[part]]
            return found

        return Column(len(places), read)


def tokenizer_rows(records: Sequence[R]) -> Iterator[R]:
    """Those that a fresh tokenizer is trained on: all, or of a large file every n-th, which a note says once they are asked for."""
    nth = max(1, -(-sum(records.sizes) // TAUGHT_BYTES)) if isinstance(records, FileRecords) else 1
    if nth > 1:
        say(f"a fresh tokenizer learns from one row in {nth} of a large file, about {TAUGHT_BYTES / 2**20:.3g} MiB of text")
    yield from records if nth == 1 else records[::nth]


def distinct_questions(rows: Sequence[Any]) -> NDArray[Any]:
    """Digests of the questions of these records, each once, in rising order."""
    assert isinstance(rows, FileRecords)
    return distinct(rows.questions)


def shared_questions(one: Any, other: Any) -> int:
    """How many digests two splits have in common, each of which has every digest once, in rising order."""
    few, many = sorted((np.asarray(each, dtype=np.uint64) for each in (one, other)), key=len)
    count = 0
    for part in stretches(len(few)):
        at = np.searchsorted(many, few[part])
        count += int((many[np.minimum(at, len(many) - 1)] == few[part]).sum())
    return count
