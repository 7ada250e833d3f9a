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

from benchmarks.training import Bare, Clock, argument_parser, compare, measure, run_script, text, watch

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


def ours(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    from benchmarks.synthetic import build_judge
    from reward_model.classification.module import PairModule
    from reward_model.classification.train_reward import main as train

    records = [
        {
            "Question": text(question[1:-1]),
            "Accepted_Answer": text(chosen[len(question) : -1]),
            "Answer": text(rejected[len(question) : -1]),
        }
        for question, chosen, rejected in rows
    ]
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    clock = Clock()
    clock.mark()
    for start in range(0, len(order), options.batch):
        batch = [rows[index] for index in order[start : start + options.batch]]
        answers = [chosen for _, chosen, _ in batch] + [rejected for _, _, rejected in batch]
        ids = torch.full((len(answers), max(map(len, answers))), PAD)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(answers):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        chosen, rejected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).chunk(2)
        (-logsigmoid(chosen - rejected).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
    return clock


def trl(**settings: Any) -> Callable[[argparse.Namespace, Sequence[Row]], Clock]:
    def run(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        from benchmarks.synthetic import build_judge, build_tokenizer
        from benchmarks.training import trl_arguments, trl_callback

        clock = Clock()
        data = {"chosen_ids": [chosen for _, chosen, _ in rows], "rejected_ids": [rejected for _, _, rejected in rows]}
        with tempfile.TemporaryDirectory() as folder:
            RewardTrainer(
                model=build_judge(options.size),
                args=RewardConfig(**{**trl_arguments(folder, options.batch), **settings}),
                train_dataset=Dataset.from_dict(data),
                processing_class=build_tokenizer(),
                callbacks=[trl_callback(clock)],
            ).train()
        return clock

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


def main(argv: Sequence[str] | None = None) -> int:
    options = argument_parser(__doc__, CONTENDERS, rows=64).parse_args(argv)
    rows = build_rows(options.n)
    if options.contender is None:
        tokens, twice = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows), sum(len(question) for question, _, _ in rows)
        print(f"{options.n} pairs, {tokens} tokens, {twice} of them a question's second time")
        return compare(options, __file__, CONTENDERS, options.n, "pairs", "trl")
    import torch

    torch.set_num_threads(options.threads)
    measure(options, CONTENDERS[options.contender], lambda: floor(options, rows[:1]), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
