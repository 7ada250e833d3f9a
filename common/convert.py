"""Convert a data file between the accepted formats: `python -m common.convert IN OUT --to FORMAT`.

Scored answers become preference pairs, too (`common/pairing.py`), and the chosen answers of pairs rows for SFT.
IN is whatever a stage reads: a file, a folder of splits, or `hf:NAME[/FOLDER][:CONFIG]`; also a file or hub data set of messages, as Open
Assistant's (`common/message_trees.py`). OUT is JSON with splits (`.json`) or JSON Lines of one split (`.jsonl`), gzipped where its name
ends in `.gz`, or a folder (`OUT/`) of JSON Lines, a file for each split. What FORMAT cannot hold is dropped and said; a row that would
not read back the same is an error. Nothing is written until everything fits, and then all at once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from common.command_line import Parser
from common.errors import UserError, run_main
from common.json_rows import SPLITS, SplitName
from common.message_trees import MessageTrees, read_message_trees
from common.pairing import Pairing, pairs_of
from common.problem_lines import RowFault, fault_lines, raise_problems
from common.records import (
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
# What rows of a kind hold enough for: scores order the answers to a question, and the better answer of a pair can be imitated.
CAN_BECOME: dict[RecordKind, tuple[RecordKind, ...]] = {
    "sft": ("sft", "prompt"),
    "score": ("score", "pair", "sft", "prompt"),
    "pair": ("pair", "sft", "prompt"),
    "prompt": ("prompt",),
}
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


class _Source(NamedTuple):
    """What was read: records by split, of which pairs may still have to be made."""

    records: dict[SplitName, Sequence[Record]]
    makes_pairs: bool
    notes: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Read, convert and write; prints what was written and what was dropped."""
    options = _parser().parse_args(argv)
    destination = Path(options.destination)
    in_folder = options.destination.endswith("/") or destination.is_dir()
    if not in_folder:
        _check_destination(destination, options.force)
    form = TARGETS[options.to]
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    source = _read(options, form, broken)
    pairing = _pairing(options, source.makes_pairs)
    chosen: list[SplitName] = [options.split] if options.split else list(source.records)
    if missing := [name for name in chosen if name not in source.records]:
        raise UserError(f"{options.source}: {missing[0]}: got no rows, expected some; there are {', '.join(source.records)}")
    if not chosen:
        raise UserError(f"{options.source}: got no rows that can be {form.name}, expected some")
    files = {destination: chosen} if not in_folder else {destination / f"{name}.jsonl": [name] for name in chosen}
    if in_folder:
        for file in files:
            _check_destination(file, options.force, in_folder=True)
    elif _is_lines(destination) and len(chosen) > 1:
        raise UserError(
            f"{destination}: JSON Lines hold one split, got {', '.join(chosen)}; choose one with --split, or write .json or a folder (OUT/)"
        )
    records = {name: source.records[name] for name in chosen}
    if source.makes_pairs:
        scored = cast("dict[SplitName, Sequence[ScoreRecord]]", records)
        records = {name: pairs_of(part, pairing, dropped, left_out) for name, part in scored.items()}
        if not any(records.values()):
            why = ", ".join(f"{what} ({count:,})" for what, count in left_out.items())
            raise UserError(f"{options.source}: no question gives a pair: {why}")
        count = sum(len(pair.rejected) for part in records.values() for pair in part if isinstance(pair, PairRecord))
        print(f"{_count(count, 'pair')} of chosen and rejected answers from {_count(dropped['score'], 'question')} with a pair")
    rows = {name: convert(records[name], form, dropped) for name in chosen}
    if not options.validate:
        if in_folder:
            _make_folder(destination)
        for file, names in files.items():
            _write(file, {name: rows[name] for name in names})
    for note in source.notes:
        print(note)
    for what, count in sorted(dropped.items()):
        print(f"dropped, since {form.name} cannot hold it: {what} ({_count(count, 'question' if source.makes_pairs else 'row')})")
    for what, count in left_out.items():
        print(f"left out: {_count(count, 'question')} with {what}")
    for what, count in broken.items():
        print(f"left out: {what} ({count:,})")
    counts = ", ".join(f"{name} {len(rows[name])}" for name in chosen)
    print(f"{'valid, and not written: ' if options.validate else ''}{destination}: {counts} rows as {form.name}")
    return 0


def _read(options: argparse.Namespace, form: RowFormat, broken: Counter[str]) -> _Source:
    """The rows of IN, or its messages, as records that `form` can hold; `broken` counts messages without their beginning.

    Raises UserError where they hold too little.
    """
    trees = read_message_trees(options.source, options.lang, broken)
    if trees is not None:
        if form.kind == "score":
            raise UserError(f"{options.source}: got messages, whose ranks order the answers to one message alone; expected another format")
        found = {name: _of_messages(tree, form.kind) for name, tree in trees.items()}
        return _Source({name: part for name, part in found.items() if part}, makes_pairs=form.kind == "pair")
    if options.lang is not None:
        raise UserError(f"--lang: got {options.lang}, but the rows of {options.source} are no messages with a lang; leave it out")
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
        unusable_rows=options.unusable_rows,
        drop_setting="--unusable_rows drop",
    )
    records = {name: splits.split(name) for name in SPLITS if splits.split(name)}
    return _Source(records, makes_pairs=kind == "score" and form.kind == "pair", notes=splits.notes)


def _of_messages(tree: MessageTrees, kind: RecordKind) -> list[Record]:
    """What the conversations hold of one kind; for pairs every ranked answer."""
    assert kind in ("sft", "pair", "prompt"), kind
    return list(tree.best_answers() if kind == "sft" else tree.answers() if kind == "pair" else tree.prompts())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _pairing(options: argparse.Namespace, makes_pairs: bool) -> Pairing:
    """Which pairs are asked for. Raises UserError where a setting of theirs has no effect."""
    if options.min_gap is not None and not (options.min_gap >= 0 and math.isfinite(options.min_gap)):
        raise UserError(f"--min_gap: got {options.min_gap:g}, expected a number of at least 0")
    given = {"--pairs": options.pairs, "--min_gap": options.min_gap, "--margin": options.margin or None}
    idle = [name for name, value in given.items() if value is not None]
    if idle and not makes_pairs:
        raise UserError(
            f"{', '.join(idle)}: no effect here, it belongs to making pairs of scored answers (rows with a Score to a pair format)"
        )
    return Pairing(options.pairs or "best", options.min_gap or 0.0, options.margin)


def convert(records: Sequence[Record], form: RowFormat, dropped: Counter[str]) -> list[dict[str, Any]]:
    """Records as rows of a format; `dropped` counts what that format has no place for.

    Raises UserError, a line per row, where a row lacks what the format needs or would not read back the same.
    """
    rows: list[dict[str, Any]] = []
    faults: list[RowFault] = []
    for record in records:
        try:
            for part in _fitting(record, form, dropped):
                rows.append(_row(part, form))
        except UserError as error:
            faults.extend(RowFault.at(record.where, problem) for problem in error.problems)
    raise_problems(fault_lines(faults))
    return rows


def _fitting(record: Record, form: RowFormat, dropped: Counter[str]) -> Iterator[Record]:
    """The record without what the format cannot hold, as a record of the format's kind (several, where it holds one rejected answer)."""
    prompt, columns, where = record.prompt, record.columns, record.where
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
    """The row that reads back as this record. Raises UserError, without the row's place, where there is none."""
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
            row[form.chosen] = prompt.context + render_transcript(prompt, record.chosen)
            row[form.rejected] = prompt.context + render_transcript(prompt, record.rejected[0])
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
        raise UserError(f"cannot be written as {form.name} so that it reads back the same: {reason}")
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror or error}") from None


def _check_destination(destination: Path, force: bool, *, in_folder: bool = False) -> None:
    """Raise UserError where a file of this name cannot be written, or is there already; `in_folder`: its folder may be made."""
    if not destination.name.endswith(ENDINGS):
        raise UserError(f"{destination}: got this name, expected one that ends in {', '.join(ENDINGS)}, or a folder (OUT/)")
    if destination.is_dir():
        raise UserError(f"{destination}: got a folder, expected a file's name")
    if destination.exists() and not force:
        raise UserError(f"{destination}: is there already; --force replaces it")
    if not in_folder and not destination.absolute().parent.is_dir():
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


def _names(kinds: Sequence[RecordKind]) -> list[str]:
    return [name for kind in kinds for name, form in TARGETS.items() if form.kind == kind]


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<17} {', '.join(form.required)}" for name, form in TARGETS.items())
    directions = "\n".join(f"  {', '.join(_names([kind]))} -> {', '.join(_names(CAN_BECOME[kind]))}" for kind in CAN_BECOME)
    parser = Parser(
        prog="python -m common.convert",
        description="Convert a data file between the accepted formats.",
        epilog="formats and their keys (context goes with every question, in hh before the first turn; margin with every pair):\n"
        f"{listed}\n\n"
        f"what can be made of what:\n{directions}\n"
        "of scores, pairs are made question by question; of pairs, the chosen answer is imitated by SFT",
    )
    parser.add_argument("source", metavar="IN", help="file, folder of splits, or hf:NAME[/FOLDER][:CONFIG]; its format is recognised")
    parser.add_argument(
        "destination", metavar="OUT", help=".json (splits) or .jsonl (one split), either with .gz; a folder (OUT/): a .jsonl for each split"
    )
    parser.add_argument("--to", required=True, choices=list(TARGETS), metavar="FORMAT", help=", ".join(TARGETS))
    parser.add_argument("--split", choices=SPLITS, help="only this split; default: all of them")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="rename columns of IN")
    parser.add_argument(
        "--unusable_rows",
        choices=("error", "drop"),
        default="error",
        help="refuse rows with empty texts or chosen equal to rejected (default), or drop and count them",
    )
    parser.add_argument(
        "--pairs",
        choices=("best", "all"),
        help="scores to pairs: the best answer of a question against each worse one (default), or every answer against each worse one",
    )
    parser.add_argument("--min_gap", type=float, metavar="G", help="scores to pairs: the least difference of scores; default: any")
    parser.add_argument(
        "--margin",
        action="store_true",
        help="scores to pairs: write the difference as margin, by which the loss then wants the answers' scores to differ (default: none)",
    )
    parser.add_argument("--lang", metavar="LANG", help="messages (Open Assistant's) to rows: only those in this language, en say")
    parser.add_argument("--validate", action="store_true", help="read and convert everything, report, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    return parser


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    run_main(main)
