"""PPO on a GPU in bfloat16: tokens per second, share of the GPU's rate of matrix products, peak memory; decoding against `generate`.

    python benchmarks/gpu.py [--sizes 125m 1b] [options of benchmarks/ppo.py]

For each size first the phases of the public trainer (benchmarks/ppo.py in this process, matrix products in bfloat16 over float32
weights). Tokens: those written in `generate`, real ones of prompts and answers in `score`, those times the epochs in `train`. `bound s`
and `share` are those of benchmarks/roofline.py, by products measured on the GPU in bfloat16. What `score` leaves in the GPU's queue
counts as `train`.

Then the policy in bfloat16 answers the same prompts in three ways, in turn, the quickest of `--repeats` each after one that does not
count: transformers' `generate`, this project's decoding with one launch per kernel, and with one CUDA graph per token
(`static_decoding`). `peak GiB` is the most memory allocated, weights included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch

from benchmarks.ppo import measure, parse
from benchmarks.roofline import bounds, count_work, rate
from benchmarks.synthetic import EOS, PAD, SIZES, build_policy, build_prompts, build_tokenizer, versions, vocabulary
from common.collate import left_pad
from common.launch.runtime import peak_memory_gib
from common.models.fused import set_fused
from common.schema import GenerateParams
from rlhf.ppo import AutoModelForCausalLMWithValueHead
from rlhf.ppo.answers import Forward
from rlhf.ppo.rollout import collect_rollout
from rlhf.ppo.static_decoding import StaticDecoding


def phase_lines(options: argparse.Namespace, device: torch.device, repeats: int) -> list[str]:
    """A table of the trainer's phases."""
    reset_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    memory = peak_memory_gib(device)
    counted = [count_work(options, lengths) for lengths in found.lengths]
    rates = [rate(work, torch.bfloat16, repeats, str(device)) for work in counted[0][0]]
    written = fmean(sum(answer for _, answer in lengths) for lengths in found.lengths)
    whole = fmean(sum(map(sum, lengths)) for lengths in found.lengths)
    tokens = {"generate": written, "score": whole, "train": whole * options.epochs, "total": written}
    lines = [f"{found.parameters / 1e6:.0f} million parameters, peak {memory:.2f} GiB\n"]
    lines += ["| phase | seconds | tokens/s | TFLOP/s | bound s | share |", "|---|---|---|---|---|---|"]
    for phase, flop, seconds, bound in bounds(found, counted, rates):
        speed = tokens[phase] / seconds
        lines.append(f"| {phase} | {seconds:.3f} | {speed:.0f} | {flop / seconds / 1e12:.2f} | {bound:.3f} | {bound / seconds:.3f} |")
    return lines


def decode_lines(options: argparse.Namespace, device: torch.device, repeats: int) -> list[str]:
    """A table of the ways to decode."""
    model = AutoModelForCausalLMWithValueHead(build_policy(options.size, eos_hazard=options.eos_hazard)).eval().to(device)
    model.pretrained_model.to(torch.bfloat16)
    set_fused(model)
    usual, static = (Forward(model.pretrained_model, pack=False) for _ in range(2))
    static.static = StaticDecoding.find(static)
    if static.static is None:
        raise SystemExit(f"benchmarks/gpu.py: a step of size {options.size} cannot be captured here; decoding is not measured")
    prompts, tokenizer = build_prompts(options.batch), build_tokenizer(vocabulary(options.size))
    ways: dict[str, Callable[[], int]] = {
        "generate": partial(generate, model.pretrained_model, prompts, options.new_tokens, device),
        "one launch per kernel": partial(sample, model, usual, tokenizer, prompts, options.new_tokens),
        "one CUDA graph per token": partial(sample, model, static, tokenizer, prompts, options.new_tokens),
    }
    best, memory = dict.fromkeys(ways, 0.0), {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            reset_peak(device)
            begun = time.perf_counter()
            tokens = way()
            speed = tokens / (time.perf_counter() - begun)
            if turn > 0:
                best[name] = max(best[name], speed)
            else:  # later on the graph's buffers are there for everyone
                memory[name] = peak_memory_gib(device)
    head = ["| decoding | tokens/s | to generate | peak GiB |", "|---|---|---|---|"]
    return [*head, *(f"| {name} | {best[name]:.0f} | {best[name] / best['generate']:.2f} | {memory[name]:.2f} |" for name in ways)]


def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, device: torch.device) -> int:
    """Sample with transformers; returns how many tokens were written (reading that waits for the GPU)."""
    ids, mask = (part.to(device) for part in left_pad(prompts, PAD))
    whole = model.generate(ids, attention_mask=mask.long(), do_sample=True, top_k=0, max_new_tokens=new_tokens, pad_token_id=PAD)
    answers = whole[:, ids.shape[1] :]
    before = (answers == EOS).cumsum(1) - (answers == EOS).long()
    return int((before == 0).sum())


def sample(model: Any, forward: Forward, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Sample with log-probabilities and values; returns how many tokens were written."""
    params = GenerateParams(max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    rollout = collect_rollout(model, tokenizer, prompts, params, seed=0, forward=forward)
    return sum(map(len, rollout.responses))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["125m", "1b"], choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5, help="times of each product and way to decode")
    own, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: there is no CUDA GPU here")
    torch.set_float32_matmul_precision("high")  # the reward model's products, which stay float32
    device = torch.device("cuda", torch.cuda.current_device())
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{torch.cuda.get_device_name(device)}; {named}; {' '.join(rest)}")
    for size in own.sizes:
        options = parse([*rest, "--size", size, "--bf16"])
        if options.critic or options.top is not None:
            parser.error("--critic, --top: the FLOP are counted for a trunk that is trained whole, with a value head")
        print(f"\n## {size}\n")
        print("\n".join([*phase_lines(options, device, own.repeats), "", *decode_lines(options, device, own.repeats)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
