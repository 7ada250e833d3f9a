"""Whether a reward model can be trusted to tell the better of two answers. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.metrics import (
    Floats,
    bootstrap_ratio,
    group_ids,
    mean,
    pearson,
    preference_calibration,
    quantile_slices,
    spearman,
    value_slices,
    wins,
)
from reward_model.report import Breakdown, Check, Figure, Report, calibration_breakdown, column, edges, invariance_check, shown

# An expected calibration error below this is called calibrated; score and length more alike than that, one is the other's proxy.
CALIBRATED = 0.1
LENGTH_CORRELATION = 0.5


@dataclass(frozen=True)
class ScoredPair:
    """A pair with its scores. Lengths in characters; `question` groups the pairs of one question."""

    question: Hashable
    chosen_score: float
    rejected_score: float
    chosen_length: int
    rejected_length: int
    prompt_length: int
    values: tuple[str, ...] = ()  # of the columns that the report is broken down by
    spread: float | None = None  # of the margins by an ensemble's members


def pair_report(
    pairs: Sequence[ScoredPair], differences: dict[str, float], samples: int, seed: int, title: str, breakdown_by: Sequence[str] = ()
) -> Report:
    """Accuracy and margin with intervals by question, the longer-wins baseline, calibration, and accuracy in slices.

    differences: what `invariance` measured. samples, seed: of the bootstrap. breakdown_by: names of the pairs' `values`.
    """
    groups = group_ids([pair.question for pair in pairs])
    chosen, rejected = column(pairs, "chosen_score"), column(pairs, "rejected_score")
    margins = chosen - rejected
    length_difference = column(pairs, "chosen_length") - column(pairs, "rejected_length")
    right, longer = wins(margins), wins(length_difference)
    ones = np.ones(len(pairs))
    accuracy = Figure("accuracy", mean(right), bootstrap_ratio(right, ones, groups, samples, seed), mean(longer), "the longer answer wins")
    gain = Figure("accuracy above longer-wins", mean(right - longer), bootstrap_ratio(right - longer, ones, groups, samples, seed))
    scores = np.concatenate([chosen, rejected])
    lengths = np.concatenate([column(pairs, "chosen_length"), column(pairs, "rejected_length")])
    calibration, error = preference_calibration(margins)
    length_correlation = pearson(scores, lengths)
    figures = [
        accuracy,
        gain,
        Figure("accuracy where the chosen answer is shorter", mean(right[length_difference < 0])),
        Figure("mean margin", mean(margins), bootstrap_ratio(margins, ones, groups, samples, seed)),
        Figure("loss (nats)", mean(np.logaddexp(0.0, -margins)), baseline=float(np.log(2.0)), baseline_name="all scores equal"),
        Figure("expected calibration error", error),
        Figure("correlation of score with length", length_correlation),
        Figure("rank correlation of score with length", spearman(scores, lengths)),
    ]
    disagreement: list[Breakdown] = []
    if pairs and pairs[0].spread is not None:
        spreads = column(pairs, "spread")
        figures.append(Figure("spread of the readouts' margins", mean(spreads)))
        disagreement.append(sliced("by spread of the readouts' margins", spreads, right, longer))
    low = accuracy.interval.low if accuracy.interval else float("nan")
    gain_low = gain.interval.low if gain.interval else float("nan")
    checks = [
        Check(low > 0.5, f"better than chance: accuracy {shown(accuracy.value)}, lower end of its interval {shown(low)}, chance 0.5"),
        Check(
            gain_low > 0,
            f"better than counting characters: {shown(gain.value)} above longer-wins, lower end of the interval {shown(gain_low)}",
        ),
        Check(
            not abs(length_correlation) > LENGTH_CORRELATION,
            f"no length meter: correlation of score with length {shown(length_correlation)} (limit {LENGTH_CORRELATION})",
        ),
        Check(error <= CALIBRATED, f"as sure as it is right: expected calibration error {shown(error)} (limit {CALIBRATED})"),
        invariance_check(differences),
    ]
    return Report(
        title=title,
        figures=figures,
        breakdowns=[
            calibration_breakdown("how often the preferred answer won, by how sure the model was", calibration),
            sliced("by margin |chosen - rejected|", np.abs(margins), right, longer),
            *disagreement,
            sliced("by length difference (chosen - rejected, characters)", length_difference, right, longer),
            sliced("by length of the prompt (characters)", column(pairs, "prompt_length"), right, longer),
            *(by_value(name, [pair.values[i] for pair in pairs], right, longer) for i, name in enumerate(breakdown_by)),
        ],
        checks=checks,
        facts={"pairs": len(pairs), "questions": int(groups.max()) + 1 if len(groups) else 0},
    )


def sliced(name: str, values: Floats, right: Floats, longer: Floats) -> Breakdown:
    """Accuracy of the model and of longer-wins in quartiles of `values`."""
    rows = [
        (*edges(part.low, part.high), len(part.rows), mean(right[part.rows]), mean(longer[part.rows])) for part in quantile_slices(values)
    ]
    return Breakdown(name, ("from", "to", "pairs", "accuracy", "longer wins"), rows)


def by_value(name: str, values: Sequence[str], right: Floats, longer: Floats) -> Breakdown:
    """Accuracy of the model and of longer-wins for each value of a column."""
    rows = [(value, len(part), mean(right[part]), mean(longer[part])) for value, part in value_slices(values)]
    return Breakdown(f"by {name}", (name, "pairs", "accuracy", "longer wins"), rows)
