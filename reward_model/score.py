"""Score every answer of a file with a trained reward model.

Reads any format with answers (question/answer, with or without scores, preference pairs, dialogues; all splits) and CSV files of questions
and answers, such as test_sft.py writes; writes one line per answer with its score and prints how the scores are distributed. It compares
nothing: `test_reward.py` says how good the scores are. Scores of an ensemble of readouts come with its spread.

    python reward_model/score.py MODEL FILE [--output scores.jsonl | scores.csv] [--batch_size 32] [--unusable_rows drop] [--validate]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import Parser
from common.devices import check_cuda
from common.errors import UserError, run_main
from common.model_source import check_model_source
from common.runs import write_text_atomically
from reward_model.answers import answers_of, read_any

COLUMNS = ("row", "role", "question", "answer", "target_score", "score")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.cuda:
        check_cuda("--cuda", "leave it out")
    check_model_source(options.model, setting="MODEL", role="reward", trust_remote_code=options.trust_remote_code)
    output = output_path(options.file, options.output)
    answers = [answer for record in read_any(options.file, options.unusable_rows) for answer in answers_of(record)]
    if options.validate:
        print(f"valid: {options.model} can score the {len(answers):,} answers of {options.file}; nothing was scored")
        return 0

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
    reads = f"this model reads {scorer.encoder.max_length} tokens"
    judged = scorer.judge([prompt for prompt, _ in answers], [str(columns["answer"]) for _, columns in answers])
    for note in scorer.encoder.take_notes(reads, remedy="train one with a larger data.max_length"):
        print(f"note: {note}")
    columns = (*COLUMNS, "spread") if scorer.model.members > 1 else COLUMNS
    rows = [{**known, "score": answer.score, "spread": answer.spread} for (_, known), answer in zip(answers, judged, strict=True)]
    try:
        write_text_atomically(output, csv_text(rows, columns) if output.suffix == ".csv" else jsonl_text(rows, columns))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}; --output names another place") from None

    for role in dict.fromkeys(str(row["role"]) for row in rows):
        values = np.array([row["score"] for row in rows if row["role"] == role], dtype=np.float64)
        quantiles = "  ".join(f"{share:.0%} {value:.3f}" for share, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True))
        print(f"{role}: {len(values)} answers, mean {values.mean():.4f}, standard deviation {values.std():.4f}\n  quantiles: {quantiles}")
    if scorer.model.members > 1:
        print(f"spread of the {scorer.model.members} readouts: {np.mean([answer.spread for answer in judged]):.4f} (mean)")
    print(f"scores of {len(rows):,} answers: {output}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="reward model directory")
    parser.add_argument(
        "file", help="data file, folder of splits, hf:NAME, or a .csv with the columns question and generated_answer or answer"
    )
    parser.add_argument("--output", help="where the scores go, .jsonl or .csv; default: FILE's name with .scores.jsonl, beside it")
    parser.add_argument("--batch_size", type=int, default=32, help="answers scored at once")
    parser.add_argument(
        "--unusable_rows", choices=("error", "drop"), default="error", help="refuse rows without an answer, or leave them out"
    )
    parser.add_argument("--validate", action="store_true", help="read the model's files and all rows, report, and stop")
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow the model to run code of its own")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error(f"--batch_size: got {options.batch_size}, expected at least 1")
    return options


def output_path(source: str, output: str | None) -> Path:
    """Where the scores go: by default beside the file (of `hf:NAME`: in the working directory). Raises UserError where they cannot."""
    if output is None:
        name = f"{Path(Path(source).name.removesuffix('.gz')).stem}.scores.jsonl"
        path = Path(name) if source.startswith("hf:") else Path(os.path.abspath(source)).parent / name
    else:
        path = Path(os.path.abspath(output))
    if path.resolve() == Path(source).resolve():
        raise UserError(f"{path}: is the file to score; --output names another one for the scores")
    if path.suffix not in {".jsonl", ".csv"}:
        raise UserError(f"--output: got {output}, expected a name that ends in .jsonl or .csv")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; --output names another place")
    if output is not None and not path.parent.is_dir():
        raise UserError(f"--output: no folder {path.parent}")
    return path


def jsonl_text(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    lines = [{name: row[name] for name in columns if row[name] is not None} for row in rows]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def csv_text(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    run_main(main)
