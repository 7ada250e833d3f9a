"""Real tokens per second of supervised fine-tuning: our training script, trl's SFTTrainer, a plain loop, bare loops with every trick.

    python benchmarks/sft.py [--size s] [--n 96] [--rounds 3] [--only ours,trl,floor] [--set data.padding_free=false]

One epoch over `--n` rows of 20 to 400 tokens (log-normal around 110, 20 to 60 % of them prompt), `--batch` of them per step, with loss on
the answers, gradients clipped to 1 and float32 weights of the same random GPT-Neo for all. Contenders run in turn, each in its own
process, after a step that does not count; time is that of the training steps, without imports, tokenizing, validation and saving.

    ours         sft/train_sft.py: data file, config, Lightning, metrics and log included; --set passes settings on
    ours-bf16    the same with trainer.params.precision=bf16-mixed; only where named
    trl          SFTTrainer with its defaults
    trl-grouped  SFTTrainer with train_sampling_strategy=group_by_length, its quickest setting here
    trl-bf16     SFTTrainer with bf16=True; only where named
    floor        a plain loop: whole padded batches, transformers' own loss, torch's AdamW
    tricks+…     bare loops of ../shared/bench, where that folder is
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

Row = tuple[list[int], int]
"""Ids of prompt and answer, and how many of them are the prompt."""


def build_rows(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(400, max(20, int(draw.lognormvariate(math.log(110), 0.7))))
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length - 1)]
        rows.append(([*ids, EOS], int(length * draw.uniform(0.2, 0.6))))
    return rows


def records(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as a data file has them."""
    return [{"Question": text(ids[1 : prompt - 1]), "Answer": text(ids[prompt:-1])} for ids, prompt in rows]


def ours(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    from benchmarks.synthetic import build_policy
    from sft.module import SFTModule
    from sft.train_sft import main as train

    clock = watch(SFTModule)
    with tempfile.TemporaryDirectory() as folder:
        run_script(train, Path(folder), build_policy(options.size), {"train": records(rows), "val": records(rows[:1])}, options)
    return clock


def ours_bf16(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    options.set = ["trainer.params.precision=bf16-mixed", *options.set]
    return ours(options, rows)


def floor(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
    import torch

    from benchmarks.synthetic import build_policy

    model = build_policy(options.size)

    def loss(batch: Sequence[Row]) -> Any:
        ids = torch.full((len(batch), max(len(row) for row, _ in batch)), PAD)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, (row, prompt) in enumerate(batch):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
            labels[place, prompt : len(row)] = ids[place, prompt : len(row)]
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    return plain_loop(model, rows, options.batch, loss)


def trl(**settings: Any) -> Callable[[argparse.Namespace, Sequence[Row]], Clock]:
    def run(options: argparse.Namespace, rows: Sequence[Row]) -> Clock:
        from trl import SFTConfig, SFTTrainer

        from benchmarks.synthetic import build_policy

        data = {"input_ids": [ids for ids, _ in rows], "labels": [[-100] * prompt + ids[prompt:] for ids, prompt in rows]}
        return run_trl(SFTTrainer, SFTConfig, settings, build_policy(options.size), data, options.batch)

    return run


CONTENDERS = {
    "trl": trl(),
    "trl-grouped": trl(train_sampling_strategy="group_by_length"),
    "trl-bf16": trl(bf16=True),
    "floor": floor,
    "tricks+grouped": Bare("sft_bench", "tricks+grouped"),
    "tricks+packed-linears": Bare("sft_bench", "tricks+packed-linears"),
    "ours": ours,
    "ours-bf16": ours_bf16,
}


def tokens(rows: Sequence[Row]) -> int:
    return sum(len(ids) for ids, _ in rows)


def about(rows: Sequence[Row]) -> str:
    return f"{len(rows)} rows, {tokens(rows)} tokens, of which {sum(len(ids) - prompt for ids, prompt in rows)} answer"


def main(argv: Sequence[str] | None = None) -> int:
    return training.main(argv, __doc__, __file__, CONTENDERS, build_rows, rows=96, unit="tokens", amount=tokens, about=about)


if __name__ == "__main__":
    sys.exit(main())
