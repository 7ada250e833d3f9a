"""The curves of a run as one picture, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.tracking import METRICS_CSV, STEP, TIME, better, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
COLUMNS = 3
PANEL_INCHES = (4.2, 2.6)
NOTE_WIDTH = 75  # characters below a panel
SMOOTH_FROM = 20  # points from which a smoothed curve helps more than it hides
COLOURS = {"train": "#4c72b0", "val": "#c44e52", "eval": "#c44e52"}
OTHER_COLOUR = "#55a868"
MAX_PANELS = 12
MAX_NAMED = 12  # constant metrics that the note names
# The panels that tell most, by title (a metric, or what follows the slash where training and evaluation share a panel).
IMPORTANCE = (
    "loss", "score", "eval/penalised_score", "accuracy", "val/accuracy", "val/token_accuracy", "val/pair_accuracy", "val/spearman",
    "val/r2", "eval/kl", "objective/kl", "eos_rate", "val/eos_rate", "eval/length", "ppo/policy/entropy", "ppo/policy/clipfrac",
    "ppo/policy/approxkl", "ppo/val/explained_variance", "ppo/loss/value", "val/bleu", "val/rougeL_fmeasure", "margin", "val/margin",
    "val/mae", "eval/distinct_share", "train/grad_norm", "train/lr", "ppo/learning_rate", "objective/kl_coef", "val/score_mean",
)  # fmt: skip
# After those, panels shared by training and evaluation, then these prefixes, then others.
PREFIX_ORDER = ("val", "eval", "objective", "reward", "ppo", "train")
# Set by a schedule or controller: no noise to smooth away.
EXACT = ("lr", "kl_coef")
HIDDEN_PREFIXES = frozenset({"perf", "time"})

Series = list[tuple[int, float]]


def plot_curves(run_dir: Path, *, title: str | None = None) -> Path:
    """Draw `curves.png` beside the metrics and return its path; raises ValueError where the run logged nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = group_panels(read_series(run_dir))
    if not everything:
        raise ValueError(f"{run_dir}: no metrics to draw")
    panels, note = choose_panels(everything)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or f"{run_dir.parent.name}/{run_dir.name}", fontsize=11)
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, NOTE_WIDTH * columns)), fontsize=7, color="#555555", x=0.01, ha="left")
    last_step = max(series[-1][0] for panel in panels.values() for series in panel.values())
    for number, (name, panel) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw_panel(axes, name, panel, last_step)
        if number > len(panels) - columns:
            axes.set_xlabel("step", fontsize=8)
    path = run_dir / CURVES_FILE
    figure.savefig(path)
    return path


def read_series(run_dir: Path) -> dict[str, Series]:
    """Finite values of each metric by step, ascending; of several at one step the last."""
    series: dict[str, dict[int, float]] = {}
    for line in read_metrics(run_dir):
        for name, value in line.items():
            if name not in (STEP, TIME) and value is not None:
                series.setdefault(name, {})[line[STEP]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def group_panels(series: dict[str, Series]) -> dict[str, dict[str, Series]]:
    """Panels by title, each with its series by full name: `train/x`, `val/x` and `eval/x` share one, called `x`."""

    def shared(name: str) -> bool:
        prefix, _, rest = name.partition("/")
        return prefix in COLOURS and sum(f"{other}/{rest}" in series for other in COLOURS) > 1

    def title(name: str) -> str:
        return name.partition("/")[2] if shared(name) else name

    def order(name: str) -> tuple[int, bool, int, bool, str]:
        prefix = name.split("/")[0]
        rank = PREFIX_ORDER.index(prefix) if prefix in PREFIX_ORDER and not shared(name) else len(PREFIX_ORDER)
        importance = IMPORTANCE.index(title(name)) if title(name) in IMPORTANCE else len(IMPORTANCE)
        return importance, not shared(name), rank, not name.endswith("/loss"), name

    panels: dict[str, dict[str, Series]] = {}
    for name in sorted((name for name in series if name.split("/")[0] not in HIDDEN_PREFIXES and name != "train/epoch"), key=order):
        panels.setdefault(title(name), {})[name] = series[name]
    return panels


def choose_panels(panels: dict[str, dict[str, Series]]) -> tuple[dict[str, dict[str, Series]], str]:
    """The first `MAX_PANELS` that show a change and not the same curve again, and a note on what is left out."""
    chosen: dict[str, dict[str, Series]] = {}
    constant: list[str] = []
    drawn: set[tuple[tuple[int, str], ...]] = set()
    left_out = 0
    for title, panel in panels.items():
        curves = {tuple((step, f"{value:.5g}") for step, value in points) for points in panel.values()}
        if all(len(curve) > 1 and len({value for _, value in curve}) == 1 for curve in curves):
            constant += [f"{name} {points[0][1]:.4g}" for name, points in panel.items()]
        elif curves <= drawn:
            continue
        elif len(chosen) == MAX_PANELS:
            left_out += 1
        else:
            chosen[title] = panel
            drawn |= curves
    if not chosen:  # nothing changed at all: better a flat picture than none
        return dict(list(panels.items())[:MAX_PANELS]), ""
    notes = []
    if constant:
        more = len(constant) - MAX_NAMED
        notes.append(f"constant, not drawn: {', '.join(constant[:MAX_NAMED])}{f' and {more} more' if more > 0 else ''}")
    if left_out:
        notes.append(f"{left_out} further metrics are in {METRICS_CSV}")
    return chosen, "; ".join(notes)


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` points, unbiased at its start (weights sum to 1 everywhere)."""
    keep = 1.0 - 2.0 / (span + 1.0)
    total = weight = 0.0
    averages = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1.0
        averages.append(total / weight)
    return averages


def _draw_panel(axes: Axes, title: str, panel: dict[str, Series], last_step: int) -> None:
    for name, points in panel.items():
        prefix = name.split("/")[0]
        _draw_series(axes, name, points, COLOURS.get(prefix, OTHER_COLOUR))
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axes.set_xlim(0, last_step * 1.02 or 1)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.3g}")
    axes.margins(y=0.14)
    if len(panel) > 1:
        axes.legend(fontsize=7, frameon=False)


def _draw_series(axes: Axes, name: str, points: Series, colour: str) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    if len(points) >= SMOOTH_FROM and not name.endswith(EXACT):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, max(5.0, len(points) / 15)), color=colour, linewidth=1.6, label=name)
    else:
        axes.plot(steps, values, color=colour, linewidth=1.4, marker="o" if len(points) < SMOOTH_FROM else "", markersize=3, label=name)
    direction = better(name)
    if direction is not None:
        _mark_best(axes, points, direction, colour)


def _mark_best(axes: Axes, points: Series, direction: str, colour: str) -> None:
    step, value = (min if direction == "min" else max)(points, key=lambda point: point[1])
    axes.plot([step], [value], marker="*", markersize=9, color=colour, markeredgecolor="white", markeredgewidth=0.6, zorder=5)
    # Below a minimum and above a maximum no curve is in the way.
    beside = (0, -11) if direction == "min" else (0, 6)
    at_the_right = step > points[-1][0] * 0.9
    axes.annotate(
        f"{value:.4g}",
        (step, value),
        textcoords="offset points",
        xytext=beside,
        ha="right" if at_the_right else "center",
        fontsize=7,
        color=colour,
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},  # readable above other curves
        zorder=6,
    )
