"""Convert a data file between the accepted formats: `python -m common.convert IN OUT --to FORMAT`.

IN is whatever a stage reads: a file, a folder of splits, or `hf:NAME[:config]`. OUT is JSON with splits (`.json`) or JSON Lines of one
split (`.jsonl`), gzipped where its name ends in `.gz`. What FORMAT cannot hold is dropped and said; a row that would not read back
the same is an error. Nothing is written until everything fits, and then all at once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.command_line import Parser
from common.errors import UserError, run_main
from common.json_rows import SPLITS, SplitName
from common.records import (
    MAX_PROBLEMS,
    PairRecord,
    Prompt,
    PromptRecord,
    Record,
    RecordKind,
    ScoreRecord,
    SFTRecord,
    read_splits,
    source_kind,
)
from common.row_formats import CONTEXT, FORMATS, KNOWN_KEYS, SUITS, RowFormat
from common.row_parser import read_row
from common.transcripts import render_transcript

TARGETS: dict[str, RowFormat] = {form.name: form for form in FORMATS if not form.name.endswith("_only")}
# What rows of a kind hold enough for; the better answer of a pair can be imitated.
CAN_BECOME: dict[RecordKind, tuple[RecordKind, ...]] = {
    "sft": ("sft", "prompt"),
    "score": ("score", "sft", "prompt"),
    "pair": ("pair", "sft", "prompt"),
    "prompt": ("prompt",),
}
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def main(argv: Sequence[str]) -> int:
    """Read, convert and write; prints what was written and what was dropped."""
    options = _parser().parse_args(argv)
    destination = Path(options.destination)
    _check_destination(destination, options.force)
    form = TARGETS[options.to]
    columns = dict(_renaming(text) for text in options.columns)
    kind = source_kind(options.source, columns)
    if form.kind not in CAN_BECOME[kind]:
        fitting = ", ".join(name for name, target in TARGETS.items() if target.kind in CAN_BECOME[kind])
        raise UserError(
            f"{options.source}: got rows that suit {SUITS[kind]}, which hold too little for {form.name}; expected one of {fitting}"
        )
    splits = read_splits(
        options.source,
        kind,
        columns=columns,
        validation_split_percentage=0.0,
        require=(options.split,) if options.split else (),
        unusable_rows="drop" if options.drop_unusable else "error",
    )
    chosen: list[SplitName] = [options.split] if options.split else [name for name in SPLITS if splits.split(name)]
    if _is_lines(destination) and len(chosen) > 1:
        raise UserError(f"{destination}: JSON Lines hold one split, got {', '.join(chosen)}; choose one with --split, or write .json")
    dropped: Counter[str] = Counter()
    rows = {name: convert(splits.split(name), form, dropped) for name in chosen}
    _write(destination, rows)
    for note in splits.notes:
        print(note)
    for what, count in sorted(dropped.items()):
        print(f"dropped, since {form.name} cannot hold it: {what} ({count} rows)")
    print(f"{destination}: " + ", ".join(f"{name} {len(rows[name])}" for name in chosen) + f" rows as {form.name}")
    return 0


def convert(records: Sequence[Record], form: RowFormat, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Records as rows of a format; `dropped` counts what that format has no place for.

    Raises UserError, a line per row, where a row lacks what the format needs or would not read back the same.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for record in records:
        try:
            for part in _fitting(record, form, dropped):
                rows.append(_row(part, form))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise UserError(*problems[:MAX_PROBLEMS], *([f"... and {more} more problems"] if more > 0 else []))
    return rows


def _fitting(record: Record, form: RowFormat, dropped: Counter[str]) -> Iterator[Record]:
    """The record without what the format cannot hold, as a record of the format's kind (several, where it holds one rejected answer)."""
    prompt, columns, where = record.prompt, record.columns, record.where
    if prompt.context and CONTEXT not in form.optional:
        dropped[CONTEXT] += 1
        prompt = replace(prompt, context="")
    clashing = [key for key in columns if key in KNOWN_KEYS]
    if clashing:
        dropped.update(clashing)
        columns = {key: value for key, value in columns.items() if key not in clashing}
    if form.kind == "prompt":
        dropped.update(_answer_parts(record))
        yield PromptRecord(prompt, columns, where)
    elif form.kind == "sft" and isinstance(record, PairRecord):
        dropped.update(["rejected answers", *(["margin"] if record.margin is not None else [])])
        yield SFTRecord(prompt, record.chosen, columns, where)
    elif form.kind == "sft" and isinstance(record, SFTRecord | ScoreRecord):
        dropped.update(["score"] if isinstance(record, ScoreRecord) else [])
        yield SFTRecord(prompt, record.answer, columns, where)
    elif form.kind == "score" and isinstance(record, ScoreRecord):
        yield replace(record, prompt=prompt, columns=columns)
    elif form.kind == "pair" and isinstance(record, PairRecord):
        groups = [record.rejected] if form.name != "hh" else [(rejected,) for rejected in record.rejected]
        for rejected in groups:
            yield replace(record, prompt=prompt, columns=columns, rejected=rejected)
    else:
        raise AssertionError(f"{type(record).__name__} cannot become {form.name}; main refuses it before")


def _answer_parts(record: Record) -> list[str]:
    if isinstance(record, PairRecord):
        return ["chosen and rejected answers", *(["margin"] if record.margin is not None else [])]
    if isinstance(record, ScoreRecord):
        return ["answer", "score"]
    return ["answer"] if isinstance(record, SFTRecord) else []


def _row(record: Record, form: RowFormat) -> dict[str, Any]:
    """The row that reads back as this record."""
    row: dict[str, Any] = {}
    prompt = record.prompt
    is_dialogue = bool(prompt.history)
    # After a transcript's `Assistant:` the reader takes one space for a separator.
    lead = " " if is_dialogue and form.question else ""
    if form.question:
        row[form.question] = render_transcript(prompt) if is_dialogue else prompt.question
        if prompt.context or (form.name == "instruction" and not is_dialogue):
            row[CONTEXT] = prompt.context
    if isinstance(record, SFTRecord | ScoreRecord):
        assert form.answer
        row[form.answer] = lead + record.answer
    if isinstance(record, ScoreRecord):
        assert form.score
        row[form.score] = record.score
    if isinstance(record, PairRecord):
        assert form.chosen and form.rejected
        if form.question is None:
            row[form.chosen] = render_transcript(prompt, record.chosen)
            row[form.rejected] = render_transcript(prompt, record.rejected[0])
        else:
            row[form.chosen] = lead + record.chosen
            rejected = [lead + answer for answer in record.rejected]
            row[form.rejected] = rejected if len(rejected) > 1 else rejected[0]
        if record.margin is not None:
            row["margin"] = record.margin
    row |= record.columns
    back, problems = read_row(form, form.kind, row, record.where)
    if back != record:
        reason = "; ".join([*problems.errors, *problems.unusable]) or _difference(record, back)
        raise UserError(f"{record.where}: cannot be written as {form.name} so that it reads back the same: {reason}")
    return row


def _difference(record: Record, back: Record | None) -> str:
    if back is not None and back.prompt != record.prompt:
        got, expected = _turns(back.prompt), _turns(record.prompt)
        return f"its dialogue would have {got} turns, expected {expected}" if got != expected else "its question would change"
    return "its answers or columns would change"


def _turns(prompt: Prompt) -> int:
    return 2 * len(prompt.history) + 1


# --- files -------------------------------------------------------------------------------------------------------------------------


def _is_lines(destination: Path) -> bool:
    return ".jsonl" in destination.suffixes


def _check_destination(destination: Path, force: bool) -> None:
    if not destination.name.endswith(ENDINGS):
        raise UserError(f"{destination}: got this name, expected one that ends in {', '.join(ENDINGS)}")
    if destination.is_dir():
        raise UserError(f"{destination}: got a folder, expected a file's name")
    if destination.exists() and not force:
        raise UserError(f"{destination}: is there already; --force replaces it")
    if not destination.absolute().parent.is_dir():
        raise UserError(f"{destination}: its folder does not exist")


def _write(destination: Path, rows: dict[SplitName, list[dict[str, Any]]]) -> None:
    """Write beside the destination, then rename: it is whole or absent at every instant."""
    if _is_lines(destination):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for part in rows.values() for row in part)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    data = text.encode("utf-8")
    if destination.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    staging: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=destination.absolute().parent, prefix=f".{destination.name}.", delete=False) as file:
            staging = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(staging, 0o666 & ~_umask())
        os.replace(staging, destination)
    except OSError as error:
        if staging is not None:
            Path(staging).unlink(missing_ok=True)
        raise UserError(f"{destination}: cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _renaming(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not ours or not theirs:
        raise UserError(f"--columns: got {text}, expected OURS=THEIRS, Question=title say")
    return ours, theirs


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<17} {', '.join(form.required)}" for name, form in TARGETS.items())
    parser = Parser(
        prog="python -m common.convert",
        description="Convert a data file between the accepted formats.",
        epilog=f"formats and their keys (context goes with every question, margin with every pair):\n{listed}",
    )
    parser.add_argument("source", metavar="IN", help="file, folder of splits, or hf:NAME[:config]; its format is recognised")
    parser.add_argument("destination", metavar="OUT", help=".json (splits) or .jsonl (one split), either with .gz")
    parser.add_argument("--to", required=True, choices=list(TARGETS), metavar="FORMAT", help=", ".join(TARGETS))
    parser.add_argument("--split", choices=SPLITS, help="only this split; default: all of them")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="rename columns of IN")
    parser.add_argument("--drop_unusable", action="store_true", help="drop and count rows with empty texts or chosen equal to rejected")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    return parser


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    run_main(main)
