"""Token ids of records that stay in their file: written once by several processes, then mapped into memory.

The ids of a split are a folder whose name is a digest of all that they depend on: the records, the tokenizer, the settings.

    FOLDER/KEY/manifest.json     what was counted, and size and checksum of each of the files beside it
    FOLDER/KEY/tokens            ids of all prompts and answers, one behind the other
    FOLDER/KEY/...               where each of them ends, how long rows are: a few bytes each

A folder gets its name when it is complete: whatever ends a run, none is half there. It may be deleted while nobody uses it, and costs the
time to tokenize again.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import mmap
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import atomic_directory, tokenizer_fingerprint
from common.errors import UserError
from common.file_records import FileRecords
from common.followers import follows
from common.lazy import Lazy
from common.notes import say
from common.parallel import in_stretches
from common.problem_lines import RowFault, fault_lines, raise_problems
from common.progress import Progress
from common.record_types import PairRecord, PromptRecord, Record
from common.run_lock import hold, release
from common.scratch import Column
from common.tokenization import Counts, Encoded, Encoder, answers_of

R = TypeVar("R", covariant=True)

FORMAT = 1
MOST_FAULTS = 100_000
"""After so many bad rows no more is tokenized."""
MANIFEST = "manifest.json"
RESIDENT_BYTES = 64 * 2**20
"""Mapped ids that stay in memory, about; the system's file cache may hold more, which is not this process's memory."""
_TOUCHED_BYTES = 64 * 2**10  # what the system maps around a page that is read
_COLUMNS = {
    "ends": "<i8",  # of each prompt and answer, among the tokens
    "cuts": "<i4",  # tokens cut off each of them
    "texts": "<i8",  # prompts and answers of all rows up to the end of this one
    "lengths": "<i4",  # tokens of each row: its prompt and longest answer
    "answers": "<i4",  # tokens of each row's longest answer
    "places": "<u4",  # which record each row is made of
    "prompts_read": "<i4",  # tokens of each prompt before it was cut, rows that were dropped included
    "answers_read": "<i4",
}


class Stretch(NamedTuple):
    """What so many records become: their part of each file, and what is wrong with the rest."""

    records: int
    columns: dict[str, NDArray[Any]]
    counts: Counter[str]
    seen: Counter[str]
    problems: list[str]
    unusable: list[RowFault]


@dataclass(frozen=True)
class _Tokenizing:
    """Records -> ids, in whichever process."""

    encoder: Encoder
    unusable_rows: Literal["error", "drop"]
    dtype: str

    def __call__(self, records: Sequence[Record]) -> Stretch:
        self.encoder.take_counts()
        records = list(records)
        prompts, wheres = [record.prompt for record in records], [record.where for record in records]
        unusable: list[RowFault] = []
        groups: list[list[Encoded] | None]
        if isinstance(records[0], PromptRecord):
            fitted, problems = self.encoder.try_prompts(prompts, wheres)
            groups = [[Encoded(ids, [])] for ids in fitted]
        else:
            answers = [answers_of(record) for record in records]  # type: ignore[arg-type]  # all of one kind
            first_differs = isinstance(records[0], PairRecord)
            groups, problems, unusable = self.encoder.try_groups(prompts, answers, wheres, self.unusable_rows, first_differs=first_differs)
        counted = self.encoder.take_counts()
        return Stretch(len(records), self._columns(groups, counted), counted.counts, counted.seen, problems, unusable)

    def _columns(self, groups: Sequence[list[Encoded] | None], counted: Counts) -> dict[str, NDArray[Any]]:
        """What goes into each file; `ends`, `texts` and `places` count from the stretch's begin."""
        kept = [(place, group) for place, group in enumerate(groups) if group is not None]
        texts: list[list[int]] = []
        columns: dict[str, list[int]] = {name: [] for name in ("cuts", "texts", "lengths", "answers", "places")}
        for place, group in kept:
            own = [encoded for encoded in group if encoded.answer_ids]
            texts += [group[0].prompt_ids, *(encoded.answer_ids for encoded in own)]
            longest = max((len(encoded.answer_ids) for encoded in own), default=0)
            columns["cuts"] += [group[0].cut_prompt, *(encoded.cut_answer for encoded in own)]
            columns["texts"].append(len(texts))
            columns["lengths"].append(len(group[0].prompt_ids) + longest)
            columns["answers"].append(longest)
            columns["places"].append(place)
        return {
            "tokens": np.fromiter(chain.from_iterable(texts), dtype=self.dtype),
            "ends": np.cumsum([len(ids) for ids in texts], dtype=np.int64),
            **{name: np.array(values, dtype=_COLUMNS[name]) for name, values in columns.items()},
            "prompts_read": np.array(counted.lengths["prompt"], dtype="<i4"),
            "answers_read": np.array(counted.lengths["answer"], dtype="<i4"),
        }


@dataclass(frozen=True)
class TokenCache:
    """The folder of ids, and the fingerprint of the data set that they are of."""

    folder: Path | None
    """None: a temporary one, which goes with the process."""
    data: str

    def ids(self, encoder: Encoder, records: FileRecords[Any], split: str, unusable_rows: Literal["error", "drop"] = "error") -> TokenIds:
        """Ids of the records that can be used; `encoder` has counted them as if it had made them.

        Made here by all cores where no earlier run has left them whole; another process that is making them is waited for. Raises UserError
        with a line for each bad row, and where the disk has no room.
        """
        facts = self._facts(encoder, records, split, unusable_rows)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        folder = _temporary_folder() if self.folder is None else self.folder
        place = folder / key
        with _telling(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = hold(folder / f"{key}.lock")
            except BlockingIOError:
                say(f"{place}: another process is making these token ids; waiting for it")
                lock = hold(folder / f"{key}.lock", wait=True)
        try:
            with _telling(folder):
                ids = self._read(place)
            if ids is not None:
                say(f"{split}: token ids of {len(ids):,} rows are in {place}")
            else:
                for left in folder.glob(f".{key}.staging-*") if lock.alone else ():  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                try:
                    self._write(place, facts, encoder, records, split, unusable_rows, lock.alone)
                except UserError:
                    if not place.is_dir():
                        raise  # else another process was quicker: there are no locks, or somebody deleted them
                ids = self._read(place)
                if ids is None:
                    raise UserError(f"{place}: token ids that were just written are gone or damaged; is something else deleting them?")
        finally:
            release(lock)
        encoder.add_counts(ids.counts)
        return ids

    def _facts(self, encoder: Encoder, records: FileRecords[Any], split: str, unusable_rows: str) -> dict[str, Any]:
        """All that the ids depend on."""
        places = records.places
        return {
            "format": FORMAT,
            "data": self.data,
            "split": split,
            "kind": records.source.kind,
            "rows": repr(places) if isinstance(places, range) else hashlib.sha256(places.data).hexdigest(),
            "unusable_rows": unusable_rows,
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "tokenizers": version("tokenizers"),
            "prompt_format": encoder.prompt_format,
            "max_length": encoder.max_length,
            "max_prompt_length": encoder.max_prompt_length,
            "truncate_prompt": encoder.truncate_prompt,
            "is_encoder_decoder": encoder.is_encoder_decoder,
        }

    def _write(
        self,
        place: Path,
        facts: dict[str, Any],
        encoder: Encoder,
        records: FileRecords[Any],
        split: str,
        unusable_rows: Literal["error", "drop"],
        others_wait: bool,
    ) -> None:
        dtype = "<u2" if max(encoder.tokenizer.get_vocab().values(), default=0) < 2**16 else "<u4"
        say(f"{split}: tokenizing {len(records):,} rows, once, into {place}")
        progress = Progress(len(records), label=split, unit="row", enabled=not follows())
        problems: list[str] = []
        unusable: list[RowFault] = []
        counts, seen = Counter[str](), Counter[str]()
        with atomic_directory(place) as staging, _telling(place.parent), ExitStack() as stack:
            files = {name: stack.enter_context(_File(staging / name)) for name in ("tokens", *_COLUMNS)}
            begins = {"ends": 0, "texts": 0, "places": 0}
            work = _Tokenizing(encoder, unusable_rows, dtype)
            for part in in_stretches(work, records, sizes=records.sizes, others_wait=others_wait):
                problems += part.problems
                unusable += part.unusable
                if len(problems) + len(unusable) >= MOST_FAULTS:
                    break
                for name, values in part.columns.items():
                    files[name].write((values + begins[name]).astype(_COLUMNS[name]) if name in begins else values)
                begins["ends"] += len(part.columns["tokens"])
                begins["texts"] += len(part.columns["ends"])
                begins["places"] += part.records
                counts.update(part.counts)
                seen.update(part.seen)
                progress.update(begins["places"], {})
            progress.close()
            raise_problems([*problems, *fault_lines(unusable)])
            manifest = {
                "facts": facts,
                "dtype": dtype,
                "counts": dict(counts),
                "seen": dict(seen),
                "files": {name: [file.size, file.crc] for name, file in files.items()},
            }
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _read(self, place: Path) -> TokenIds | None:
        """The ids in a folder, once all of its bytes are what they were; None where there are none. Damaged ones are removed."""
        if not place.is_dir():
            return None
        try:
            manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            counts, files = Counts(Counter(manifest["counts"]), Counter(manifest["seen"]), {}), manifest["files"]
            dtypes = {"tokens": manifest["dtype"], **_COLUMNS}
            for name in dtypes:
                size, crc = files[name]
                if _checksum(place / name) != (size, crc):
                    raise ValueError(f"{name} differs from its checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{place}: {error}; its rows are tokenized anew")
            shutil.rmtree(place)
            return None
        return TokenIds(place, dtypes, counts)


class TokenIds:
    """Ids of N rows, mapped from their files: a prompt and its answers each."""

    def __init__(self, folder: Path, dtypes: dict[str, str], counts: Counts) -> None:
        self.folder, self.dtypes = folder, dtypes
        self._open()
        lengths = {"prompt": self.columns["prompts_read"], "answer": self.columns["answers_read"]}
        self.counts = counts._replace(lengths=lengths)

    def _open(self) -> None:
        self._maps = {name: _mapped(self.folder / name) for name in self.dtypes}
        self.columns = {name: np.frombuffer(self._maps[name], dtype=dtype) for name, dtype in self.dtypes.items()}
        self._touched = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "dtypes": self.dtypes}  # a data worker maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, counts=Counts(Counter(), Counter(), {}))  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.columns["texts"])

    def prompt(self, row: int) -> list[int]:
        """Ids of a row's prompt."""
        return self._texts(row)[0][0]

    def answers(self, row: int) -> list[Encoded]:
        """A row's prompt with each of its answers."""
        (prompt, *answers), (cut_prompt, *cut_answers) = self._texts(row)
        return [Encoded(prompt, ids, cut_prompt, cut) for ids, cut in zip(answers, cut_answers, strict=True)]

    def _texts(self, row: int) -> tuple[list[list[int]], list[int]]:
        texts, ends = self.columns["texts"], self.columns["ends"]
        first, last = int(texts[row - 1]) if row else 0, int(texts[row])
        stops = ends[first:last].tolist()
        starts = [int(ends[first - 1]) if first else 0, *stops[:-1]]
        ids = self.columns["tokens"][starts[0] : stops[-1]].tolist()
        self._forget(_TOUCHED_BYTES)
        return [ids[start - starts[0] : stop - starts[0]] for start, stop in zip(starts, stops, strict=True)], self.columns["cuts"][
            first:last
        ].tolist()

    def _forget(self, touched: int) -> None:
        """Give mapped pages back now and then."""
        self._touched += touched
        if self._touched >= RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                if isinstance(mapped, mmap.mmap):
                    mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


class StoredRows(Lazy[R]):
    """Rows that are made of stored ids where they are asked for, and what a batch plan asks of all N of them.

    lengths: tokens of each (N,). answers: tokens of its longest answer. questions: digests of what each asks.
    """

    def __init__(self, ids: TokenIds, records: FileRecords[Any], make: Callable[[TokenIds, FileRecords[Any], int], R]) -> None:
        """`records`: those of the rows. `make(ids, records, row)`: a row."""
        super().__init__(partial(make, ids, records), range(len(ids)))
        self.ids, self.records = ids, records
        self.lengths, self.answers = ids.columns["lengths"], ids.columns["answers"]

    @property
    def questions(self) -> Column:
        return self.records.questions


def stored_rows(
    make: Callable[[TokenIds, FileRecords[Any], int], R],
    encoder: Encoder,
    records: FileRecords[Any],
    cache: TokenCache,
    split: str,
    unusable_rows: Literal["error", "drop"] = "error",
) -> StoredRows[R]:
    """The usable rows of these records, made of ids in `cache`."""
    ids = cache.ids(encoder, records, split, unusable_rows)
    return StoredRows(ids, records.take(ids.columns["places"]) if len(ids) < len(records) else records, make)


def lengths_of(rows: Sequence[Any]) -> Sequence[int] | NDArray[Any]:
    """Tokens of each row."""
    return rows.lengths if isinstance(rows, StoredRows) else [row.length for row in rows]


def token_cache(folder: str | None, runs_root: Path, data: str, *, dry_run: bool) -> TokenCache:
    """The cache in this folder, or beside the runs. Of a dry run: one that goes with the process."""
    return TokenCache(None if dry_run else Path(folder) if folder else runs_root / "token_cache", data)


@cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="token_cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Say in a line what the system refuses. Raises UserError."""
    try:
        yield
    except OSError as error:
        problem = f"token ids cannot be kept there: {error.strerror or error}"
        raise UserError(f"{folder}: {problem}; make room, or name another data.cache_dir") from None


class _File:
    """A file that is written from its begin to its end, with size and checksum of what was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.crc = 0

    def __enter__(self) -> _File:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._file.write(data)
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)


def _checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while part := file.read(2**20):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return size, crc


def _mapped(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
