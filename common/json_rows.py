"""Bytes of a data file -> raw rows with their place in it; knows JSON's shapes and nothing of what a row should hold.

Read alike: `{"train": [...], "val": [...], "test": [...]}`, one array of rows, JSON Lines, and objects that follow one another
over any number of lines; each of them gzipped or with a byte order mark. Nothing is skipped: what cannot be read is a problem with
row, line and column.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
SPLIT_ALIASES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
}

_BLANK = re.compile(r"[ \t\r\n]*")
_FIRST_ARRAY = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\[\s*(.?)')
_MAX_SHOWN = 40


@dataclass(frozen=True)
class RawRow:
    """One row as JSON has it: `value` may be anything; `number` counts from 1 within its split, `line` from 1 within the file.

    `place`: where it begins in the file and how long it is, in bytes, where that is known.
    """

    split: SplitName
    number: int
    line: int | None
    value: Any
    duplicates: tuple[str, ...] = ()
    place: tuple[int, int] | None = None


@dataclass
class RawRows:
    """Every row of a file in order, one line for each place that could not be read, and what else a user should know.

    `named_splits` is true when the file names its splits itself; otherwise all rows are `train`.
    """

    rows: list[RawRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    named_splits: bool = False


def readable(text: str) -> str:
    """A text with line breaks, control characters and half surrogates written as escapes; letters of any script stay."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shown(value: Any) -> str:
    """A value as an error message shows it: JSON, cut to a readable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return readable(text)


def holds_splits(value: dict[str, Any]) -> bool:
    """Whether an object has an array of rows under the name of a split."""
    return any(key.lower() in SPLIT_ALIASES and isinstance(value[key], list) for key in value)


def decode_file(data: bytes, name: str) -> tuple[str, str | None]:
    """The text of a file, gunzipped where its first bytes say gzip and without byte order mark, and why it cannot be read, if so."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            return "", f"{name}: broken gzip data: {str(error) or type(error).__name__}"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "", f"{name}: byte 0: got a UTF-16 byte order mark, expected UTF-8 text"
    if data[:4] == b"PAR1":
        return "", f"{name}: got a Parquet file, expected JSON; read it through datasets with hf:FOLDER, or convert it"
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data[:3] == b"\xef\xbb\xbf" else 0)
        return "", f"{name}: byte {offset}: got 0x{data[offset]:02x}, expected UTF-8 text"


def parse_rows(text: str, name: str) -> RawRows:
    """All rows of a data file's text. `name` begins each problem."""
    return Parser(text, name).parse()


def parse_file(data: bytes, name: str) -> RawRows:
    """All rows of a data file's bytes."""
    text, problem = decode_file(data, name)
    if problem is None and name.lower().endswith((".csv", ".tsv")) and text.lstrip()[:1] not in ("[", "{"):
        problem = f"{name}: got a CSV file, expected JSON or JSON Lines; reward_model/score.py alone reads CSV"
    return RawRows(problems=[problem]) if problem else parse_rows(text, name)


class BrokenJson(Exception):
    """What is wrong, and where in the text."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


def _words(error: json.JSONDecodeError) -> str:
    """What is wrong, said so that it can be mended where the decoder's own words do not."""
    if not error.msg.startswith("Invalid control character"):
        return error.msg
    if error.doc[error.pos] in "\r\n":
        return "a line break inside a text (is its closing quote missing?)"
    return f"a raw control character inside a text, expected \\u{ord(error.doc[error.pos]):04x}"


class Parser:
    """Reads the rows of a text. `lines_before`: lines of the file before it, where the text is a part of one."""

    lines_before = 0

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.name = name
        self.out = RawRows()
        self.duplicates: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._pairs)
        self.end = len(text.rstrip())
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.duplicates.extend(sorted(key for key, count in counts.items() if count > 1))
        return result

    def parse(self) -> RawRows:
        start = self._skip(0)
        if start == len(self.text):
            self.out.problems.append(f"{self.name}: got an empty file, expected rows")
        elif self.text[start] == "[":
            self._whole(lambda: self._array(start, "train"))
        elif self._opens_splits(start):
            self._whole(lambda: self._splits(start))
        else:
            self._objects(start)
        return self.out

    # --- places ----------------------------------------------------------------------------------------------------------------

    def _skip(self, position: int) -> int:
        match = _BLANK.match(self.text, position)
        assert match is not None
        return match.end()

    def _line(self, position: int) -> int:
        return self.lines_before + bisect_right(self.line_starts, position)

    def _broken(self, error: BrokenJson, split: str, number: int) -> None:
        message = error.message
        if error.position >= self.end:
            message += "; the file ends inside this row (was it cut off?)"
        self.out.problems.append(f"{self.name}: {split} row {number}: {self._place(error.position)}: broken JSON: {message}")

    def _place(self, position: int) -> str:
        position = min(position, self.end)
        line = self._line(position)
        return f"line {line}, column {position - self.line_starts[line - self.lines_before - 1] + 1}"

    # --- values ----------------------------------------------------------------------------------------------------------------

    def _value(self, position: int) -> tuple[Any, int, tuple[str, ...]]:
        """The JSON value at a position, where it ends, and the keys that it holds twice."""
        self.duplicates = []
        try:
            value, after = self.decoder.raw_decode(self.text, position)
        except json.JSONDecodeError as error:
            raise BrokenJson(_words(error), error.pos) from None
        except RecursionError:
            raise BrokenJson("nested too deeply", position) from None
        except ValueError as error:  # an integer of more digits than Python converts
            raise BrokenJson(str(error).split(";")[0], position) from None
        return value, after, tuple(self.duplicates)

    def _add(self, split: SplitName, number: int, position: int) -> int:
        value, after, duplicates = self._value(position)
        self.out.rows.append(RawRow(split, number, self._line(position), value, duplicates))
        return after

    # --- shapes ----------------------------------------------------------------------------------------------------------------

    def _whole(self, read: Callable[[], int | None]) -> None:
        """Read a shape that is one JSON value; nothing may follow it."""
        end = read()
        if end is None:
            return
        rest = self._skip(end)
        if rest < len(self.text):
            problem = f"got {shown(self.text[rest : rest + 20])} after the end of the data, expected nothing more"
            self.out.problems.append(f"{self.name}: line {self._line(rest)}: {problem}")

    def _array(self, position: int, split: SplitName) -> int | None:
        """Rows of the array that opens at `position`; its end, or None after a problem."""
        number = 0
        position = self._skip(position + 1)
        if self.text[position : position + 1] == "]":
            return position + 1
        while True:
            number += 1
            try:
                position = self._skip(self._add(split, number, position))
            except BrokenJson as error:
                self._broken(error, split, number)
                return None
            following = self.text[position : position + 1]
            if following == "]":
                return position + 1
            if following != ",":
                self._broken(BrokenJson("expected ',' or ']' after the row", position), split, number)
                return None
            position = self._skip(position + 1)

    def _opens_splits(self, position: int) -> bool:
        """Whether the object at `position` maps names to arrays of rows, judged by its first key."""
        match = _FIRST_ARRAY.match(self.text, position)
        if match is None:
            return False
        key, first = match[1].lower(), match[2]
        return key in SPLIT_ALIASES or (first == "{" and bool(difflib.get_close_matches(key, SPLIT_ALIASES, n=1, cutoff=0.75)))

    def _splits(self, position: int) -> int | None:
        self.out.named_splits = True
        seen: dict[str, str] = {}
        position = self._skip(position + 1)
        while True:
            place = f"{self.name}: line {self._line(position)}"
            try:
                key, position, _ = self._value(position)
                if not isinstance(key, str):
                    raise BrokenJson("expected the name of a split", position)
                position = self._skip(position)
                if self.text[position : position + 1] != ":":
                    raise BrokenJson("expected ':' after the name of a split", position)
                position = self._skip(position + 1)
                split = SPLIT_ALIASES.get(key.lower())
                if split is None:
                    close = difflib.get_close_matches(key.lower(), SPLIT_ALIASES, n=1)
                    meant = f" (did you mean {close[0]}?)" if close else ""
                    self.out.problems.append(f"{place}: {shown(key)}: unknown split, expected train, val or test{meant}")
                    _, position, _ = self._value(position)
                elif split in seen:
                    self.out.problems.append(f"{place}: {shown(key)}: the {split} split is there already, as {shown(seen[split])}")
                    _, position, _ = self._value(position)
                else:
                    seen[split] = key
                    if self.text[position : position + 1] != "[":
                        value, position, _ = self._value(position)
                        self.out.problems.append(f"{place}: {shown(key)}: got {shown(value)}, expected an array of rows")
                    else:
                        end = self._array(position, split)
                        if end is None:
                            return None
                        position = end
                position = self._skip(position)
                following = self.text[position : position + 1]
                if following == "}":
                    return position + 1
                if following != ",":
                    raise BrokenJson("expected ',' or '}' after a split", position)
                position = self._skip(position + 1)
            except BrokenJson as error:
                self.out.problems.append(f"{self.name}: {self._place(error.position)}: broken JSON: {error.message}")
                return None

    def _objects(self, position: int) -> None:
        """Values one after another, a line each or over several lines. After a broken one, go on where a line opens the next object."""
        number = 0
        while position < len(self.text):
            number += 1
            try:
                position = self._skip(self._add("train", number, position))
            except BrokenJson as error:
                position = self._after_broken(position, number, error)
        first = self.out.rows[0].value if self.out.rows else None
        if isinstance(first, dict) and holds_splits(first):
            others = ", ".join(shown(key) for key in first if key.lower() not in SPLIT_ALIASES)
            self.out.problems.append(f"{self.name}: got {others} beside splits, expected train, val and test only")
            self.out.rows = []

    def _after_broken(self, position: int, number: int, error: BrokenJson) -> int:
        """Report the broken row at `position`; where the next one opens (a line that begins with `{`), or the end of the text."""
        line_end = self.text.find("\n", position)
        opening = self.text.find("\n{", position)
        if opening >= 0 and self._skip(line_end) == opening + 1 and self.text[position:line_end].strip() != "{":
            # One row a line: its own line tells better what is wrong than the text that runs on into the next row.
            try:
                json.loads(self.text[position:line_end])
            except json.JSONDecodeError as on_line:
                error = BrokenJson(_words(on_line), position + on_line.pos)
            except (ValueError, RecursionError):
                pass  # the first error says what is wrong
        self._broken(error, "train", number)
        return len(self.text) if opening < 0 else opening + 1
