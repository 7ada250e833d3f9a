"""What `frontier.py` measured: points, gains by KL as a table, the picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.best_of_n import frontier, kl_bound
from common.runs import write_text_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST_OF_N, OPTIMUM = "best of n", "optimum"
KLS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
GOAL = 0.95
"""Of best-of-n's gain."""
COLOURS = {OPTIMUM: "#8c8c8c", BEST_OF_N: "#4c72b0", "PPO": "#55a868", "RLOO": "#c44e52"}
MARKERS = "osD^vPX*"
NAMED_NS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Measured:
    """One policy of one seed on the prompts of one split.

    setting: n of best of n, else the KL coefficient. kl: nats per answer from the SFT model; score: the reward model's; quality: the
    oracle's, 0-1. step: of a checkpoint.
    """

    seed: int
    method: str
    setting: float
    split: str
    kl: float
    score: float
    quality: float
    step: int | None = None


Height = Callable[[Measured], float]
"""What is drawn upwards."""


def start_score(points: Sequence[Measured], seed: int, split: str) -> float:
    """Mean score of the SFT model itself, which is the best of one."""
    return next(p.score for p in points if (p.seed, p.split, p.method, p.setting) == (seed, split, BEST_OF_N, 1))


def gain(points: Sequence[Measured], seed: int, split: str, method: str, kl: float) -> float:
    """The highest gain over the SFT model's score that a method reaches within `kl` nats (`best_of_n.frontier`)."""
    start = start_score(points, seed, split)
    own = [(p.kl, p.score - start) for p in points if (p.seed, p.split, p.method) == (seed, split, method)]
    return frontier(own, kl)


def table(points: Sequence[Measured]) -> list[dict[str, Any]]:
    """For each split, method and KL: gains, means over seeds, and the ratio to best-of-n's gain with its least over seeds."""
    seeds = sorted({point.seed for point in points})
    rows: list[dict[str, Any]] = []
    for split in dict.fromkeys(point.split for point in points):
        for method in dict.fromkeys(point.method for point in points if point.method != BEST_OF_N):
            for kl in KLS:
                pairs = [(gain(points, s, split, method, kl), gain(points, s, split, BEST_OF_N, kl)) for s in seeds]
                ratios = [own / best for own, best in pairs]
                figures = {"gain": fmean(own for own, _ in pairs), "gain_best_of_n": fmean(best for _, best in pairs)}
                ratio = {"ratio": fmean(ratios), "least_ratio": min(ratios)}
                rows.append({"split": split, "method": method, "kl": kl} | {name: round(v, 4) for name, v in (figures | ratio).items()})
    return rows


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table for the terminal."""
    lines = []
    for split, method in dict.fromkeys((row["split"], row["method"]) for row in rows):
        lines += [
            f"\n{method} on {split} questions: gain in score over the SFT model, mean over seeds",
            f"  {'within KL':>10}{'best of n':>12}{method:>12}{'ratio':>9}{'least seed':>12}",
        ]
        for row in rows:
            if (row["split"], row["method"]) == (split, method):
                figures = (
                    f"  {row['kl']:10.2f}{row['gain_best_of_n']:12.3f}{row['gain']:12.3f}{row['ratio']:9.3f}{row['least_ratio']:12.3f}"
                )
                lines.append(figures + ("" if row["ratio"] >= GOAL else f"   below {GOAL}"))
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The table of a file that `save` wrote, for a document: one for each split, of methods that ran with several KL coefficients."""
    rows, settings = results["table"], {(point["method"], point["setting"]) for point in results["points"]}
    methods = [name for name in results["methods"] if len([1 for method, _ in settings if method == name]) > 1]
    parts = []
    for split in dict.fromkeys(row["split"] for row in rows):
        found = {(row["method"], row["kl"]): row for row in rows if row["split"] == split}
        head = "".join(f" | {method} | of best of n (least seed)" for method in methods)
        lines = [f"| {split} questions: within nats | best of n{head} | {OPTIMUM} |", "|---:" * (3 + 2 * len(methods)) + "|"]
        for kl in dict.fromkeys(row["kl"] for row in rows):
            best = found[OPTIMUM, kl]
            own = [found[method, kl] for method in methods]
            cells = "".join(f" | {row['gain']:.3f} | {row['ratio']:.2f} ({row['least_ratio']:.2f})" for row in own)
            lines.append(f"| {kl:g} | {best['gain_best_of_n']:.3f}{cells} | {best['gain']:.3f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def save(path: Path, about: Mapping[str, Any], rows: Sequence[dict[str, Any]], points: Sequence[Measured]) -> None:
    """Settings, table and points as JSON, a line for each row and point."""
    rounded = [{name: round(value, 5) if isinstance(value, float) else value for name, value in vars(point).items()} for point in points]
    parts = {"table": rows, "points": rounded}
    lists = {name: ",\n  ".join(json.dumps(row) for row in part) for name, part in parts.items()}
    head = json.dumps(about, indent=1).removesuffix("\n}")
    write_text_atomically(path, head + "".join(f',\n "{name}": [\n  {lines}\n ]' for name, lines in lists.items()) + "\n}\n")


def draw(points: Sequence[Measured], path: Path) -> Path:
    """Gain in score and oracle quality against KL, side by side, a row for each split; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(point.split for point in points))
    figure = Figure(figsize=(11, 1.4 + 3.7 * len(splits)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(splits), 2, sharex=True, squeeze=False)
    for split, (left, right) in zip(splits, panels, strict=True):
        own = [point for point in points if point.split == split]
        start = {seed: start_score(points, seed, split) for seed in {point.seed for point in own}}
        _draw_panel(left, own, lambda point, start=start: point.score - start[point.seed])
        _draw_panel(right, own, lambda point: point.quality)
        for axes, title in ((left, "gain in score over SFT (standard deviations)"), (right, "quality by the oracle (0-1)")):
            axes.set_title(f"{split} questions: {title}", fontsize=9, loc="left", fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("KL from the SFT model, nats per answer", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def _draw_panel(axes: Axes, points: Sequence[Measured], height: Height) -> None:
    best = [point for point in points if point.method == BEST_OF_N]
    _draw_curve(
        axes,
        [point for point in points if point.method == OPTIMUM],
        height,
        OPTIMUM,
        "the best that can be: p(answer) exp(score / KL coefficient)",
    )
    _draw_curve(axes, best, height, BEST_OF_N, "best of n at its KL, counted among answers")
    bounds = [(kl_bound(round(n)), y) for n, _, y in _means(best, height)]
    axes.plot(*zip(*bounds, strict=True), ":", color=COLOURS[BEST_OF_N], label="best of n at the upper bound log n - (n - 1) / n")
    for n, kl, y in _means(best, height):
        if n in NAMED_NS:
            axes.plot(kl, y, "o", color=COLOURS[BEST_OF_N], markersize=4)
            axes.annotate(f"{n:g}", (kl, y), textcoords="offset points", xytext=(3, -10), fontsize=7, color=COLOURS[BEST_OF_N])
    runs = sorted({(point.method, point.setting) for point in points if point.step is not None})
    markers = dict(zip(sorted({coef for _, coef in runs}), MARKERS, strict=False))
    for method, coef in runs:
        run = [point for point in points if (point.method, point.setting) == (method, coef)]
        _draw_run(axes, run, height, COLOURS[method], markers[coef], f"{method}, KL coefficient {coef:g}")
    axes.set_xlim(-0.05, KLS[-1] + 0.15)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, points: Sequence[Measured], height: Height, method: str, label: str) -> None:
    """Mean over seeds, and the range of seeds as a band, at the KLs that every seed reaches."""
    curves = []
    for seed in sorted({point.seed for point in points}):
        own = sorted((point.kl, height(point)) for point in points if point.seed == seed)
        curves.append(tuple(zip(*own, strict=True)))
    kls = np.linspace(0, min(kl[-1] for kl, _ in curves), 200)
    heights = np.stack([np.interp(kls, kl, y) for kl, y in curves])
    axes.plot(kls, heights.mean(0), color=COLOURS[method], linewidth=1.6, label=label)
    axes.fill_between(kls, heights.min(0), heights.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)


def _draw_run(axes: Axes, run: Sequence[Measured], height: Height, colour: str, marker: str, label: str) -> None:
    """Means over seeds of the checkpoints, in the order of training; bars at the last one span the seeds."""
    steps = sorted({point.step or 0 for point in run})
    means = [_means([point for point in run if point.step == step], height)[0][1:] for step in steps]
    axes.plot(*zip(*means, strict=True), color=colour, linewidth=0.8, alpha=0.5, marker=".", markersize=3)
    last = [point for point in run if point.step == steps[-1]]
    (kl, y), kls, heights = means[-1], [point.kl for point in last], [height(point) for point in last]
    axes.plot([min(kls), max(kls)], [y, y], color=colour, linewidth=0.8)
    axes.plot([kl, kl], [min(heights), max(heights)], color=colour, linewidth=0.8)
    axes.plot(kl, y, marker, color=colour, markersize=6.5, markeredgecolor="white", zorder=5, label=label)


def _means(points: Sequence[Measured], height: Height) -> list[tuple[float, float, float]]:
    """(setting, mean KL, mean height) over seeds, settings ascending."""
    groups = [[point for point in points if point.setting == setting] for setting in sorted({point.setting for point in points})]
    return [(group[0].setting, fmean(point.kl for point in group), fmean(map(height, group))) for group in groups]
