"""What share of the machine's rate of matrix products each phase of a PPO iteration achieves.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true python benchmarks/roofline.py [options of benchmarks/ppo.py]

First a table of plain products `(M x K) (K x N)` at the shapes of the phases, in float32 and bfloat16, the quickest of some; in `train`
with the two of the backward pass, (M x N) (N x K) and (N x M) (M x K). M is the rows that one product can have: in `generate` the
prompts' tokens, then the mean number of answers still being written; in `score` and `train` the tokens of a minibatch.

Then the phases of the public trainer (benchmarks/ppo.py in this process). FLOP are counted from sizes and real tokens alone, padding and
recomputation left out. A forward over n tokens of one text, with D hidden size, L layers, V vocabulary, a answer tokens:

    24 D^2 L n  +  4 D sum over layers of visible pairs  +  2 D V a        visible pairs: sum over i < n of min(i + 1, window)

`generate`: one forward of the policy, without the last token. `score`: one of the reference, and one of the reward model without output
layer. `train`: epochs x 3 forwards, since the backward pass of a product is two products. Norms, activations, softmax, AdamW and the
choice of tokens count nothing, and so lower the share. `bound s`: seconds that the FLOP take at the products' rates (attention's at the
best of them); `share`: bound / seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor

from benchmarks.ppo import Measured, measure, parse
from benchmarks.synthetic import SIZES, WINDOW, vocabulary


@dataclass(frozen=True)
class Work:
    """Products of one kind: M rows each, `flop` in all; `trained`: with their backward pass."""

    phase: str
    rows: int
    inputs: int
    outputs: int
    flop: float
    trained: bool = False


def visible_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees: sum over i < tokens of min(i + 1, window)."""
    reach = tokens if window is None else min(tokens, window)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def attention_flop(size: str, first: int, tokens: int) -> float:
    """4 D for each visible pair of each layer, for the tokens from `first` on; global and local layers in turn."""
    hidden, layers, _ = SIZES[size]
    windows = [None if layer % 2 == 0 else WINDOW for layer in range(layers)]
    return 4.0 * hidden * sum(visible_pairs(tokens, window) - visible_pairs(first, window) for window in windows)


def trunk_work(phase: str, size: str, rows: int, tokens: int, passes: int = 1, trained: bool = False) -> list[Work]:
    """The linear layers of all blocks: 4 of D x D, one of D x 4D, one of 4D x D; 24 D^2 L FLOP per token and pass."""
    hidden, layers, _ = SIZES[size]
    shapes = ((hidden, hidden, 4), (hidden, 4 * hidden, 1), (4 * hidden, hidden, 1))
    return [
        Work(phase, rows, inputs, outputs, 2.0 * inputs * outputs * count * layers * tokens * passes, trained)
        for inputs, outputs, count in shapes
    ]


def output_work(phase: str, size: str, rows: int, tokens: int, passes: int = 1, trained: bool = False) -> Work:
    """The output layer: 2 D V FLOP per answer token and pass."""
    hidden = SIZES[size][0]
    return Work(phase, rows, hidden, vocabulary(size), 2.0 * hidden * vocabulary(size) * tokens * passes, trained)


def count_work(options: argparse.Namespace, lengths: Sequence[tuple[int, int]]) -> tuple[list[Work], dict[str, float]]:
    """The products of one iteration, and attention's FLOP by phase; `lengths`: tokens (prompt, answer) of each row."""
    size, epochs = options.size, options.epochs
    prompts, answers = sum(prompt for prompt, _ in lengths), sum(answer for _, answer in lengths)
    alive = max(1, round(fmean(sum(answer > position for _, answer in lengths) for position in range(max(a for _, a in lengths)))))
    minibatches = len(lengths) // options.minibatch
    whole, written = (prompts + answers) // minibatches, answers // minibatches
    fed = answers - len(lengths)  # the last token of an answer is fed to nothing
    work = [
        *trunk_work("generate", size, prompts, prompts),
        *trunk_work("generate", size, alive, fed),
        output_work("generate", size, alive, answers),
        *trunk_work("score", size, whole, prompts + answers, passes=2),
        output_work("score", size, written, answers),
        *trunk_work("train", size, whole, prompts + answers, passes=3 * epochs, trained=True),
        output_work("train", size, written, answers, passes=3 * epochs, trained=True),
    ]
    forward = sum(attention_flop(size, 0, prompt + answer) for prompt, answer in lengths)
    writing = sum(attention_flop(size, 0, prompt + answer - 1) for prompt, answer in lengths)
    return work, {"generate": writing, "score": 2 * forward, "train": 3 * epochs * forward}


def rate(work: Work, dtype: torch.dtype, repeats: int, device: str = "cpu") -> float:
    """FLOP per second of plain products of this shape, the quickest of `repeats` each; with the backward pass, of the three together."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    states, weight = random(work.rows, work.inputs), random(work.outputs, work.inputs)
    products: list[Callable[[], Tensor]] = [lambda: states @ weight.T]
    if work.trained:
        gradient = random(work.rows, work.outputs)
        products += [lambda: gradient @ weight, lambda: gradient.T @ states]
    seconds = sum(quickest(product, repeats) for product in products)
    return 2.0 * work.rows * work.inputs * work.outputs * len(products) / seconds


def quickest(run: Callable[[], Tensor], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first one only warms up
        begun = time.perf_counter()
        on_gpu = run().is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="times of each product")
    own, rest = parser.parse_known_args(argv)
    options = parse(rest)
    if options.critic or options.top is not None:
        parser.error("--critic, --top: the FLOP are counted for a trunk that is trained whole, with a value head")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    counted = [count_work(options, lengths) for lengths in found.lengths]
    kinds = counted[0][0]  # shapes of the first iteration stand for all
    rates = {dtype: [rate(work, dtype, own.repeats) for work in kinds] for dtype in (torch.float32, torch.bfloat16)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {' '.join(rest)}\n")
    print("| phase | M | K | N | passes | float32 GFLOP/s | bfloat16 GFLOP/s |\n|---|---|---|---|---|---|---|")
    for work, single, half in zip(kinds, rates[torch.float32], rates[torch.bfloat16], strict=True):
        passes = "forward, backward" if work.trained else "forward"
        print(f"| {work.phase} | {work.rows} | {work.inputs} | {work.outputs} | {passes} | {single / 1e9:.1f} | {half / 1e9:.1f} |")
    used = rates[torch.bfloat16 if options.bf16 else torch.float32]
    print("\n| phase | GFLOP | seconds | GFLOP/s | bound s | share |\n|---|---|---|---|---|---|")
    for phase, flop, seconds, bound in bounds(found, counted, used):
        print(phase_line(phase, flop, seconds, bound))
    return 0


def bounds(
    found: Measured, counted: Sequence[tuple[list[Work], dict[str, float]]], rates: Sequence[float]
) -> list[tuple[str, float, float, float]]:
    """(phase, FLOP, seconds, seconds that the FLOP take at least), the last of all phases; `rates`: of each product."""
    rows = []
    for phase in ("generate", "score", "train"):
        flop = fmean(sum(work.flop for work in works if work.phase == phase) + attention[phase] for works, attention in counted)
        bound = fmean(
            sum(work.flop / speed for work, speed in zip(works, rates, strict=True) if work.phase == phase) + attention[phase] / max(rates)
            for works, attention in counted
        )
        rows.append((phase, flop, median(figures[phase] for figures in found.iterations), bound))
    flops, seconds, least = (sum(row[column] for row in rows) for column in (1, 2, 3))
    return [*rows, ("total", flops, seconds, least)]


def phase_line(phase: str, flop: float, seconds: float, bound: float) -> str:
    return f"| {phase} | {flop / 1e9:.1f} | {seconds:.2f} | {flop / seconds / 1e9:.1f} | {bound:.2f} | {bound / seconds:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
