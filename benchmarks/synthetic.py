"""What the PPO benchmarks share: seeded models, prompts, a tokenizer, and seconds by phase in the form that they print.

Weights are random, so nothing is learnt and no figure is about quality; shapes, lengths and early ends are those of a real run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import resource
import statistics
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS, BOS = 0, 1, 2
VOCABULARY = 4096
WINDOW = 64
SIZES = {"xs": (128, 2, 4), "s": (256, 8, 8), "m": (512, 12, 8), "125m": (768, 12, 12), "1b": (2048, 18, 16)}
"""Hidden size, layers, heads: 1.0, 7.5 and 40.1 million parameters; with GPT-Neo's vocabulary 124 million and 1.01 billion."""
PACKAGES = ("torch", "transformers", "trl", "accelerate", "lightning", "pytorch-lightning", "datasets", "tokenizers")


def vocabulary(size: str) -> int:
    return 50257 if size in ("125m", "1b") else VOCABULARY


def gpt_neo_config(size: str, **fields: Any) -> GPTNeoConfig:
    """Global and local attention in turn, no dropout, 512 positions."""
    hidden, layers, heads = SIZES[size]
    return GPTNeoConfig(
        vocab_size=vocabulary(size),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        attention_types=[[["global", "local"], layers // 2]],
        window_size=WINDOW,
        max_position_embeddings=512,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        **fields,
    )


def build_policy(size: str, *, seed: int = 0, eos_hazard: float = 0.0) -> GPTNeoForCausalLM:
    """A random policy. Each of its tokens is EOS with a probability of about `eos_hazard` (0: 1 / vocabulary, hardly ever).

    For that, the first hidden unit is set apart: the last norm makes it a constant, and of all (tied) output rows EOS alone reads it.
    """
    torch.manual_seed(seed)
    model = GPTNeoForCausalLM(gpt_neo_config(size)).float()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    if eos_hazard:
        # Logits of other tokens are N(0, variance), since the norm's output has variance 1 and rows have a deviation of 0.02. So the
        # mean of exp(logit) over them is exp(variance / 2), and EOS needs odds of hazard / (1 - hazard) against the vocabulary's size.
        variance = model.config.hidden_size * 0.02**2
        logit = math.log(eos_hazard / (1 - eos_hazard) * vocabulary(size)) + variance / 2
        constant = 4.0
        with torch.no_grad():
            rows, norm = model.transformer.wte.weight, model.transformer.ln_f
            rows[:, 0] = 0.0
            rows[EOS] = 0.0
            rows[EOS, 0] = logit / constant
            norm.weight[0] = 0.0
            norm.bias.zero_()
            norm.bias[0] = constant
    return model


def build_judge(size: str, *, seed: int = 1) -> GPTNeoForSequenceClassification:
    """A random sequence classifier with one output, as reward models are published."""
    torch.manual_seed(seed)
    return GPTNeoForSequenceClassification(gpt_neo_config(size, num_labels=1)).float()


def build_prompts(count: int, *, seed: int = 0, shortest: int = 16, longest: int = 64) -> list[list[int]]:
    """Prompts of random tokens, none of them special; lengths are log-normal around 32 tokens and cut to the limits."""
    lengths, tokens = random.Random(seed), random.Random(seed + 1)
    sizes = [min(longest, max(shortest, int(lengths.lognormvariate(math.log(32), 0.45)))) for _ in range(count)]
    return [[tokens.randrange(BOS + 1, VOCABULARY) for _ in range(size)] for size in sizes]


def build_tokenizer(words: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One word per id, `w17` for 17."""
    ids = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, **{f"w{number}": number for number in range(BOS + 1, words)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every contender takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="s", choices=SIZES)
    parser.add_argument("--iters", type=int, default=3, help="PPO iterations that count")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before them")
    parser.add_argument("--batch", type=int, default=64, help="answers per iteration")
    parser.add_argument("--minibatch", type=int, default=16, help="answers per optimizer step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64, help="answer tokens at most")
    parser.add_argument("--eos-hazard", type=float, default=0.0, help="probability of EOS at each token; 0.04: answers of about 22 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6)
    return parser


class CpuLog:
    """CPU seconds of this process (all threads) as a function of wall time, also at moments that are known only afterwards.

    A thread reads both clocks every `interval` seconds; between two readings the curve is taken as straight.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self._readings: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(interval,), daemon=True)

    def __enter__(self) -> CpuLog:
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, moment: float) -> float:
        """CPU seconds at a `time.perf_counter()` inside the `with`, not later than now."""
        readings = [*self._readings, (time.perf_counter(), time.process_time())]
        after = bisect_left(readings, (moment, 0.0))
        if after == 0:
            return readings[0][1]
        (wall_0, cpu_0), (wall_1, cpu_1) = readings[after - 1], readings[after]
        return cpu_0 + (cpu_1 - cpu_0) * (moment - wall_0) / max(wall_1 - wall_0, 1e-9)

    def _read(self) -> None:
        self._readings.append((time.perf_counter(), time.process_time()))

    def _run(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self._read()


def phase_seconds(marks: Sequence[float], cpu: CpuLog, resp_tokens: int) -> dict[str, float]:
    """Seconds and CPU seconds by phase; `marks`: the moments when the iteration, score and train begin, and the end."""
    figures: dict[str, float] = {}
    names = ("generate", "score", "train")
    for name, begin, end in (*zip(names, marks, marks[1:], strict=False), ("total", marks[0], marks[-1])):
        figures[name], figures[f"cpu_{name}"] = end - begin, cpu.at(end) - cpu.at(begin)
    return {**figures, "resp_tokens": float(resp_tokens)}


def result(name: str, size: str, batch: int, iterations: Sequence[Mapping[str, float]], **more: Any) -> dict[str, Any]:
    """What one process measured: medians over iterations, every iteration, the process's peak memory (imports included)."""
    median = {key: round(statistics.median(figures[key] for figures in iterations), 4) for key in iterations[0]}
    return {
        "name": name,
        "size": size,
        "median": median,
        "episodes_per_s": round(batch / median["total"], 3),
        "peak_rss_mb": round(peak_rss_mib()),
        "iters": [{key: round(value, 3) for key, value in figures.items()} for figures in iterations],
        "versions": versions(),
        **more,
    }


def print_result(found: Mapping[str, Any]) -> None:
    """The line that a runner looks for."""
    print("RESULT " + json.dumps(found), flush=True)


def peak_rss_mib() -> float:
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024


def versions() -> dict[str, str]:
    """Those of the packages that matter, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
