"""The whole pipeline on the sample data, measured by truth: `make quickstart`.

    python examples/quickstart.py [--seed N [N ...]] [--measure_only] [--output results/quickstart.json]

Runs the README's commands as they stand there, then lets the oracle judge what every model answers to test questions that training never
saw. Ends with a table, example answers and a picture, and writes `results/quickstart.json`; of several seeds each is shown, and the mean.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from examples.pipeline import CommandFailed, environment, run_plan
from examples.results import Example, Results, draw, example_lines, table_lines

PLACES = {
    "SFT model": "sft/models/latest",
    "pair reward model": "reward_model/classification/models/latest",
    "score reward model": "reward_model/regression/models/latest",
    "PPO model": "rlhf/models/latest",
}
EXAMPLES = 2  # of each kind of question


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", help="seed of all four trainings; several: one run each (default: the configs' own)")
    parser.add_argument("--measure_only", action="store_true", help="measure the newest models without running anything")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "quickstart.json", help="where the figures go")
    options = parser.parse_args(argv)
    results = Results()
    if not options.measure_only:
        print("four trainings and their evaluations: about four minutes on two cores; commands that run at the same time name their lines")
    for seed in options.seed or [None]:
        try:
            run(seed, results, measure_only=options.measure_only)
        except CommandFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
            return failure.code

    results.save(options.output)
    picture = draw(results, options.output.with_suffix(".png"))
    print("\nbefore and after (greedy answers to the first test questions of each kind)")
    print("\n".join(example_lines(results.examples)))
    print("\nwhat was achieved")
    print("\n".join(table_lines(results)))
    print("\nwhere it lies")
    for name, place in PLACES.items():
        print(f"  {name:20} {place} -> {(ROOT / place).resolve().relative_to(ROOT)}")
    print(f"  {'curves':20} curves.png in the run folders above\n  {'figures':20} {options.output}, {picture.name}")
    return 0


def run(seed: int | None, results: Results, *, measure_only: bool) -> None:
    """The four trainings and their evaluations, then the oracle's judgement, which is added to `results`. Raises CommandFailed."""
    started = time.monotonic()
    if not measure_only:
        run_plan(overrides=[f"seed={seed}"] if seed is not None else [])
    print("\n=== measuring by truth: the oracle judges answers to unseen test questions", flush=True)

    import torch  # after the commands, which are processes of their own

    torch.set_num_threads(int(environment()["OMP_NUM_THREADS"]))
    from examples.measure import family, measure

    measurement = measure(seed=seed or 0)
    name = "default" if seed is None else str(seed)
    results.runs[name] = {**measurement.figures, "seconds": round(time.monotonic() - started, 1)}
    results.by_kind[name] = measurement.by_kind
    if not results.examples:
        kinds: dict[str, list[Example]] = {}
        for before, after in zip(measurement.judged["sft greedy"], measurement.judged["ppo greedy"], strict=True):
            example = Example(before.question, before.answer.text, before.verdict.score, after.answer.text, after.verdict.score)
            kinds.setdefault(family(before.question), []).append(example)
        results.examples = [example for kind in sorted(kinds) for example in kinds[kind][:EXAMPLES]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
