"""What the quickstart achieved: the figures of each run and their mean, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from common.runs import write_text_atomically

# figure -> what it is, in the order of the table
FIGURES = {
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
    "seconds": "seconds, without installing",
}
# what is counted by kind of question -> what it is
KINDS = {
    "right_vs_wrong_classification": "pair reward model: right against wrong in the same form",
    "right_vs_wrong_regression": "score reward model: right against wrong in the same form",
    "right_sft_greedy": "SFT, greedy answers: share that are right",
    "right_ppo_greedy": "PPO, greedy answers: share that are right",
}
BARS = {
    "oracle_sft": "SFT sampled",
    "oracle_best_of_4": "SFT best of 4",
    "oracle_ppo": "PPO sampled",
    "oracle_sft_greedy": "SFT greedy",
    "oracle_ppo_greedy": "PPO greedy",
}
COLOURS = {"SFT": "#4c72b0", "PPO": "#55a868"}


@dataclass(frozen=True)
class Example:
    """A test question with the greedy answers of both models and the oracle's scores of them, 0-1."""

    question: str
    sft: str
    sft_score: float
    ppo: str
    ppo_score: float


@dataclass
class Results:
    """By seed (`default`: the configs' own) the figures, and shares by kind of question.

    by_kind: what was counted (a key of KINDS) -> kind of question -> share, 0-1.
    """

    runs: dict[str, dict[str, float]] = field(default_factory=dict)
    by_kind: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    @property
    def mean(self) -> dict[str, float]:
        return {name: fmean(run[name] for run in self.runs.values()) for name in FIGURES}

    @property
    def mean_by_kind(self) -> dict[str, dict[str, float]]:
        """What was counted -> kind of question -> mean share over the runs."""
        first = next(iter(self.by_kind.values()))
        return {name: {kind: fmean(run[name][kind] for run in self.by_kind.values()) for kind in sorted(first[name])} for name in KINDS}

    def save(self, path: Path) -> None:
        """The means under the figures' names, so that one run's file is just its figures; each run beside them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**self.mean, "seeds": self.runs, "by_kind": self.by_kind, "examples": [asdict(e) for e in self.examples]}
        write_text_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(values["seeds"], values["by_kind"], [Example(**example) for example in values["examples"]])


def table_lines(results: Results) -> list[str]:
    """The figures, a column for each run, for the terminal."""
    columns = _columns(results)
    lines = [f"  {'':58}" + "".join(f"{name:>10}" for name in columns)] if len(columns) > 1 else []
    lines += [f"  {text:58}" + "".join(f"{_shown(name, run[name]):>10}" for run in columns.values()) for name, text in FIGURES.items()]
    kinds = list(next(iter(results.mean_by_kind.values())))
    lines += ["", f"  {'by kind of question':58}" + "".join(f"{kind:>27}" for kind in kinds)]
    lines += [
        f"  {KINDS[name]:58}" + "".join(f"{share:27.3f}" for share in shares.values()) for name, shares in results.mean_by_kind.items()
    ]
    return lines


def example_lines(examples: Sequence[Example]) -> list[str]:
    lines = []
    for example in examples:
        lines += [f"  {example.question}", f"    SFT ({example.sft_score:.1f}): {example.sft}"]
        lines.append(f"    PPO ({example.ppo_score:.1f}): {example.ppo}")
    return lines


def markdown(results: Results) -> str:
    """The same tables for a document."""
    columns = _columns(results)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, text in FIGURES.items():
        lines.append(f"| {text} | " + " | ".join(_shown(name, run[name]) for run in columns.values()) + " |")
    kinds = list(next(iter(results.mean_by_kind.values())))
    lines += ["", "| mean by kind of question | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for name, shares in results.mean_by_kind.items():
        lines.append(f"| {KINDS[name]} | " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |")
    lines += ["", "| question | SFT, greedy | oracle | PPO, greedy | oracle |", "|---|---|---:|---|---:|"]
    for e in results.examples:
        question, sft, ppo = (text.replace("|", r"\|") for text in (e.question, e.sft, e.ppo))
        lines.append(f"| {question} | {sft} | {e.sft_score:.1f} | {ppo} | {e.ppo_score:.1f} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> Path:
    """Bars of the mean oracle scores before and after PPO, a dot for each run; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, (name, label) in enumerate(BARS.items()):
        value = results.mean[name]
        axes.barh(position, value, color=COLOURS[label[:3]], height=0.65)
        axes.text(0.01, position, f"{value:.2f}", va="center", color="white", fontsize=9)
        axes.plot([run[name] for run in results.runs.values()], [position] * len(results.runs), "o", color="black", markersize=3)
    axes.set_yticks(range(len(BARS)), list(BARS.values()), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("oracle score of answers to unseen test questions (0-1): mean, and each run as a dot", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _columns(results: Results) -> dict[str, dict[str, float]]:
    """Heading -> figures; the mean where there are several runs."""
    columns = {f"seed {name}" if name.isdigit() else name: run for name, run in results.runs.items()}
    return columns if len(columns) == 1 else {**columns, "mean": results.mean}


def _shown(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "seconds" else f"{value:.2f}" if name == "kl_ppo" else f"{value:.3f}"
