"""The whole pipeline on the sample data, measured by truth: `make quickstart`.

    python examples/quickstart.py [--seed N] [--measure_only] [--output results/quickstart.json]

Runs the README's commands as they stand there, then lets the oracle judge what every model answers to test questions that training never
saw. Ends with a table and example answers, and writes `results/quickstart.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from examples.pipeline import CommandFailed, environment, run_plan

# figure -> what it is, in the order of the table
TABLE = {
    "pair_accuracy_classification": "pair reward model: held-out pairs ordered rightly",
    "right_vs_wrong_classification": "pair reward model: right against wrong in the same form",
    "pair_accuracy_regression": "score reward model: held-out pairs ordered rightly",
    "right_vs_wrong_regression": "score reward model: right against wrong in the same form",
    "oracle_sft": "SFT, sampled answers: oracle score (0-1)",
    "oracle_sft_greedy": "SFT, greedy answers: oracle score",
    "oracle_best_of_4": "best of 4 SFT samples by the pair model: oracle score",
    "oracle_ppo": "PPO, sampled answers: oracle score",
    "oracle_ppo_greedy": "PPO, greedy answers: oracle score",
    "kl_ppo": "PPO: KL from SFT, nats per answer",
    "eos_rate_ppo": "PPO: answers that end in EOS",
    "commonest_answer_share_ppo": "PPO: share of the commonest answer",
}
PLACES = {
    "SFT model": "sft/models/latest",
    "pair reward model": "reward_model/classification/models/latest",
    "score reward model": "reward_model/regression/models/latest",
    "PPO model": "rlhf/models/latest",
}
EXAMPLES = 6


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="seed of all four trainings (default: the one in the configs)")
    parser.add_argument("--measure_only", action="store_true", help="measure the newest models without running anything")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "quickstart.json", help="where the figures go")
    options = parser.parse_args(argv)
    started = time.monotonic()
    overrides = [f"seed={options.seed}"] if options.seed is not None else []
    try:
        if not options.measure_only:
            run_plan(overrides=overrides)
    except CommandFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    print("\n=== measuring by truth: the oracle judges answers to unseen test questions", flush=True)

    import torch  # after the commands, which are processes of their own

    torch.set_num_threads(int(environment()["OMP_NUM_THREADS"]))
    from common.runs import write_text_atomically
    from examples.measure import measure

    measurement = measure(seed=options.seed or 0)
    figures = {**measurement.figures, "seconds": round(time.monotonic() - started, 1)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.output, json.dumps(figures, indent=2) + "\n")

    print("\nright against wrong by kind of question")
    for name, accuracies in measurement.right_vs_wrong_by_family.items():
        print(f"  {name:15} " + ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(accuracies.items()) if kind != "all"))
    print("\nbefore and after (greedy answers to test questions)")
    greedy = zip(measurement.judged["sft greedy"], measurement.judged["ppo greedy"], strict=True)
    for before, after in list(greedy)[:EXAMPLES]:
        print(f"  {before.question}")
        for name, judged in (("SFT", before), ("PPO", after)):
            print(f"    {name} ({judged.verdict.score:.1f}): {judged.answer.text}")
    print("\nwhat was achieved")
    for name, text in TABLE.items():
        print(f"  {text:58} {figures[name]:6.3f}")
    print(f"  {'seconds, without installing':58} {figures['seconds']:6.1f}")
    print("\nwhere it lies")
    for name, place in PLACES.items():
        print(f"  {name:20} {place} -> {(ROOT / place).resolve().relative_to(ROOT)}")
    print(f"  {'curves':20} curves.png in the run folders above\n  {'figures':20} {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
