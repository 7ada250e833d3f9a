"""How seconds and memory of a PPO iteration grow with the batch, the answers' length and the model, through the public trainer.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true python benchmarks/growth.py [--vary batch length size] [options of benchmarks/ppo.py]

A Markdown table for each thing varied; everything else is as in benchmarks/ppo.py, but one epoch and one iteration after one of warm-up.
Every line is a process of its own, so that its peak memory is its own. `start MiB`: packages and models, before the first iteration;
`on top`: what iterations add to it. `seconds per`, `memory per`: total seconds and memory on top for each answer, answer token or
parameter, as a multiple of the first line's: 1.00 in every line is linear growth, more is worse than linear.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.processes import run_contender

SCRIPT = ROOT / "benchmarks" / "ppo.py"
VARIED: dict[str, tuple[str, list[str]]] = {
    "batch": ("--batch", ["16", "32", "64", "128", "256"]),
    "length": ("--new-tokens", ["16", "32", "64", "128", "256"]),
    "size": ("--size", ["xs", "s", "m"]),
}
"""Name -> the option of benchmarks/ppo.py and its values."""
HEAD = "| {} | generate s | score s | train s | total s | CPU s | start MiB | on top MiB | seconds per | memory per |"


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """The figures of one process of benchmarks/ppo.py."""
    return run_contender([sys.executable, str(SCRIPT), *arguments])


def quantity(name: str, value: str, found: Mapping[str, Any]) -> float:
    """How much of what is varied a line has: answers, answer tokens as sampled, or parameters."""
    return {"batch": lambda: float(value), "length": lambda: found["median"]["resp_tokens"], "size": lambda: found["params"]}[name]()


def row(name: str, value: str, found: Mapping[str, Any], first: tuple[float, float] | None) -> tuple[str, tuple[float, float]]:
    """A line of the table, and its seconds and memory per quantity; `first`: those of the first line."""
    median, start = found["median"], found["start_rss_mb"]
    on_top = found["peak_rss_mb"] - start
    amount = quantity(name, value, found)
    per = (median["total"] / amount, on_top / amount)
    relative = [mine / reference if reference else float("nan") for mine, reference in zip(per, first or per, strict=True)]
    seconds = [f"{median[key]:.2f}" for key in ("generate", "score", "train", "total", "cpu_total")]
    cells = [value, *seconds, str(start), str(on_top), *(f"{number:.2f}" for number in relative)]
    return "| " + " | ".join(cells) + " |", per


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vary", nargs="+", default=list(VARIED), choices=VARIED)
    parser.add_argument("--values", nargs="+", help="other values than the usual ones, where one thing is varied")
    options, fixed = parser.parse_known_args(argv)
    if options.values and len(options.vary) > 1:
        parser.error("--values needs --vary with one name")
    fixed = ["--iters", "1", "--warmup", "1", "--epochs", "1", *fixed]
    print(f"benchmarks/ppo.py {' '.join(fixed)}")
    for name in options.vary:
        option, values = VARIED[name]
        head = HEAD.format(option)
        print(f"\n{head}\n{'|---' * head.count(' | ')}|---|", flush=True)
        first: tuple[float, float] | None = None
        for value in options.values or values:
            line, per = row(name, value, run([*fixed, option, value]), first)
            first = first or per
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
