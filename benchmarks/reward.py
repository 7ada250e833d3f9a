"""Pairs per second of reward model training: our training script, trl's RewardTrainer, a plain loop, bare loops with every trick.

    python benchmarks/reward.py [--size s] [--n 64] [--rounds 3] [--only ours,trl,floor] [--set data.padding_free=false]

One epoch over `--n` questions of 16 to 64 tokens, each with a chosen and a rejected answer of 11 to 301 (log-normal around 70), `--batch`
of them per step, gradients clipped to 1 and float32 weights of the same random GPT-Neo for all. Contenders run in turn, each in its own
process, after a step that does not count; time is that of the training steps, without imports, tokenizing, validation and saving.

    ours       reward_model/classification/train_reward.py: data file, config, Lightning, metrics and log included; --set passes settings on
    ours-bf16  the same with trainer.params.precision=bf16-mixed; only where named
    trl        RewardTrainer with its defaults
    trl-bf16   RewardTrainer with bf16=True; only where named
    floor      a plain loop: chosen and rejected rows padded into one forward, torch's AdamW
    tricks+…   bare loops of ../shared/bench, where that folder is
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import training
from benchmarks.training import Bare, Clock, plain_loop, run_script, run_trl, text, watch

VOCABULARY, PAD, EOS = 4096, 0, 1

Row = tuple[list[int], list[int], list[int]]
"""Ids of the question, of question and chosen answer, of question and rejected answer."""


def build_rows(count: int, seed: int = 0) -> list[Row]:
    lengths, draw = random.Random(seed), random.Random(seed)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(number)]

    def answer() -> list[int]:
        return [*tokens(min(300, max(10, int(draw.lognormvariate(math.log(70), 0.7))))), EOS]

    rows = []
    for _ in range(count):
        question = tokens(min(64, max(16, int(lengths.lognormvariate(math.log(32), 0.45)))))
        rows.append((question, question + answer(), question + answer()))
    return rows


def pair_records(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as a data file has them."""
    return [
        {
            "Question": text(question[1:-1]),
            "Accepted_Answer": text(chosen[len(question) : -1]),
            "Answer": text(rejected[len(question) : -1]),
        }
        for question, chosen, rejected in rows
    ]


def ours(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    from benchmarks.synthetic import build_judge
    from reward_model.classification.module import PairModule
    from reward_model.classification.train_reward import main as train

    records = pair_records(rows)
    clock = watch(PairModule)
    with tempfile.TemporaryDirectory() as folder:
        run_script(train, Path(folder), build_judge(options.size), {"train": records, "val": records[:1]}, options)
    return clock


def ours_bf16(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    options.set = ["trainer.params.precision=bf16-mixed", *options.set]
    return ours(options, rows)


def floor(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    import torch
    from torch.nn.functional import logsigmoid

    from benchmarks.synthetic import build_judge

    model = build_judge(options.size)

    def loss(batch: Sequence[Row]) -> Any:
        answers = [chosen for _, chosen, _ in batch] + [rejected for _, _, rejected in batch]
        ids = torch.full((len(answers), max(map(len, answers))), PAD)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(answers):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        chosen, rejected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).chunk(2)
        return -logsigmoid(chosen - rejected).mean()

    return plain_loop(model, rows, options.batch, loss)


def trl(**settings: Any) -> Callable[[argparse.Namespace, Sequence[Row]], Clock]:
    def run(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
        from trl import RewardConfig, RewardTrainer

        from benchmarks.synthetic import build_judge

        data = {"chosen_ids": [chosen for _, chosen, _ in rows], "rejected_ids": [rejected for _, _, rejected in rows]}
        return run_trl(RewardTrainer, RewardConfig, settings, build_judge(options.size), data, options.batch)

    return run


CONTENDERS = {
    "trl": trl(),
    "trl-bf16": trl(bf16=True),
    "floor": floor,
    "tricks+2chunks": Bare("rm_bench", "tricks+2chunks"),
    "tricks+grouped": Bare("rm_bench", "tricks+grouped"),
    "tricks+grouped+2chunks": Bare("rm_bench", "tricks+grouped+2chunks"),
    "ours": ours,
    "ours-bf16": ours_bf16,
}


def about(rows: Sequence[Row]) -> str:
    tokens, twice = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows), sum(len(question) for question, _, _ in rows)
    return f"{len(rows)} pairs, {tokens} tokens, {twice} of them a question's second time"


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(argv, __doc__, __file__, CONTENDERS, build_rows, rows=64, unit="pairs", amount=len, about=about)


if __name__ == "__main__":
    sys.exit(main())
