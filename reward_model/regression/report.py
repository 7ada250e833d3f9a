"""Whether a reward model can be trusted to predict scores. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from reward_model.metrics import (
    Floats,
    bootstrap_ratio,
    fitted_line,
    group_ids,
    mean,
    pairs_within,
    pearson,
    quantile_slices,
    r2,
    same_sign,
    score_calibration,
    spearman,
    value_slices,
    wins,
)
from reward_model.report import Breakdown, Check, Figure, Report, calibration_breakdown, column, edges, invariance_check, shown

# Scores may go with length this far, or a little further than the target scores themselves do; beyond, length is what was learnt.
LENGTH_CORRELATION = 0.5
LENGTH_SLACK = 0.1
# An expected calibration error up to this share of the target scores' standard deviation is called calibrated.
CALIBRATED = 0.25


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer with target and prediction in the data's units. Lengths in characters; `question` groups the answers to one question."""

    question: Hashable
    target: float
    predicted: float
    length: int
    prompt_length: int
    values: tuple[str, ...] = ()  # of the columns that the report is broken down by
    spread: float | None = None  # of the predictions by an ensemble's members


def score_report(
    answers: Sequence[ScoredAnswer],
    train_mean: float,
    differences: dict[str, float],
    samples: int,
    seed: int,
    title: str,
    breakdown_by: Sequence[str] = (),
) -> Report:
    """Errors, correlations and order within a question, with intervals by question and the baselines of always predicting
    `train_mean` and of preferring the longer answer.

    differences: what `invariance` measured. samples, seed: of the bootstrap. breakdown_by: names of the answers' `values`.
    """
    groups = group_ids([answer.question for answer in answers])
    predicted, target, length = column(answers, "predicted"), column(answers, "target"), column(answers, "length")
    error, constant = predicted - target, train_mean - target
    ones = np.ones(len(answers))

    squared, absolute, total = error**2, np.abs(error), constant**2
    r2_value = r2(predicted, target, train_mean)
    r2_interval = bootstrap_ratio(total - squared, total, groups, samples, seed)
    sign = same_sign(predicted, target)
    better, worse = pairs_within(groups, target)
    ordered, longer = wins(predicted[better] - predicted[worse]), wins(length[better] - length[worse])
    pair_groups = group_ids(groups[better].tolist())
    pair_interval = bootstrap_ratio(ordered, np.ones(len(ordered)), pair_groups, samples, seed)
    length_correlation, target_length_correlation = pearson(predicted, length), pearson(target, length)
    length_limit = max(LENGTH_CORRELATION, abs(target_length_correlation) + LENGTH_SLACK)
    calibration, calibration_error = score_calibration(predicted, target)
    calibration_limit = CALIBRATED * float(target.std())
    slope, intercept = fitted_line(predicted, target)
    mean_name = "always the mean training score"
    figures = [
        Figure("MSE", mean(squared), bootstrap_ratio(squared, ones, groups, samples, seed), mean(total), mean_name),
        Figure("MAE", mean(absolute), bootstrap_ratio(absolute, ones, groups, samples, seed), mean(np.abs(constant)), mean_name),
        Figure("R2 against the mean training score", r2_value, r2_interval, 0.0, mean_name),
        Figure("Pearson", pearson(predicted, target), baseline=target_length_correlation, baseline_name="length of the answer"),
        Figure("Spearman", spearman(predicted, target), baseline=spearman(length, target), baseline_name="length of the answer"),
        Figure(
            "sign accuracy",
            mean(sign),
            bootstrap_ratio(sign, ones, groups, samples, seed),
            mean(same_sign(np.full(len(answers), train_mean), target)),
            mean_name,
        ),
        Figure("pair accuracy within a question", mean(ordered), pair_interval, mean(longer), "the longer answer wins"),
        Figure("correlation of score with length", length_correlation, None, target_length_correlation, "target scores"),
        Figure("mean predicted score", mean(predicted), baseline=mean(target), baseline_name="mean target score"),
        Figure("calibration slope (of target on prediction)", slope, baseline=1.0, baseline_name="calibrated"),
        Figure("calibration intercept", intercept, baseline=0.0, baseline_name="calibrated"),
        Figure("expected calibration error (score units)", calibration_error),
    ]
    disagreement: list[Breakdown] = []
    if answers and answers[0].spread is not None:
        spreads = column(answers, "spread")
        figures.append(Figure("spread of the readouts", mean(spreads)))
        figures.append(Figure("rank correlation of spread with absolute error", spearman(spreads, absolute)))
        disagreement.append(sliced("by spread of the readouts", spreads, squared, total))
    checks = [
        Check(r2_interval.low > 0, f"better than the mean: R2 {shown(r2_value)}, lower end of its interval {shown(r2_interval.low)}"),
        Check(
            pair_interval.low > 0.5,
            f"orders answers to one question: pair accuracy {shown(mean(ordered))} over {len(ordered)} pairs, "
            f"lower end of its interval {shown(pair_interval.low)}, chance 0.5",
        ),
        Check(
            not abs(length_correlation) > length_limit,
            f"no length meter: correlation of score with length {shown(length_correlation)} (limit {shown(length_limit)})",
        ),
        Check(
            calibration_error <= calibration_limit,
            f"predicts what comes true: expected calibration error {shown(calibration_error)} (limit {shown(calibration_limit)}, a quarter "
            f"of the target scores' standard deviation), slope {shown(slope)}",
        ),
        invariance_check(differences),
    ]
    return Report(
        title=title,
        figures=figures,
        breakdowns=[
            calibration_breakdown("mean predicted (expected) and mean target (observed), by predicted score", calibration),
            *disagreement,
            sliced("by length of the answer (characters)", length, squared, total),
            sliced("by length of the prompt (characters)", column(answers, "prompt_length"), squared, total),
            *(by_value(name, [answer.values[i] for answer in answers], squared, total) for i, name in enumerate(breakdown_by)),
        ],
        checks=checks,
        facts={"answers": len(answers), "questions": int(groups.max()) + 1 if len(groups) else 0, "pairs": len(ordered)},
    )


def sliced(name: str, values: Floats, squared: Floats, total: Floats) -> Breakdown:
    """MSE of the model and of the mean in quartiles of `values`."""
    rows = [
        (*edges(part.low, part.high), len(part.rows), mean(squared[part.rows]), mean(total[part.rows])) for part in quantile_slices(values)
    ]
    return Breakdown(name, ("from", "to", "answers", "MSE", "MSE of the mean"), rows)


def by_value(name: str, values: Sequence[str], squared: Floats, total: Floats) -> Breakdown:
    """MSE of the model and of the mean for each value of a column."""
    rows = [(value, len(part), mean(squared[part]), mean(total[part])) for value, part in value_slices(values)]
    return Breakdown(f"by {name}", (name, "answers", "MSE", "MSE of the mean"), rows)
