"""Tables of `real_data.py`'s figures, each with its interval and beside the trivial baseline."""

from __future__ import annotations

from typing import Any

# `sft`, `ppo` and the name of each data file of rewards -> the summary of its training, and what its test script found
RealResults = dict[str, Any]

BREAKDOWN_BY_LENGTH = "by length of the prompt (characters)"
BREAKDOWN_BY_DOMAIN = "by Domain"


def markdown(results: RealResults) -> str:
    """The tables for a document."""
    names = [name for name in results if name not in ("sft", "ppo")]
    pairs = {name: results[name] for name in names if name.endswith("classification")}
    scores = {name: results[name] for name in names if name.endswith("regression")}
    parts = [_generators(results), _pairs(pairs), _scores(scores)]
    for name, summary in {**pairs, **scores}.items():
        parts += [_slices(f"{name}, {kind}", summary["breakdowns"].get(key)) for key, kind in _BREAKDOWNS.items()]
    return "\n".join(part for part in parts if part)


_BREAKDOWNS = {BREAKDOWN_BY_DOMAIN: "domain", BREAKDOWN_BY_LENGTH: "prompt length in characters"}


def _generators(results: RealResults) -> str:
    sft, test = results["sft"]["training"]["best_metrics"], results["sft"]["test"]["figures"]
    rows = [
        ("SFT: perplexity of validation answers", f"{sft['val/perplexity']:.1f}"),
        ("SFT: token accuracy of validation answers", f"{sft['val/token_accuracy']:.3f}"),
        ("SFT: BLEU / ROUGE-L of greedy test answers without repeated trigrams", f"{test['bleu']:.2f} / {test['rougeL_fmeasure']:.3f}"),
    ]
    if "ppo" in results:
        ppo = results["ppo"]["training"]
        best = ppo["best_metrics"]
        rows += [
            ("PPO: score of the fixed validation prompts, before and after", f"{ppo['first_score']:.2f} → {ppo['best_value']:.2f}"),
            ("PPO: KL from SFT, nats per answer", f"{best['eval/kl']:.2f}"),
            ("PPO: answers that end / mean length in tokens", f"{best['eval/eos_rate']:.2f} / {best['eval/length']:.0f}"),
        ]
    return table(("figure", "value"), rows)


def _pairs(summaries: dict[str, Any]) -> str:
    rows = []
    for name, summary in summaries.items():
        accuracy, gain = (summary["figures"][figure] for figure in ("accuracy", "accuracy above longer-wins"))
        counts = (name, summary["pairs"], summary["questions"])
        rows.append((*counts, _with_interval(accuracy), _number(accuracy["baseline"]), _with_interval(gain)))
    return table(("pair models on", "pairs", "questions", "accuracy", "longer wins", "above longer wins"), rows) if rows else ""


def _scores(summaries: dict[str, Any]) -> str:
    rows = []
    for name, summary in summaries.items():
        error, rank, within = (summary["figures"][figure] for figure in ("MSE", "Spearman", "pair accuracy within a question"))
        counts = (name, summary["answers"], summary["questions"])
        errors = (_with_interval(error), _number(error["baseline"]))
        rows.append((*counts, *errors, _number(rank["value"]), _with_interval(within), _number(within["baseline"])))
    columns = ("score models on", "answers", "questions", "MSE", "of the train mean", "Spearman", "pairs of a question", "longer wins")
    return table(columns, rows) if rows else ""


def _slices(title: str, rows: list[dict[str, Any]] | None) -> str:
    return f"{title}:\n\n{table(tuple(rows[0]), [tuple(map(_number, row.values())) for row in rows])}" if rows else ""


def _with_interval(figure: dict[str, Any]) -> str:
    """A value with its 95 % interval, where there is one."""
    low, high = figure.get("interval_95", (None, None))
    return _number(figure["value"]) + (f" [{_number(low)}, {_number(high)}]" if low is not None else "")


def _number(value: Any) -> str:
    """Two decimals; a whole number, a word and nothing as they are."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.2f}"
    return "" if value is None else str(value)


def table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table of figures: all columns but the first stand to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"
