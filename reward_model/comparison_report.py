"""What a comparison of readouts found: figures with spread over seeds and intervals by question, a table, a picture. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.disk import amount
from common.records import PairRecord, ScoreRecord, question_key
from reward_model.metrics import Floats, Interval, Ints, bootstrap_ratio, group_ids, mean, wins
from reward_model.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Metric:
    """The figure that readouts are compared by: a mean over the N pairs or answers of a split, beside that of a rule without a model."""

    name: str
    more_is_better: bool
    unit: str
    """What there are N of."""
    baseline: str
    """The rule."""
    above: str
    """Heading of how much better the readouts are."""


METRICS = {
    "pairs": Metric("accuracy", True, "pairs", "the longer answer wins", "above longer wins"),
    "scores": Metric("MSE", False, "answers", "always the mean training score", "below the mean's"),
}


@dataclass(frozen=True)
class Rows:
    """The N pairs or answers of a split."""

    groups: Ints
    """(N,): their questions."""
    baseline: Floats
    """(N,): the metric of the rule on each."""
    measure: Callable[[Sequence[float]], Floats]
    """Final scores of all answers, row by row, to the metric of the model on each: (N,)."""

    @classmethod
    def of_pairs(cls, records: Sequence[PairRecord]) -> Rows:
        """Whether the chosen answer wins each pair; a tie counts half. The scores are those of chosen and rejected answers in turn."""
        pairs = [(record, answer) for record in records for answer in record.rejected]
        chosen, rejected, place = [], [], 0
        for record in records:
            chosen += [place] * len(record.rejected)
            rejected += range(place + 1, place + 1 + len(record.rejected))
            place += 1 + len(record.rejected)

        def measure(scores: Sequence[float]) -> Floats:
            values = np.asarray(scores, dtype=np.float64)
            assert len(values) == place, "a score for every answer"
            return wins(values[chosen] - values[rejected])

        longer = wins([len(record.chosen) - len(answer) for record, answer in pairs])
        return cls(group_ids([question_key(record.prompt) for record, _ in pairs]), longer, measure)

    @classmethod
    def of_scores(cls, records: Sequence[ScoreRecord], train_mean: float) -> Rows:
        """The squared error of each answer's score, in the data's units."""
        target = np.array([record.score for record in records], dtype=np.float64)
        groups = group_ids([question_key(record.prompt) for record in records])
        return cls(groups, (target - train_mean) ** 2, lambda scores: (np.asarray(scores, dtype=np.float64) - target) ** 2)


@dataclass(frozen=True)
class Measured:
    """The metric of a readout on one split.

    seeds               for each seed
    interval            95 % of the mean over the seeds, when questions are drawn again
    gain, gain_interval by how much that mean is better than the rule's, and its 95 %
    """

    seeds: list[float]
    interval: Interval
    gain: float
    gain_interval: Interval

    @classmethod
    def of(cls, values: Sequence[Floats], rows: Rows, objective: str, samples: int, seed: int) -> Measured:
        """`values`: of each seed, (N,). `samples`, `seed`: of the bootstrap."""
        average, ones = np.mean(values, axis=0), np.ones(len(rows.baseline))
        better = average - rows.baseline if METRICS[objective].more_is_better else rows.baseline - average
        return cls(
            [mean(one) for one in values],
            bootstrap_ratio(average, ones, rows.groups, samples, seed),
            mean(better),
            bootstrap_ratio(better, ones, rows.groups, samples, seed),
        )

    @property
    def mean(self) -> float:
        return mean(self.seeds)

    @classmethod
    def load(cls, values: dict[str, Any]) -> Measured:
        interval, gain = (
            Interval(*(float("nan") if end is None else end for end in values[name])) for name in ("interval", "gain_interval")
        )
        return cls(values["seeds"], interval, values["gain"], gain)


@dataclass(frozen=True)
class Compared:
    """A readout under the best of its learning rates.

    parameters  that train              seconds     of a whole run, for each seed
    monitored   the best value of `monitor` for each seed; None where it was never finite
    tokens      `all` or `one`: whether the readout reads every token's states or one token's
    """

    label: str
    learning_rate: float
    parameters: int
    seconds: list[float]
    monitored: list[float | None]
    tokens: str
    val: Measured
    test: Measured | None

    @property
    def shown(self) -> Measured:
        """The figures that nothing was chosen by, where there are such: those of the test split."""
        return self.test or self.val


@dataclass(frozen=True)
class States:
    """A cache that readouts share: what it keeps of each answer, its size and the time to fill it."""

    kept: str
    readouts: list[str]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """`rows`, `questions`: of each split. `baseline`: the metric of the rule on each. `chosen`: the readout that validates best.

    `unit`: of all times, `seconds` or `core seconds`.
    """

    objective: str
    data: str
    backbone: str
    backbone_parameters: int
    monitor: str
    rows: dict[str, int]
    questions: dict[str, int]
    baseline: dict[str, float]
    seeds: list[int]
    unit: str
    states: list[States]
    readouts: list[Compared]
    chosen: str
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        return METRICS[self.objective]

    @property
    def split(self) -> str:
        """The split whose figures are shown first."""
        return "test" if "test" in self.rows else "val"

    def json(self) -> str:
        return json.dumps(_plain(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, values: dict[str, Any]) -> Comparison:
        readouts = [
            Compared(**{**one, "val": Measured.load(one["val"]), "test": Measured.load(one["test"]) if one["test"] else None})
            for one in values["readouts"]
        ]
        return cls(**{**values, "states": [States(**one) for one in values["states"]], "readouts": readouts})


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else number(value)


# --- table -------------------------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """The table for a document, the rule without a model first, and what a reader has to know of it."""
    metric, split = comparison.metric, comparison.split
    splits = ["test", "val"] if split == "test" else ["val"]
    names = {"test": "test", "val": "validation"}
    heads = ["readout", *(f"{names[name]} {metric.name} (of the seeds)" for name in splits), "95 % by question", metric.above]
    heads += ["learning rate", "parameters", comparison.unit]
    rule = [f"*{metric.baseline}*", *(f"{comparison.baseline[name]:.3f}" for name in splits)]
    lines = [heads, [*rule, *[""] * (len(heads) - len(rule))]]
    for one in comparison.readouts:
        figures = [_with_seeds(one.test if name == "test" else one.val) for name in splits]
        cells = [f"**{one.label}**" if one.label == comparison.chosen else one.label, *figures, _interval(one.shown.interval)]
        cells += [f"{one.shown.gain:+.3f} {_interval(one.shown.gain_interval)}", f"{one.learning_rate:g}"]
        lines.append([*cells, f"{one.parameters:,}", f"{mean(one.seconds):.1f}"])
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    table.insert(1, "|---|" + "---:|" * (len(heads) - 1))
    return "\n".join([*table, "", *notes(comparison), ""])


def notes(comparison: Comparison) -> list[str]:
    """Lines below the table."""
    rows = "; ".join(f"{comparison.rows[name]:,} of {comparison.questions[name]:,} questions in {name}" for name in comparison.rows)
    lines = [
        f"{comparison.metric.unit}: {rows}. Seeds {', '.join(map(str, comparison.seeds))}: mean (least to most). In bold the readout whose "
        f"{comparison.monitor} is best on average.",
    ]
    kept = [f"{', '.join(one.readouts)}: {one.kept}, {amount(one.bytes)}, {one.seconds:.1f} {comparison.unit}" for one in comparison.states]
    if kept:
        lines.append(f"States of the backbone ({comparison.backbone_parameters:,} parameters), computed once: {'; '.join(kept)}.")
    for why in dict.fromkeys(comparison.left_out.values()):
        names = [name for name, reason in comparison.left_out.items() if reason == why]
        lines.append(f"Left out: {', '.join(names)} ({why}).")
    return lines


def table_csv(runs: Sequence[dict[str, Any]]) -> str:
    """One line for each training."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(runs[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    return text.getvalue()


def _with_seeds(measured: Measured | None) -> str:
    if measured is None:
        return ""
    spread = f" ({min(measured.seeds):.3f} to {max(measured.seeds):.3f})" if len(measured.seeds) > 1 else ""
    return f"{measured.mean:.3f}{spread}"


def _interval(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]" if np.isfinite(interval.low) else ""


# --- picture -----------------------------------------------------------------------------------------------------------------------

COLOURS = {"one": "#3b6fb6", "all": "#d1702a"}
READS = {"one": "reads one token", "all": "reads every token"}
BASELINE_COLOUR = "#555555"
ROW_INCHES, PANEL_INCHES, TIME_INCHES = 0.34, 3.1, 1.7


def draw(grid: Sequence[Sequence[Comparison]], path: Path) -> Path:
    """Write `picture(grid)`; returns the path."""
    picture(grid).savefig(path)
    return path


def picture(grid: Sequence[Sequence[Comparison]]) -> Figure:
    """A panel for each comparison, those of one line of the grid over the same backbone.

    To the right is better everywhere. The dot is the mean over seeds, small dots are the seeds, the bar is the interval by question, the
    dashed line the rule without a model; at the end of a line, what a training takes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    orders = [_order(line) for line in grid]
    columns = max(len(line) for line in grid)
    heights = [0.95 + ROW_INCHES * len(order) for order in orders]
    figure = Figure(figsize=(2.1 + PANEL_INCHES * columns + TIME_INCHES, sum(heights) + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {"width_ratios": [PANEL_INCHES] * columns + [TIME_INCHES], "height_ratios": heights}
    axes = figure.subplots(len(grid), columns + 1, squeeze=False, gridspec_kw=ratios)
    for line, order, row in zip(grid, orders, axes, strict=True):
        for place, panel in enumerate(row[:-1]):
            if place >= len(line):
                panel.set_axis_off()
                continue
            _draw_panel(panel, line[place], order)
            panel.set_yticks(range(len(order)), order if place == 0 else [""] * len(order), fontsize=8.5)
        frozen = ", frozen" if line[0].states else ""
        row[0].set_ylabel(f"{line[0].backbone}\n{_short(line[0].backbone_parameters)}{frozen}", fontsize=10, fontweight="bold")
        _draw_costs(row[-1], line, order)
    marks = [Line2D([], [], color=colour, marker="o", linewidth=4, alpha=0.9, label=READS[tokens]) for tokens, colour in COLOURS.items()]
    marks.append(Line2D([], [], color=BASELINE_COLOUR, linestyle="--", label="a rule without a model (green: better than it)"))
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return figure


def _order(line: Sequence[Comparison]) -> list[str]:
    """The readouts of a line of panels, the last the best on average by rank."""
    ranks: dict[str, list[int]] = {}
    for comparison in line:
        for rank, one in enumerate(sorted(comparison.readouts, key=lambda one: one.shown.gain)):
            ranks.setdefault(one.label, []).append(rank)
    return sorted(ranks, key=lambda label: mean(ranks[label]))


def _draw_panel(axes: Axes, comparison: Comparison, order: Sequence[str]) -> None:
    metric, split = comparison.metric, comparison.split
    baseline = comparison.baseline[split]
    for one in comparison.readouts:
        place, colour, shown = order.index(one.label), COLOURS[one.tokens], one.shown
        axes.plot(shown.interval, [place, place], color=colour, alpha=0.3, linewidth=7, solid_capstyle="round")
        axes.plot(shown.seeds, [place] * len(shown.seeds), "o", color=colour, markersize=3.2, alpha=0.75, markeredgewidth=0)
        axes.plot([shown.mean], [place], "o", color=colour, markersize=8, markeredgecolor="white", markeredgewidth=1.2, zorder=4)
        axes.annotate(
            f"{shown.mean:.2f}", (shown.mean, place), xytext=(0, 6.5), textcoords="offset points", ha="center", fontsize=7, color=colour
        )
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    low, high = min(low, baseline - 0.03 * (high - low)), max(high, baseline + 0.03 * (high - low))
    better = (baseline, high) if metric.more_is_better else (low, baseline)
    axes.axvspan(*better, color="#5a9e6f", alpha=0.09, linewidth=0)
    axes.axvline(baseline, color=BASELINE_COLOUR, linestyle="--", linewidth=1.1, zorder=3)
    axes.set_xlim((low, high) if metric.more_is_better else (high, low))
    axes.set_ylim(-0.6, len(order) - 0.2)
    rows = f"{comparison.rows[split]:,} {metric.unit} of {comparison.questions[split]:,} questions"
    axes.set_title(f"{comparison.data}\n", fontsize=9.5, fontweight="bold", loc="left")
    axes.text(0, 1.015, f"{split}: {rows}", transform=axes.transAxes, fontsize=7.5, color="#555555")
    axes.set_xlabel(f"{metric.name}  (dashed: {metric.baseline}, {baseline:.2f})", fontsize=7.5)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_costs(axes: Axes, line: Sequence[Comparison], order: Sequence[str]) -> None:
    """Time of one training, mean over seeds and the panels of the line, and parameters that train."""
    found = {label: [one for comparison in line for one in comparison.readouts if one.label == label] for label in order}
    seconds = {label: mean([mean(one.seconds) for one in found[label]]) for label in order}
    most = max(seconds.values())
    for place, label in enumerate(order):
        one = found[label][0]
        axes.barh(place, seconds[label], height=0.45, color=COLOURS[one.tokens], alpha=0.75)
        text = f"{seconds[label]:.1f} s, {_short(one.parameters)} weights"
        axes.text(seconds[label] + most * 0.04, place, text, va="center", fontsize=7, color="#333333")
    axes.set_xlim(0, most * 2.8)
    axes.set_ylim(-0.6, len(order) - 0.2)
    axes.set_title("price\n", fontsize=9.5, fontweight="bold", loc="left")
    axes.text(0, 1.015, f"{line[0].unit} of a training", transform=axes.transAxes, fontsize=7.5, color="#555555")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k" if count >= 1e4 else f"{count:,}"
