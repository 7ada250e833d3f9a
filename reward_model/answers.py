"""The answers of a file that is to be scored: rows of any data format, or a CSV of questions and answers as `test_sft.py` writes it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.json_rows import readable
from common.problem_lines import RowFault, fault_lines, raise_problems
from common.records import PairRecord, Prompt, ScoreRecord, SFTRecord, read_splits, source_kind
from common.row_formats import RowFormat
from common.row_parser import UNFIT, read_row

DROP_ROWS = "--unusable_rows drop"
QUESTION_COLUMNS = ("question",)
ANSWER_COLUMNS = ("generated_answer", "answer")
"""Columns of a CSV, the first of them that is there, in letters of either case."""
AnsweredRecord = PairRecord | ScoreRecord | SFTRecord
# Prompt, and the columns that the output has beside the score.
Answer = tuple[Prompt, dict[str, object]]


def read_any(path: str, unusable_rows: Literal["error", "drop"] = "error") -> list[AnsweredRecord]:
    """All rows of all splits, in whichever format they are. Raises UserError where they hold no answers, or where rows are bad."""
    records: list[AnsweredRecord]
    if path.lower().endswith(".csv"):
        records, notes = read_csv(path, unusable_rows)
    else:
        kind = source_kind(path)
        # Questions alone: reading them for SFT says what they lack.
        splits = read_splits(
            path,
            "sft" if kind == "prompt" else kind,
            validation_split_percentage=0.0,
            require=(),
            unusable_rows=unusable_rows,
            drop_setting=DROP_ROWS,
        )
        records, notes = [*splits.train, *splits.val, *splits.test], list(splits.notes)
    for note in notes:
        print(f"note: {note}")
    if not records:
        raise UserError(f"{path}: no rows to score")
    return records


def read_csv(path: str, unusable_rows: Literal["error", "drop"] = "error") -> tuple[list[AnsweredRecord], list[str]]:
    """The rows of a CSV with a header, and notes on them. Raises UserError where it lacks the columns, or for rows with empty texts."""
    csv.field_size_limit(2**31 - 1)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV in UTF-8: {error}") from None
    question, answer = (_column(header, names) for names in (QUESTION_COLUMNS, ANSWER_COLUMNS))
    if question is None or answer is None:
        got = ", ".join(map(readable, header)) or "none"
        raise UserError(f"{path}: got the columns {got}; expected {QUESTION_COLUMNS[0]} and {' or '.join(ANSWER_COLUMNS)}")
    form = RowFormat("csv", "sft", question, answer=answer)
    records: list[AnsweredRecord] = []
    faults: list[RowFault] = []
    unusable: list[RowFault] = []
    mended = 0
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        if None in row:  # what DictReader calls the cells beyond the header's
            cells = len(row) - 1 + len(row[None])
            faults.append(RowFault.at(where, f"got {cells} cells, expected {len(header)} (a text that holds a comma stands in quotes)"))
            continue
        record, problems = read_row(form, "sft", {key: row[key] for key in (question, answer)}, where)
        if isinstance(record, SFTRecord):
            records.append(record)
        mended += bool(problems.mended)
        faults += [RowFault.at(where, problem) for problem in problems.errors]
        unusable += [RowFault.at(where, f"{problem} ({DROP_ROWS} leaves such rows out)") for problem in problems.unusable]
    raise_problems(fault_lines([*faults, *(unusable if unusable_rows == "error" else [])]))
    notes = [f"{path}: what is scored is the column {answer}"]
    if len(records) < len(rows):
        notes.append(f"{path}: {len(rows) - len(records)} of {len(rows)} rows dropped as unusable")
    if mended:
        notes.append(f"{path}: {mended} of {len(rows)} rows held {UNFIT}, read as U+FFFD")
    return records, notes


def _column(header: list[str], names: tuple[str, ...]) -> str | None:
    by_lower = {column.strip().lower(): column for column in reversed(header)}
    return next((by_lower[name] for name in names if name in by_lower), None)


def answers_of(record: AnsweredRecord) -> list[Answer]:
    """Every answer of a record."""
    if isinstance(record, PairRecord):
        texts = [("chosen", record.chosen), *(("rejected", answer) for answer in record.rejected)]
    else:
        texts = [("answer", record.answer)]
    target = record.score if isinstance(record, ScoreRecord) else None
    common = {"row": record.where, "question": record.prompt.question, "target_score": target}
    return [(record.prompt, {**common, "role": role, "answer": text}) for role, text in texts]
