"""Figures of an evaluation, of one model or of two side by side, as numbers and as tables to read."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from common.evaluation.text_metrics import METRICS, corpus_metrics
from common.words import split_words

COLUMNS = ("question", "original_answer", "generated_answer", *METRICS)

MEANINGS = {
    "rows": "questions answered",
    "bleu": "corpus BLEU, 0-100",
    "rouge1_fmeasure": "mean ROUGE-1 F-measure, 0-1",
    "rouge2_fmeasure": "mean ROUGE-2 F-measure, 0-1",
    "rougeL_fmeasure": "mean ROUGE-L F-measure, 0-1",
    "exact_match": "share of answers equal to the original one, 0-1",
    "answer_words": "mean words per answer",
    "empty_answer_rate": "share of answers without a word or number (blank, or nothing but marks such as ...), 0-1",
    "commonest_answer_share": "share of the answer given most often, 0-1",
}

Row = Mapping[str, str]


def figures(rows: Sequence[Row], *, compute_metrics: bool) -> dict[str, float]:
    """Figures over CSV rows, under the names of `MEANINGS`; those that compare with original answers only where there are any."""
    answers = [row["generated_answer"] for row in rows]
    words = [len(split_words(answer)) for answer in answers]
    out: dict[str, float] = {"rows": len(rows)}
    referenced = [row for row in rows if row["original_answer"]]
    if compute_metrics and referenced:
        originals = [row["original_answer"] for row in referenced]
        generated = [row["generated_answer"] for row in referenced]
        out |= corpus_metrics(generated, originals)
        out["exact_match"] = statistics.fmean(a.strip() == b.strip() for a, b in zip(generated, originals, strict=True))
    if rows:
        out["answer_words"] = statistics.fmean(words)
        out["empty_answer_rate"] = statistics.fmean(count == 0 for count in words)
        out["commonest_answer_share"] = Counter(answers).most_common(1)[0][1] / len(answers)
    return out


def differences(first: Sequence[Row], second: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By metric: mean of second minus first over the questions, the half width of its 95 % interval, and how many rows each wins.

    The interval is 1.96 standard errors of the paired differences. BLEU is the mean of the rows' own here. Rows without metrics are
    left out; empty where no row has any.
    """
    out: dict[str, dict[str, float]] = {}
    for metric in METRICS:
        pairs = [(float(a[metric]), float(b[metric])) for a, b in zip(first, second, strict=True) if a[metric] and b[metric]]
        if not pairs:
            continue
        deltas = [b - a for a, b in pairs]
        spread = statistics.stdev(deltas) if len(deltas) > 1 else math.nan
        out[metric] = {
            "difference": statistics.fmean(deltas),
            "interval": 1.96 * spread / math.sqrt(len(deltas)),
            "first_better": sum(delta < 0 for delta in deltas),
            "second_better": sum(delta > 0 for delta in deltas),
            "equal": sum(delta == 0 for delta in deltas),
        }
    return out


def figures_table(named: Mapping[str, Mapping[str, float]]) -> str:
    """A column of figures per model, with what each means."""
    names = [name for name in MEANINGS if any(name in column for column in named.values())]
    cells = [[name, *(_shown(column.get(name)) for column in named.values()), MEANINGS[name]] for name in names]
    return table(["", *named, ""] if len(named) > 1 else ["", "value", ""], cells)


def differences_table(by_metric: Mapping[str, Mapping[str, float]]) -> str:
    """Second model minus first, per question."""
    cells = [
        [
            metric,
            f"{row['difference']:+.4g} ± {row['interval']:.2g}",
            str(int(row["first_better"])),
            str(int(row["second_better"])),
            str(int(row["equal"])),
        ]
        for metric, row in by_metric.items()
    ]
    return table(["mean over questions", "second - first (95 %)", "first better", "second better", "equal"], cells)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces, the first and the last to the left."""
    columns = list(zip(*[head, *rows], strict=True))
    aligned = []
    for place, column in enumerate(columns):
        width = max(map(len, column))
        outer = place in (0, len(columns) - 1)
        aligned.append([cell.ljust(width) if outer else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*aligned, strict=True))


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if float(value).is_integer() and value >= 10 else f"{value:.4g}"
