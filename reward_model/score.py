"""Score every answer of a file with a trained reward model.

Reads any format with answers (question/answer, with or without scores, preference pairs, dialogues; all splits), writes one line per
answer with its score and prints how the scores are distributed. It compares nothing: `test_reward.py` says how good the scores are.

    python reward_model/score.py MODEL FILE [--output scores.jsonl | scores.csv] [--batch_size 32] [--unusable_rows drop] [--cuda]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import Parser
from common.errors import UserError, run_main
from common.model_source import check_model_source
from common.records import PairRecord, Prompt, ScoreRecord, SFTRecord, read_splits
from common.runs import write_text_atomically

COLUMNS = ("row", "role", "question", "answer", "target_score", "score")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
AnsweredRecord = PairRecord | ScoreRecord | SFTRecord
# Prompt, and the columns that the output has beside the score.
Answer = tuple[Prompt, dict[str, object]]


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    check_model_source(options.model, setting="MODEL", role="reward", trust_remote_code=options.trust_remote_code)
    answers = [answer for record in read_any(options.file, options.unusable_rows) for answer in answers_of(record)]
    output = Path(options.output or f"{Path(options.file).name.split('.')[0]}.scores.jsonl")
    if output.suffix not in {".jsonl", ".csv"}:
        raise UserError(f"--output: got {output}, expected a name that ends in .jsonl or .csv")
    if not output.parent.is_dir():
        raise UserError(f"--output: no folder {output.parent}")

    import numpy as np
    import torch

    from common.models.reward import RewardScorer

    if options.cuda and not torch.cuda.is_available():
        raise UserError("--cuda: this machine has no GPU that torch can use")
    scorer = RewardScorer(
        options.model,
        batch_size=options.batch_size,
        device="cuda" if options.cuda else "cpu",
        trust_remote_code=options.trust_remote_code,
    )
    scores = scorer.score([prompt for prompt, _ in answers], [str(columns["answer"]) for _, columns in answers])
    rows = [{**columns, "score": score} for (_, columns), score in zip(answers, scores, strict=True)]
    write_text_atomically(output, csv_text(rows) if output.suffix == ".csv" else jsonl_text(rows))

    for role in dict.fromkeys(str(row["role"]) for row in rows):
        values = np.array([row["score"] for row in rows if row["role"] == role], dtype=np.float64)
        quantiles = "  ".join(f"{share:.0%} {value:.3f}" for share, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True))
        print(f"{role}: {len(values)} answers, mean {values.mean():.4f}, standard deviation {values.std():.4f}\n  quantiles: {quantiles}")
    print(f"scores: {output}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="reward model directory")
    parser.add_argument("file", help="data file, folder of splits, or hf:NAME")
    parser.add_argument("--output", help="where the scores go, .jsonl or .csv; default: FILE.scores.jsonl in the working directory")
    parser.add_argument("--batch_size", type=int, default=32, help="answers scored at once")
    parser.add_argument(
        "--unusable_rows", choices=("error", "drop"), default="error", help="refuse rows without an answer, or leave them out"
    )
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow the model to run code of its own")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error(f"--batch_size: got {options.batch_size}, expected at least 1")
    return options


def read_any(path: str, unusable_rows: str = "error") -> list[AnsweredRecord]:
    """All rows of all splits, in whichever format they are. Raises UserError where none fits, or where rows of the fitting one are bad."""
    errors: list[UserError] = []
    for kind in ("pair", "score", "sft"):
        try:
            splits = read_splits(path, kind, validation_split_percentage=0.0, require=(), unusable_rows=unusable_rows)
        except UserError as error:
            errors.append(error)
            continue
        records: list[AnsweredRecord] = [*splits.train, *splits.val, *splits.test]
        if not records:
            raise UserError(f"{path}: no rows to score")
        print("\n".join(splits.notes), end="\n" if splits.notes else "")
        return records
    # Of three complaints the useful one is not that the rows are of another kind.
    fitting = (error for error in errors if not any(": keys: got" in problem or "suits" in problem for problem in error.problems))
    raise next(fitting, errors[-1])


def answers_of(record: AnsweredRecord) -> list[Answer]:
    """Every answer of a record."""
    if isinstance(record, PairRecord):
        texts = [("chosen", record.chosen), *(("rejected", answer) for answer in record.rejected)]
    else:
        texts = [("answer", record.answer)]
    target = record.score if isinstance(record, ScoreRecord) else None
    common = {"row": record.where, "question": record.prompt.question, "target_score": target}
    return [(record.prompt, {**common, "role": role, "answer": text}) for role, text in texts]


def jsonl_text(rows: Sequence[dict[str, object]]) -> str:
    lines = [{name: row[name] for name in COLUMNS if row[name] is not None} for row in rows]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    run_main(main)
