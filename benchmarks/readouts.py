"""Seconds per epoch of readouts over a frozen backbone: with its states read from the cache, and with the backbone run in every step.

    python benchmarks/readouts.py [--n 256] [--epochs 5] [--rounds 1] [--readouts last_token,mean_pool] [--growth 256,1024] [--set K=V]

Both are our training script on pairs (reward_model/classification/train_reward.py, Lightning, metrics and log included), with the rows of
`reward.py`, each in its own process, in turn: `--n` questions of 16 to 64 tokens, each with a chosen and a rejected answer of 11 to 301,
`--batch` of them per step, on a random backbone of 10 million parameters (GPT-Neo 256 x 12 layers; T5 256 x 6 + 4 for the readouts that
need an encoder or decoder). Figures of the table:

    epoch, cached      seconds of an epoch's training steps, loading of batches included; without: one epoch, cached: median of `--epochs`
    by CPU             the same ratio of CPU seconds
    fill               seconds until the states stand in the cache, with digests and checksums
    break-even         epochs after which filling has paid for itself
    bytes              of states per answer
    loss               largest difference of a training loss of the first epoch between the two

`--growth` runs the last of the readouts with so many questions each, with the cache, one epoch, and tells the peak memory of the process
beside the cache's size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.processes import run_contender
from benchmarks.reward import build_rows, pair_records
from benchmarks.training import run_script

READOUTS = {
    "last_token": "gpt_neo",
    "weighted_layers": "gpt_neo",
    "attention_pooled_encoder": "t5",
    "decoder_output": "t5",
    "mean_pool": "gpt_neo",
    "full_attention_pooling": "gpt_neo",
    "layerwise_attention": "gpt_neo",
}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.measure is not None:
        return print_measured(options, measure)
    chosen = options.readouts.split(",")
    found = both_ways(options, chosen, lambda readout, way, epochs: in_process(options, readout, way, options.n, epochs))
    print(table(found))
    growth = {int(n): in_process(options, chosen[-1], "cached", int(n), 1) for n in filter(None, options.growth.split(","))}
    if growth:
        print("\n" + growth_table(chosen[-1], growth))
    print("RESULT " + json.dumps({"n": options.n, "batch": options.batch, "readouts": found, "growth": growth}))
    return 0


def print_measured(options: argparse.Namespace, measure: Callable[[argparse.Namespace, str], dict[str, Any]]) -> int:
    """Measure `options.measure` in this process and print its figures."""
    import torch

    from benchmarks.synthetic import print_result

    torch.set_num_threads(options.threads)
    print_result(measure(options, options.measure))
    return 0


def both_ways(
    options: argparse.Namespace, names: Sequence[str], figures: Callable[[str, str, int], dict[str, Any]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Name -> way -> figures of each round; `figures(name, way, epochs)`, with `options.epochs` from the cache and one without."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(options.rounds):
        for name in names:
            for way, epochs in (("cached", options.epochs), ("never", 1)):
                found.setdefault(name, {}).setdefault(way, []).append(figures(name, way, epochs))
            print(f"round {number + 1}: {table({name: found[name]}).splitlines()[-1]}", file=sys.stderr, flush=True)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="training questions")
    parser.add_argument("--batch", type=int, default=32, help="questions per step")
    parser.add_argument("--epochs", type=int, default=5, help="epochs with the cache; one without")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--readouts", default=",".join(READOUTS), help="separated by commas")
    parser.add_argument("--growth", default="", metavar="N,N", help="numbers of questions whose peak memory is told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as on the script's command line")
    parser.add_argument("--measure", choices=READOUTS, help="measure this one here and print its figures")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.readouts.split(",") if name not in READOUTS]:
        parser.error(f"--readouts: got {','.join(unknown)}; choose among {', '.join(READOUTS)}")
    return options


def in_process(options: argparse.Namespace, readout: str, way: str, n: int, epochs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", readout, "--n", str(n), "--epochs", str(epochs)]
    command += ["--batch", str(options.batch), "--threads", str(options.threads), "--set", *options.set]
    command += ["model_params.cache_states=never"] if way == "never" else []
    return run_contender(command)


def build_backbone(kind: str) -> Any:
    """A random transformer of about 10 million parameters, for the tokenizer of `synthetic.py`."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoModel, T5Config, T5ForConditionalGeneration

    from benchmarks.synthetic import EOS, PAD, VOCABULARY

    torch.manual_seed(1)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS}
    if kind == "t5":
        sizes = {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 1024, "num_layers": 6, "num_decoder_layers": 4}
        return T5ForConditionalGeneration(T5Config(**ids, **sizes, decoder_start_token_id=PAD))
    return GPTNeoModel(
        GPTNeoConfig(
            **ids,
            bos_token_id=EOS,
            hidden_size=256,
            num_layers=12,
            num_heads=8,
            attention_types=[[["global", "local"], 6]],
            window_size=64,
            max_position_embeddings=512,
        )
    )


@dataclass
class Epochs:
    """Wall and CPU seconds of each epoch's training steps, and the loss of each."""

    marks: list[list[tuple[float, float]]] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)

    @classmethod
    def watch(cls, module: Any) -> Epochs:
        """Those that a LightningModule's class will make."""
        seen = cls()

        def on_train_epoch_start(self: Any) -> None:
            seen.marks.append([(time.perf_counter(), time.process_time())])

        def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.marks[-1].append((time.perf_counter(), time.process_time()))
            seen.losses.append(outputs["loss"].detach().clone())

        module.on_train_epoch_start, module.on_train_batch_end = on_train_epoch_start, on_train_batch_end
        return seen

    def figures(self, steps: int) -> dict[str, Any]:
        """Seconds of every epoch, losses of the first `steps` steps."""
        wall, cpu = ([marks[-1][clock] - marks[0][clock] for marks in self.marks] for clock in (0, 1))
        return {"epochs": wall, "cpu": cpu, "losses": [float(loss) for loss in self.losses[:steps]]}


def measure(options: argparse.Namespace, readout: str) -> dict[str, Any]:
    """Train once in this process, and tell how long what took."""
    from benchmarks.synthetic import peak_rss_mib, versions
    from reward_model import training
    from reward_model.classification.module import PairModule
    from reward_model.classification.train_reward import main as train

    filled = {"seconds": 0.0, "bytes": 0, "answers": 0}
    read_from_cache = training.read_from_cache

    def watched(*arguments: Any, **keywords: Any) -> Any:
        begun = time.perf_counter()
        rows = read_from_cache(*arguments, **keywords)
        kept = rows[0][0].answers[0].states.rows
        size = int(kept.tokens.sum()) * kept.facts.bytes_per_token
        filled.update(seconds=time.perf_counter() - begun, bytes=size, answers=len(kept))
        return rows

    seen = Epochs.watch(PairModule)
    training.read_from_cache, training.SCORE_SAMPLE = watched, 8  # moments of scores are no part of an epoch
    records = pair_records(build_rows(options.n))
    options.set = [
        "model_params.freeze_backbone=true",
        "model_params.learning_rate=1e-3",
        f"model_params.readout.name={readout}",
        f"trainer.params.max_epochs={options.epochs}",
        f"trainer.params.check_val_every_n_epoch={options.epochs}",
        *options.set,
    ]
    with tempfile.TemporaryDirectory() as folder:
        run_script(train, Path(folder), build_backbone(READOUTS[readout]), {"train": records, "val": records[:1]}, options)
    return {
        **seen.figures(steps=-(-options.n // options.batch)),
        "fill": filled["seconds"],
        "bytes": filled["bytes"],
        "answers": filled["answers"],
        "peak_rss_mb": round(peak_rss_mib()),
        "versions": versions(),
    }


def table(found: dict[str, dict[str, list[dict[str, Any]]]], first: str = "readout") -> str:
    """Markdown: medians over rounds."""
    head = [first, "epoch", "cached", "ratio", "by CPU", "fill", "break-even", "bytes", "loss", "peak MiB, cached"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for readout, ways in found.items():
        plain, cached = ways["never"], ways["cached"]
        (slow, slow_cpu), (fast, fast_cpu) = ((_median(rounds, "epochs"), _median(rounds, "cpu")) for rounds in (plain, cached))
        fill = statistics.median(figures["fill"] for figures in cached)
        differences = [
            abs(a - b) for one, other in zip(plain, cached, strict=True) for a, b in zip(one["losses"], other["losses"], strict=True)
        ]
        cells = [f"{slow:.2f}", f"{fast:.3f}", f"**{slow / fast:.1f}**", f"{slow_cpu / fast_cpu:.1f}", f"{fill:.2f}"]
        cells += [f"{fill / (slow - fast):.1f}", f"{cached[0]['bytes'] / cached[0]['answers']:,.0f}", f"{max(differences):.1e}"]
        cells += [f"{statistics.median(figures['peak_rss_mb'] for figures in cached):.0f}"]
        rows.append(f"| {readout} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def growth_table(readout: str, growth: dict[int, dict[str, Any]]) -> str:
    rows = [f"| questions ({readout}) | cache, MiB | peak MiB | epoch | fill |", "|---|---|---|---|---|"]
    for n, figures in growth.items():
        cells = [f"{figures['bytes'] / 2**20:,.0f}", f"{figures['peak_rss_mb']}", f"{figures['epochs'][0]:.2f}", f"{figures['fill']:.2f}"]
        rows.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _median(rounds: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(value for figures in rounds for value in figures[name])


if __name__ == "__main__":
    sys.exit(main())
