"""JSON Lines, read a stretch at a time: the rows, problems and places that `json_rows` finds, for files of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.json_rows import BrokenJson, Parser, RawRow, SplitName, holds_splits

STRETCH_BYTES = 4 * 2**20
"""Bytes of a file that are parsed at once, up to the end of the line they end in."""
MOST_BROKEN = 100_000
"""After so many broken rows the rest of a file is left unread."""
_BOM = b"\xef\xbb\xbf"


class UnreadableFile(Exception):
    """Why no row of a file counts."""


class JsonLines(Parser):
    """The rows of a file whose rows follow one another. Raises UnreadableFile at a byte that is no UTF-8, once that is reached.

    `out.problems` has a line for each row that could not be read; `split` is what the rows belong to.
    """

    def __init__(self, file: BinaryIO, name: str, split: SplitName = "train") -> None:
        super().__init__("", name)
        self.file, self.split = file, split
        self.bytes_read = 0
        self.whole = False
        """Whether the text reaches to the end of the file."""
        self._known = (0, 0)  # a position in the text, and its byte in the file
        self._extend()

    @classmethod
    def suits(cls, path: Path) -> bool:
        """Whether a file is plain text of such rows, the first of them an object, and no object of splits."""
        with path.open("rb") as file:
            head = file.read(4)
            if head[:2] in (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff") or head == b"PAR1":
                return False
            file.seek(0)
            try:
                lines = cls(file, str(path))
                start = lines._skip(0)
                if start == len(lines.text) or lines.text[start] != "{" or lines._opens_splits(start):
                    return False
                value, _, _ = lines._complete(start)
            except (UnreadableFile, BrokenJson):
                return True  # whoever reads the rows says what is wrong
            return not holds_splits(value)

    def __iter__(self) -> Iterator[RawRow]:
        position, number = 0, 0
        while True:
            position = self._skip(position)
            if position == len(self.text):
                if self.whole:
                    return
                position = self._drop(position)
                self._extend()
                continue
            number += 1
            if position >= STRETCH_BYTES:
                position = self._drop(position)
            try:
                value, after, duplicates = self._complete(position)
            except BrokenJson as error:
                position = self._past_broken(position, number, error)
                if len(self.out.problems) >= MOST_BROKEN:
                    self.out.problems.append(f"{self.name}: not read on after {MOST_BROKEN:,} broken rows")
                    return
                continue
            start = self._byte(position)
            yield RawRow(self.split, number, self._line(position), value, duplicates, (start, self._byte(after) - start))
            position = after

    def _past_broken(self, position: int, number: int, error: BrokenJson) -> int:
        """`_after_broken`, in as much of the file as that takes; nothing of what lies between the rows is kept."""
        line_end = self.text.find("\n", position)
        while not self.whole and self.text.find("\n{", position) < 0 and self._skip(line_end) == len(self.text):
            self._extend()  # what follows the row's line decides which words tell what is wrong
        after = self._after_broken(position, number, error)
        while after == len(self.text) and not self.whole:
            start = self._drop(after)
            self._extend()
            opening = self.text.find("\n{", start)
            after = start if self.text.startswith("{") and not start else opening + 1 if opening >= 0 else len(self.text)
        return after

    def _complete(self, position: int) -> tuple[Any, int, tuple[str, ...]]:
        """The value at a position, after more of the file where it goes on there.

        The text ends with a line, and no text, number or name goes over the end of one: what the end cuts off is an error there.
        """
        while True:
            try:
                return self._value(position)
            except BrokenJson as error:
                if self.whole or error.position < self.end:
                    raise
            self._extend(len(self.text) - position)  # twice as much each time: a row is not read again for each stretch of it

    def _extend(self, least: int = 0) -> None:
        """Add a stretch of the file to the text, of at least so many bytes where it has them."""
        data = self.file.read(max(STRETCH_BYTES, least)) + self.file.readline()
        if not data:
            self.whole = True
            return
        skipped = len(_BOM) if self.bytes_read == 0 and data.startswith(_BOM) else 0
        try:
            more = data[skipped:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = error.start + skipped
            raise UnreadableFile(f"{self.name}: byte {self.bytes_read + at}: got 0x{data[at]:02x}, expected UTF-8 text") from None
        if self.bytes_read == 0:
            self._known = (0, skipped)
        self.bytes_read += len(data)
        before = len(self.text)
        self.text += more
        self.end = len(self.text.rstrip())
        place = more.find("\n")
        while place >= 0:
            self.line_starts.append(before + place + 1)
            place = more.find("\n", place + 1)

    def _drop(self, position: int) -> int:
        """Forget the lines before that of a position; the position's place in what is left."""
        self._byte(position)
        line = self._line(position) - self.lines_before
        start = self.line_starts[line - 1]
        known, byte = self._known
        assert known == position
        self.text = self.text[start:]
        self.lines_before += line - 1
        self.line_starts = [place - start for place in self.line_starts[line - 1 :]]
        self.end = max(0, self.end - start)
        self._known = (position - start, byte)
        return position - start

    def _byte(self, position: int) -> int:
        """The byte of the file at which a position stands; positions are asked for in rising order."""
        known, byte = self._known
        passed = position - known if self.text.isascii() else len(self.text[known:position].encode())
        self._known = (position, byte + passed)
        return byte + passed
