"""PPO side by side: this project's trainer, the plain loop, and trl's trainers, in turn, each in its own process.

    python benchmarks/compare.py --envs .bench [--size s] [--eos-hazard 0.04] [--only floor,ours] [--rounds 2]      (or: make bench)

`--envs` holds the peers' environments, as `make bench` makes them: `new` (torch and transformers: the floor), `ppo` (trl 1.12),
`classic` (trl 0.11.4). A contender whose environment or script is missing is left out, and a line says so. Prints a Markdown table:
medians over all rounds' iterations of wall seconds by phase, CPU seconds, ratios to the first contender, and peak memory. CPU seconds
stay comparable where something else computes on the machine, wall seconds do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.processes import try_contender

HERE = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared" / "bench"


@dataclass(frozen=True)
class Contender:
    """A script with its interpreter; `slow` ones (bfloat16 without instructions for it is) run only where `--only` names them."""

    python: Path
    script: Path
    arguments: tuple[str, ...] = ()
    slow: bool = False

    @property
    def missing(self) -> Path | None:
        """What is needed and not there."""
        return next((path for path in (self.python, self.script) if not path.exists()), None)


def contenders(envs: Path) -> dict[str, Contender]:
    plain, classic, trl = (envs / name / "bin" / "python" for name in ("new", "classic", "ppo"))
    ours, floor = Path(sys.executable), HERE / "ppo_floor.py"
    return {
        "floor": Contender(plain if plain.exists() else ours, floor),
        "ours": Contender(ours, HERE / "ppo.py"),
        "ours-top2": Contender(ours, HERE / "ppo.py", ("--top", "2")),
        "ours-bf16": Contender(ours, HERE / "ppo.py", ("--bf16",), slow=True),
        "target": Contender(plain if plain.exists() else ours, SHARED / "ppo_target.py"),
        "trl-classic": Contender(classic, HERE / "ppo_trl_classic.py"),
        "trl-classic-one-by-one": Contender(classic, HERE / "ppo_trl_classic.py", ("--one-by-one",), slow=True),
        "floor-critic": Contender(plain if plain.exists() else ours, floor, ("--critic",)),
        "ours-critic": Contender(ours, HERE / "ppo.py", ("--critic",)),
        "trl-1.12": Contender(trl, HERE / "ppo_trl.py"),
    }


def run(contender: Contender, arguments: Sequence[str]) -> dict[str, Any] | None:
    """What one process of a contender measured; None where it failed."""
    command = [str(contender.python), str(contender.script), *contender.arguments, *arguments]
    return try_contender(command, cwd=contender.script.parent)


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown; ratios are to the first contender."""
    rows = [
        "| contender | generate s | score s | train s | total s | least s | CPU s | to the first | by CPU | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, float] | None = None
    for name, found in results.items():
        iterations = [figures for process in found for figures in process["iters"]]
        median = {key: statistics.median(figures[key] for figures in iterations) for key in iterations[0]}
        first = first or median
        cells = [
            *(f"{median[phase]:.2f}" for phase in ("generate", "score", "train", "total")),
            f"{min(figures['total'] for figures in iterations):.2f}",
            f"{median['cpu_total']:.2f}",
            f"{median['total'] / first['total']:.2f}",
            f"{median['cpu_total'] / first['cpu_total']:.2f}",
            f"{statistics.median(process['peak_rss_mb'] for process in found):.0f}",
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=Path(".bench"), help="folder of the peers' environments")
    parser.add_argument("--only", help="contenders, separated by commas (default: all that are not slow)")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--size", default="s", choices=("xs", "s", "m"))
    parser.add_argument("--iters", default="2", help="PPO iterations per process that count")
    parser.add_argument("--warmup", default="1")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--eos-hazard", default="0", help="probability of EOS at each token; 0.04: answers of about 22 tokens")
    parser.add_argument("--json", type=Path, help="append every process's figures to this file")
    options = parser.parse_args(argv)
    known = contenders(options.envs.absolute())
    chosen = options.only.split(",") if options.only else [name for name, contender in known.items() if not contender.slow]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose among {', '.join(known)}")
    for name in [name for name in chosen if known[name].missing]:
        print(f"left out: {name}, for lack of {known[name].missing}")
        chosen.remove(name)
    arguments: list[str] = []
    for option in ("size", "iters", "warmup", "epochs", "eos_hazard"):
        arguments += [f"--{option.replace('_', '-')}", getattr(options, option)]
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for name in chosen:
            found = run(known[name], arguments)
            if found is None:
                continue
            results.setdefault(name, []).append(found)
            print(f"round {number + 1}: {name} {found['median']['total']:.2f} s per iteration", file=sys.stderr, flush=True)
            if options.json is not None:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"contender": name, **found}) + "\n")
    print(f"\nPPO, per iteration: {' '.join(arguments)}, {options.rounds} rounds; packages of each contender:")
    for name, processes in results.items():
        shown = ("torch", "transformers", "trl")
        print(f"  {name}: " + ", ".join(f"{package} {processes[0]['versions'].get(package, '-')}" for package in shown))
    print("\n" + table(results))
    return 0 if results.keys() == set(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
