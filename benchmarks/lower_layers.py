"""Seconds per epoch where upper layers alone train: begun with the states that enter them, and with all layers run in every step.

    python benchmarks/lower_layers.py [--n 64] [--epochs 4] [--rounds 1] [--stages sft,pairs] [--top 2] [--set K=V]

Both are our training scripts as users start them, each in its own process, in turn, on a random GPT-Neo 288 x 8 of 9.3 million parameters
whose `--top` upper layers train: SFT with the rows of `sft.py`, `--batch` to a step, and the reward model of pairs with those of
`reward.py` and its last token read. The figures are those of `readouts.py`: one epoch without the cache, `--epochs` with it, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import reward as pair_rows
from benchmarks import sft as sft_rows
from benchmarks.processes import run_contender
from benchmarks.readouts import Epochs, both_ways, print_measured, table
from benchmarks.training import run_script

STAGES = ("sft", "pairs")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.measure is not None:
        return print_measured(options, measure)
    found = both_ways(options, options.stages.split(","), lambda stage, way, epochs: in_process(options, stage, way, epochs))
    print(table(found, "stage"))
    print("RESULT " + json.dumps({"n": options.n, "batch": options.batch, "top": options.top, "stages": found}))
    return 0


def in_process(options: argparse.Namespace, stage: str, way: str, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", stage, "--n", str(options.n), "--epochs", str(epochs)]
    command += ["--batch", str(options.batch), "--top", str(options.top), "--threads", str(options.threads)]
    return run_contender([*command, "--set", *options.set, f"model_params.cache_states={'never' if way == 'never' else 'float32'}"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="training rows or questions")
    parser.add_argument("--batch", type=int, default=16, help="of them per step")
    parser.add_argument("--epochs", type=int, default=4, help="epochs with the cache; one without")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--top", type=int, default=2, help="upper layers that train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as on the script's command line")
    parser.add_argument("--measure", choices=STAGES, help="measure this one here and print its figures")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.stages.split(",") if name not in STAGES]:
        parser.error(f"--stages: got {','.join(unknown)}; choose among {', '.join(STAGES)}")
    return options


def build_model() -> Any:
    import torch
    from transformers import GPTNeoForCausalLM

    from benchmarks.synthetic import gpt_neo_config

    torch.manual_seed(1)
    config = gpt_neo_config("s")
    config.hidden_size = 288
    return GPTNeoForCausalLM(config)


def measure(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Train once in this process, and tell how long what took."""
    import reward_model.training
    import sft.training
    from benchmarks.synthetic import peak_rss_mib, versions
    from common.models.lower_states import started_answers
    from reward_model.classification.module import PairModule
    from reward_model.classification.train_reward import main as train_pairs
    from sft.module import SFTModule
    from sft.train_sft import main as train_sft

    filled = {"fill": 0.0, "bytes": 0, "answers": 1}

    def watched(*arguments: Any, **keywords: Any) -> Any:
        begun = time.perf_counter()
        answers = started_answers(*arguments, **keywords)
        kept = answers[0].states.rows
        filled.update(fill=time.perf_counter() - begun, bytes=int(kept.tokens.sum()) * kept.facts.bytes_per_token, answers=len(kept))
        return answers

    sft.training.started_answers = reward_model.training.started_answers = watched
    reward_model.training.SCORE_SAMPLE = 8  # moments of scores are no part of an epoch
    if stage == "sft":
        main_of, module, built = train_sft, SFTModule, sft_rows.records(sft_rows.build_rows(options.n))
    else:
        main_of, module, built = train_pairs, PairModule, pair_rows.pair_records(pair_rows.build_rows(options.n))
    seen = Epochs.watch(module)
    layers = ",".join(str(-number) for number in range(1, options.top + 1))
    options.set = [
        *(f"model_params.freeze_{group}=true" for group in ("emb", "ln", "attn", "ff", "other")),
        f"model_params.layers_not_to_freeze=[{layers}]",
        "model_params.learning_rate=1e-3",
        f"trainer.params.max_epochs={options.epochs}",
        f"trainer.params.check_val_every_n_epoch={options.epochs}",
        *options.set,
    ]
    with tempfile.TemporaryDirectory() as folder:
        run_script(main_of, Path(folder), build_model(), {"train": built, "val": built[:1]}, options)
    return {
        **seen.figures(steps=-(-options.n // options.batch)),
        **filled,
        "peak_rss_mb": round(peak_rss_mib()),
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
