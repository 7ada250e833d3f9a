"""Write the sample data of all four stages: `python -m examples.world.make_data [--seed N] [--check]`.

The same seed gives the same bytes. `--check` writes nothing and fails where a file differs from what the generator makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.world.crowd import Posted, passing_answer, preference, thread
from examples.world.questions import Question
from examples.world.splits import QuestionSplits, split_questions

ROOT = Path(__file__).resolve().parents[2]
SEED = 2024
SFT_ANSWERS = 6  # answers of passers-by per question
SCORED_ANSWERS = 6  # of a thread's answers, with their scores
PAIR_THREADS = 2  # threads per question that pairs are taken from
FREE_PAIRS = 1  # pairs of a thread beside the two of right against wrong in the same form

Row = dict[str, Any]
Rows = dict[str, list[Row]]


def sft_rows(splits: QuestionSplits, rng: random.Random) -> Rows:
    """Train and val: what passers-by wrote, good and bad. Test: the answer that its thread accepted."""

    def crowd(question: Question) -> list[Row]:
        return [{"Question": question.text, "Answer": passing_answer(question, rng).text} for _ in range(SFT_ANSWERS)]

    def accepted(question: Question) -> list[Row]:
        return [{"Question": question.text, "Answer": post.answer.text} for post in thread(question, rng) if post.accepted]

    return {
        "train": _flat(crowd, splits.train),
        "val": _flat(crowd, splits.val),
        "test": _flat(accepted, splits.test),
    }


def pair_rows(splits: QuestionSplits, rng: random.Random) -> Rows:
    """Preferences by votes: right against wrong in the same form, and pairs drawn from the whole thread."""

    def pairs(question: Question) -> list[Row]:
        rows = []
        for _ in range(PAIR_THREADS):
            posts = thread(question, rng)
            hard = [(right, wrong) for right, wrong in itertools.combinations(posts, 2) if _same_form(right, wrong)]
            free = [pair for pair in itertools.combinations(posts, 2) if pair not in hard]
            for chosen, rejected in filter(None, (preference(*pair) for pair in [*hard[:2], *rng.sample(free, FREE_PAIRS)])):
                rows.append({"Question": question.text, "Accepted_Answer": chosen.answer.text, "Answer": rejected.answer.text})
        return rows

    return {name: _flat(pairs, questions) for name, questions in vars(splits).items()}


def score_rows(splits: QuestionSplits, rng: random.Random) -> Rows:
    """Answers with the score that their votes gave them."""

    def scored(question: Question) -> list[Row]:
        posts: list[Posted] = rng.sample(thread(question, rng), SCORED_ANSWERS)
        return [{"Question": question.text, "Answer": post.answer.text, "Score": post.score} for post in posts]

    return {name: _flat(scored, questions) for name, questions in vars(splits).items()}


def prompt_rows(splits: QuestionSplits) -> Rows:
    """Questions alone."""
    return {name: [{"prompt": question.text} for question in questions] for name, questions in vars(splits).items()}


def make_files(seed: int = SEED) -> dict[Path, str]:
    """Path below the repository -> text of the file. Each file has a generator of its own, so that one can change alone."""
    splits = split_questions(random.Random(f"questions {seed}"))
    files = {
        "sft/data/world_sft.json": sft_rows(splits, random.Random(f"sft {seed}")),
        "reward_model/classification/data/world_pairs.json": pair_rows(splits, random.Random(f"pairs {seed}")),
        "reward_model/regression/data/world_scores.json": score_rows(splits, random.Random(f"scores {seed}")),
        "rlhf/data/world_prompts.json": prompt_rows(splits),
    }
    return {Path(path): _to_json(rows) for path, rows in files.items()}


def _same_form(first: Posted, second: Posted) -> bool:
    return first.answer.form == second.answer.form


def _flat(rows: Callable[[Question], list[Row]], questions: Sequence[Question]) -> list[Row]:
    return [row for question in questions for row in rows(question)]


def _to_json(splits: Rows) -> str:
    """One row a line, so that differences between versions can be read."""
    parts = [f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]" for name, rows in splits.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help="seed of everything that is drawn (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    args = parser.parse_args(argv)
    stale = []
    for path, text in make_files(args.seed).items():
        target = ROOT / path
        if args.check:
            if not target.is_file() or target.read_bytes() != text.encode():
                stale.append(path)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.encode())
            print(f"{path}: {len(text.encode()) / 1e6:.2f} MB, rows " + ", ".join(f"{k} {len(v)}" for k, v in json.loads(text).items()))
    for path in stale:
        print(
            f"{path} differs from what the generator makes with seed {args.seed}; run python -m examples.world.make_data", file=sys.stderr
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
