"""Data files -> validated records in splits: the one door through which data enters a stage.

`read_splits` reads a file, a folder of files named by split, or `hf:NAME[/FOLDER][:CONFIG]`, checks every row, and reports all
problems at once as `FILE: train row 3 (line 12): key: got, expected`, one line for all rows with the same problem. The formats are
listed in `common/row_formats.py`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from common.errors import UserError
from common.json_rows import SPLIT_ALIASES, SPLITS, RawRow, RawRows, SplitName, parse_file, readable
from common.json_stream import JsonLines, UnreadableFile
from common.problem_lines import RowFault, fault_lines, raise_problems
from common.record_types import (
    PairRecord,
    Prompt,
    PromptRecord,
    Record,
    RecordKind,
    ScoreRecord,
    SFTRecord,
    normalise_question,
    question_key,
)
from common.row_formats import CONTEXT, KNOWN_KEYS, MARGIN, SUITS, RowFormat, RowReader, read_alike
from common.row_parser import UNFIT, got, read_row
from common.schema import RowSettings
from common.splits import Splits, fingerprint, hold_out, overlap_notes

__all__ = [
    "PairRecord",
    "Prompt",
    "PromptRecord",
    "Record",
    "RecordKind",
    "SFTRecord",
    "ScoreRecord",
    "Splits",
    "load_hub",
    "normalise_question",
    "question_key",
    "read_rows",
    "read_splits",
    "source_kind",
]

DROP_ROWS = "unusable_rows: drop"
STREAMED_BYTES = 64 * 2**20
"""JSON Lines of a larger file stay in the file: a row is read where it is needed."""
MOST_FAULTS = 100_000
"""After so many faults in its rows the rest of such a file is left unread."""
DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".ndjson")


def read_splits(
    path: str,
    kind: RecordKind,
    *,
    columns: Mapping[str, str] | None = None,
    validation_file: str | None = None,
    validation_split_percentage: float = 5.0,
    seed: int = 42,
    require: Sequence[SplitName] = ("train",),
    unusable_rows: Literal["error", "drop"] = "error",
    drop_setting: str = DROP_ROWS,
    setting: str = "",
) -> Splits[Any]:
    """Read, check and split a data file.

    Args:
        path: a file, a folder with files named train, val and test, or `hf:NAME[/FOLDER][:CONFIG]`.
        kind: what the stage needs; richer rows serve as poorer ones (pairs as prompts, say).
        columns: our key to the file's key.
        validation_file: its rows (its `val` split, where it has splits) become the validation split.
        validation_split_percentage: share (per cent) of the train questions that become `val` where the data has none, at least one
            question; all rows of a question stay on one side, and the choice depends on the seed and the questions alone. 0: no `val`.
        require: splits that must have rows.
        unusable_rows: what to do with a row whose types are right but that nothing can be learnt from (empty question or answer,
            chosen equal to rejected, a dialogue that does not fit): refuse it, or drop it and count it in the notes.
        drop_setting: how the user asks for the latter, for the error message.
        setting: the config's key that named `path` (`data.data_dir`), where one did, for the error message.

    Raises:
        UserError: one line per problem, 20 at most and then their count; faults of single rows before rows of another shape.
    """
    columns = dict(columns or {})
    section = setting.rpartition(".")[0]
    _check_columns(columns, section)
    reading = _Reading(kind, columns, unusable_rows == "drop", drop_setting, seed)
    rows, named = reading.read_path(path, setting)
    if validation_file is not None:
        others, others_named = reading.read_path(validation_file, _in_section(section, "validation_file"))
        chosen = others["val"] or ([] if others_named else others["train"])
        if not chosen and not reading.all_problems():
            reading.problems.append(f"{validation_file}: validation_file: got no rows of a val split, expected some")
        if rows["val"]:
            reading.notes.append(f"{validation_file} takes the place of the {len(rows['val'])} val rows of {path}")
        rows["val"] = chosen
    reading.finish()
    if not rows["val"] and validation_file is None and (validation_split_percentage > 0):
        rows["train"], rows["val"], note = hold_out(rows["train"], validation_split_percentage, seed, path)
        reading.notes.extend(note)
    _check_required(path, rows, named, require)
    reading.notes.extend(overlap_notes(path, rows, seed))
    return Splits(rows["train"], rows["val"], rows["test"], fingerprint(rows), tuple(reading.notes))


def read_rows(
    path: str, kind: RecordKind, settings: RowSettings, *, seed: int, require: Sequence[SplitName], setting: str = "data.data_dir"
) -> Splits[Any]:
    """`read_splits` with the values of a config section, whose key `setting` is the path."""
    return read_splits(
        path,
        kind,
        columns=settings.columns,
        validation_file=settings.validation_file,
        validation_split_percentage=settings.validation_split_percentage,
        seed=seed,
        require=require,
        unusable_rows=settings.unusable_rows,
        setting=setting,
    )


def _check_required(path: str, rows: Mapping[SplitName, Sequence[Any]], named: bool, require: Sequence[SplitName]) -> None:
    problems = []
    for split in require:
        if not rows[split]:
            there = ", ".join(f"{name} {len(rows[name])}" for name in SPLITS if rows[name]) or "none at all"
            hint = "" if named or split == "train" else " (a file without named splits is all train)"
            problems.append(f"{path}: {split}: got no rows, expected some; rows there are: {there}{hint}")
    if problems:
        raise UserError(*problems)


def source_kind(path: str, columns: Mapping[str, str] | None = None, setting: str = "") -> RecordKind:
    """What all rows of a file hold at most. Raises UserError where they are in no known format; other faults are left to `read_splits`."""
    _check_columns(columns or {}, setting.rpartition(".")[0])
    reading = _Reading("prompt", dict(columns or {}), drop=True)
    reading.read_path(path, setting)
    if not reading.forms:
        raise_problems(reading.all_problems() or [f"{path}: got no rows, expected some"])
    return min(reading.forms, key=lambda form: len(form.required)).kind


# --- files -------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """Collects the records, problems and notes of one or two sources."""

    kind: RecordKind
    columns: dict[str, str]
    drop: bool
    drop_setting: str = DROP_ROWS
    seed: int = 0
    problems: list[str] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)
    shape_faults: list[RowFault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forms: list[RowFormat] = field(default_factory=list)

    def read_path(self, path: str, setting: str = "") -> tuple[dict[SplitName, Sequence[Any]], bool]:
        """The records of a file, folder or hub data set (which `setting` names) by split, and whether the source names its splits."""
        rows: dict[SplitName, Sequence[Any]] = {name: [] for name in SPLITS}
        named = False
        if path.startswith("hf:"):
            try:
                self._collect(load_hub(path), path, rows)
            except UserError as error:
                raise UserError(*(f"{setting}: {problem}" if setting else problem for problem in error.problems)) from None
            return rows, True
        file = Path(path)
        if not file.exists():
            siblings = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
            close = difflib.get_close_matches(file.name, siblings, n=1)
            meant = f" (did you mean {file.parent / close[0]}?)" if close else ""
            self.problems.append(f"{setting}: no such file {path}{meant}" if setting else f"{path}: no such file{meant}")
            return rows, False
        if not file.is_dir():
            if self._streams(file):
                rows["train"] = self._stream(file, path, "train")
                return rows, False
            raw = self._parse(file)
            self._collect(raw, path, rows)
            return rows, raw.named_splits
        for split, part in self._folder(file):
            if self._streams(part):
                rows[split or "train"] = self._stream(part, str(part), split or "train")
                named = split is not None
                continue
            raw = self._parse(part)
            if split is None:
                named = raw.named_splits
            elif raw.named_splits:
                self.problems.append(f"{part}: got a file with splits of its own in a folder of splits, expected rows")
                continue
            else:
                raw.rows = [RawRow(split, row.number, row.line, row.value, row.duplicates) for row in raw.rows]
                named = True
            self._collect(raw, str(part), rows)
        return rows, named

    def _parse(self, file: Path) -> RawRows:
        try:
            return parse_file(file.read_bytes(), str(file))
        except OSError as error:
            return RawRows(problems=[f"{file}: cannot be read: {error.strerror or error}"])

    def _folder(self, folder: Path) -> list[tuple[SplitName | None, Path]]:
        """The data files of a folder with their splits; a single file of another name is read as it is (split None)."""
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in DATA_SUFFIXES)
        by_split: dict[SplitName, Path] = {}
        others = []
        for file in files:
            split = SPLIT_ALIASES.get(Path(file.name.removesuffix(".gz")).stem.lower())
            if split is None:
                others.append(file)
            elif split in by_split:
                self.problems.append(f"{file}: a second file for the {split} split beside {by_split[split].name}, expected one")
            else:
                by_split[split] = file
        if not by_split and len(others) == 1:
            return [(None, others[0])]
        if not by_split:
            there = ", ".join(file.name for file in others[:5]) or "no data file"
            self.problems.append(f"{folder}: got {there}, expected a folder with train.json, val.json, test.json (or .jsonl, .gz)")
        elif others:
            self.notes.append(f"{folder}: not read, since not named by a split: {', '.join(file.name for file in others)}")
        return [(split, by_split[split]) for split in SPLITS if split in by_split]

    def _streams(self, file: Path) -> bool:
        """Whether the rows of a file are read one by one and stay there."""
        try:
            return file.stat().st_size > STREAMED_BYTES and hasattr(os, "pread") and JsonLines.suits(file)
        except OSError:
            return False  # whoever reads the file says what is wrong

    def _stream(self, file: Path, name: str, split: SplitName) -> Sequence[Any]:
        """The records of a file of JSON Lines, checked as `_collect` does."""
        from common.file_records import RecordFile

        before = len(self.faults), len(self.shape_faults)
        source: RecordFile[Any] = RecordFile(file, name, split, self.kind, RowReader(self.kind, self.columns), self.seed)
        try:
            with source.opened() as opened:
                lines = JsonLines(opened, name, split)
                for row, record in self._records(self._up_to_many_faults(lines, name), lines.out, name):
                    source.add(row, record)
        except (UnreadableFile, OSError) as error:
            del self.faults[before[0] :], self.shape_faults[before[1] :]
            self.problems.append(str(error) if isinstance(error, UnreadableFile) else f"{name}: cannot be read: {error.strerror or error}")
            return []
        return source.records()

    def _up_to_many_faults(self, lines: JsonLines, name: str) -> Iterator[RawRow]:
        before = len(self.faults) + len(self.shape_faults)
        for row in lines:
            yield row
            if len(self.faults) + len(self.shape_faults) - before >= MOST_FAULTS:
                lines.out.problems.append(f"{name}: not read on after {MOST_FAULTS:,} faults")
                return

    # --- rows ------------------------------------------------------------------------------------------------------------------

    def _collect(self, raw: RawRows, name: str, rows: dict[SplitName, Sequence[Any]]) -> None:
        """Check the raw rows of one source and append their records to `rows`."""
        for row, record in self._records(raw.rows, raw, name):
            rows[row.split].append(record)  # type: ignore[attr-defined]  # no file of its own, so a list

    def _records(self, raw_rows: Iterable[RawRow], raw: RawRows, name: str) -> Iterator[tuple[RawRow, Any]]:
        """The raw rows of one source with their records; what is wrong with others is kept. `raw`: what else is known of the source."""
        reader = RowReader(self.kind, self.columns)
        first: tuple[RowFormat, str] | None = None
        forms: list[RowFormat] = []
        count = dropped = mended = 0
        first_dropped = first_mended = ""
        checked: dict[tuple[str, ...], tuple[RowFormat | None, list[str]]] = {}
        for row in raw_rows:
            count += 1
            fault = partial(_fault, name, row)
            if not isinstance(row.value, dict):
                self.shape_faults.append(fault(f"got {got(row.value)}, expected an object with keys"))
                continue
            if row.duplicates:
                self.faults.extend(fault(f"{readable(key)}: got this key twice, expected it once") for key in row.duplicates)
                continue
            value = reader.renamed(row.value)
            keys = tuple(row.value)
            if keys not in checked:  # rows mostly have the same keys
                checked[keys] = reader.check_keys(row.value, value)
            form, key_problems = checked[keys]
            if key_problems:
                self.shape_faults.extend(map(fault, key_problems))
                continue
            assert form is not None
            first = first or (form, f"{row.split} row {row.number}")
            if not read_alike(form, first[0], self.kind):
                seen, expected = ("/".join(each.required) for each in (form, first[0]))
                text = f"keys: got {seen}, expected {expected} as in {first[1]}: one file holds rows of one shape"
                self.shape_faults.append(fault(text))
                continue
            if form not in forms:
                forms.append(form)
            record, problems = read_row(form, self.kind, value, f"{name}: {row.split} row {row.number}")
            self.faults.extend(map(fault, problems.errors))
            if problems.mended:
                mended += 1
                first_mended = first_mended or f"{row.split} row {row.number}: {', '.join(map(readable, dict.fromkeys(problems.mended)))}"
            if record is not None:
                yield row, record
            elif not problems.errors:
                if self.drop:
                    dropped += 1
                    first_dropped = first_dropped or fault_lines([fault(problems.unusable[0])])[0]
                else:
                    self.faults.extend(fault(f"{problem} ({self.drop_setting} leaves such rows out)") for problem in problems.unusable)
        self.problems.extend(raw.problems)
        self.notes.extend(raw.notes)
        self.forms += forms
        if count:
            seen_keys = {key for keys in checked for key in keys}
            for ours in (CONTEXT, *MARGIN):
                if ours in self.columns and self.columns[ours] not in seen_keys:
                    self.problems.append(f"{name}: {self.columns[ours]}: in no row, expected as columns.{ours} says")
        if dropped:
            self.notes.append(f"{name}: {dropped} of {count} rows dropped as unusable, the first being {first_dropped}")
        if mended:
            self.notes.append(f"{name}: {mended} of {count} rows held {UNFIT}, read as U+FFFD, the first being {first_mended}")
        scored = next((form for form in forms if form.kind == "score"), None)
        if scored is not None and self.kind == "sft":
            beside = "some rows hold" if len(forms) > 1 else "rows hold"
            self.notes.append(f"{name}: {beside} a {scored.score} ({SUITS['score']} learns from it); SFT imitates every answer alike")

    def all_problems(self) -> list[str]:
        """Files that cannot be read, faults of single rows, rows of another shape."""
        return [*self.problems, *fault_lines(self.faults), *fault_lines(self.shape_faults)]

    def finish(self) -> None:
        """Raise what was found."""
        raise_problems(self.all_problems())


def _fault(name: str, row: RawRow, problem: str) -> RowFault:
    return RowFault(f"{name}: {row.split}", row.number, problem, row.line)


def _in_section(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _check_columns(columns: Mapping[str, str], section: str = "") -> None:
    problems = []
    for ours, theirs in columns.items():
        if ours not in KNOWN_KEYS:
            close = difflib.get_close_matches(ours, KNOWN_KEYS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            if theirs in KNOWN_KEYS:
                meant = f" (our name stands first, the file's second: {{{theirs}: {readable(ours)}}})"
            problems.append(f"{_in_section(section, 'columns')}.{ours}: unknown name, expected one of {', '.join(KNOWN_KEYS)}{meant}")
    if problems:
        raise UserError(*problems)


def load_hub(path: str) -> RawRows:
    """A data set through `datasets`; missing values (None) of optional keys count as absent."""
    name, _, config = path.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"{path}: got no name, expected hf:NAME, hf:OWNER/NAME/FOLDER or hf:NAME:CONFIG")
    folder = ""
    if not Path(name).expanduser().is_dir():
        owner_and_name = "/".join(name.split("/")[:2])
        name, folder = owner_and_name, name.removeprefix(owner_and_name).strip("/")
    load = _datasets_loader()
    try:
        loaded = load(name, config or None, folder or None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever datasets, the hub client or the network raise: the user's line is the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "without network only local folders and what lies in HF_HOME's cache can be loaded"
        raise UserError(f"{path}: cannot be loaded: {reason} ({where})") from None
    out = RawRows(named_splits=True)
    others = []
    for split_name, rows in loaded.items():
        split = SPLIT_ALIASES.get(str(split_name).lower())
        if split is None:
            others.append(str(split_name))
            continue
        out.rows.extend(RawRow(split, number, None, {k: v for k, v in row.items() if v is not None}) for number, row in enumerate(rows, 1))
    if others:
        out.notes.append(f"{path}: not read, since not named train, val or test: {', '.join(others)}")
    if not out.rows:
        listed = ", ".join(map(str, loaded)) or "none"
        raise UserError(f"{path}: got splits {listed}, expected train, val (or validation) and test with rows")
    return out


def _datasets_loader() -> Callable[[str, str | None, str | None], Mapping[str, Any]]:
    """`load(name, config, data_dir)`."""
    from datasets import load_dataset_builder

    def load(name: str, config: str | None, data_dir: str | None) -> Mapping[str, Any]:
        builder = load_dataset_builder(name, config, data_dir=data_dir)
        _check_files_of(name, [str(file) for files in (builder.config.data_files or {}).values() for file in files])
        builder.download_and_prepare()
        return cast("Mapping[str, Any]", builder.as_dataset())

    return load


def _check_files_of(name: str, files: Sequence[str]) -> None:
    """Refuse a data set with files from elsewhere: its card names them, and could name any file of this machine."""
    folder = Path(name).expanduser()
    inside = tuple(f"{place(folder)}{os.sep}" for place in (os.path.abspath, os.path.realpath)) if folder.is_dir() else "hf://"
    outside = next((file for file in files if not (file if "://" in file else os.path.abspath(file)).startswith(inside)), None)
    if outside is not None:
        raise UserError(f"names the file {outside}, which is not part of the data set; give that file itself, if it is meant")
