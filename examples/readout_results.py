"""Tables of `compare_readouts.py`'s figures: a table for each backbone, the rule without a model first."""

from __future__ import annotations

from typing import Any

from examples.real_results import table
from reward_model.comparison_report import Compared, Comparison
from reward_model.metrics import mean


def load(results: dict[str, dict[str, Any]]) -> list[list[Comparison]]:
    """The comparisons of each backbone, backbones in the order of the file."""
    return [[Comparison.load(values) for values in by_data.values()] for by_data in results.values()]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The tables for a document."""
    return "\n".join(_of_backbone(line) for line in load(results))


def _of_backbone(line: list[Comparison]) -> str:
    first = line[0]
    heads = [f"{first.backbone}, {first.backbone_parameters / 1e6:.2g} M parameters"]
    heads += [
        f"{one.data}: {one.metric.name} on {one.rows[one.split]} {one.metric.unit} of {one.questions[one.split]} questions" for one in line
    ]
    columns = (*heads, "parameters", f"{first.unit} of a training")
    rows = [("*a rule without a model*", *(f"{one.baseline[one.split]:.2f} ({one.metric.baseline})" for one in line), "0", "")]
    for label in [readout.label for readout in first.readouts]:
        found = [next(readout for readout in one.readouts if readout.label == label) for one in line]
        cells = [_cell(readout, label == one.chosen) for readout, one in zip(found, line, strict=True)]
        seconds = mean([mean(readout.seconds) for readout in found])
        rows.append((label, *cells, f"{found[0].parameters:,}", f"{seconds:.1f}"))
    caches = [sum(states.seconds for states in one.states) for one in line]
    notes = f"States of the backbone, once: {', '.join(f'{seconds:.0f}' for seconds in caches)} {first.unit}."
    return f"{table(columns, rows)}\n{notes}\n"


def _cell(readout: Compared, chosen: bool) -> str:
    """Mean over seeds, in bold where validation chose the readout; least and most of the seeds; 95 % by question."""
    shown = readout.shown
    value = f"**{shown.mean:.2f}**" if chosen else f"{shown.mean:.2f}"
    low, high = shown.interval
    return f"{value} ({min(shown.seeds):.2f} to {max(shown.seeds):.2f}) [{low:.2f}, {high:.2f}]"
