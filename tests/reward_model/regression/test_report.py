"""The report on a score predictor: figures by hand, in the data's units, against the mean training score."""

from __future__ import annotations

import json

import pytest

from reward_model.regression.report import ScoredAnswer, score_report
from reward_model.report import Report

SAME = {"in batches": 0.0}


def report(rows: list[tuple[int, float, float, int]], train_mean: float = 0.0) -> Report:
    answers = [ScoredAnswer(question, target, predicted, length, 30) for question, target, predicted, length in rows]
    return score_report(answers, train_mean, SAME, samples=200, seed=0, title="model")


def test_figures_by_hand() -> None:
    # (question, target, predicted, length)
    result = report([(0, 2.0, 1.0, 10), (0, -1.0, 2.0, 20), (1, 4.0, 4.0, 30), (1, 0.0, -1.0, 5)], train_mean=1.0)
    figures = {figure.name: figure for figure in result.figures}
    assert figures["MSE"].value == pytest.approx((1 + 9 + 0 + 1) / 4)
    assert figures["MSE"].baseline == pytest.approx((1 + 4 + 9 + 1) / 4)
    assert figures["MAE"].value == pytest.approx((1 + 3 + 0 + 1) / 4)
    assert figures["R2 against the mean training score"].value == pytest.approx(1 - 11 / 15)
    assert figures["sign accuracy"].value == 0.5  # 2/1 and 4/4 agree; -1/2 and 0/-1 do not
    assert figures["sign accuracy"].baseline == 0.75  # the mean 1 is not negative; one target is
    assert figures["pair accuracy within a question"].value == 0.5
    assert figures["pair accuracy within a question"].baseline == 0.5  # question 0: the shorter is better; question 1: the longer


def test_calibration_by_hand() -> None:
    """Twice too wide: target = 0.5 * prediction + 1. Each prediction is a slice of its own."""
    result = report([(number, 0.5 * p + 1.0, p, 10) for number, p in enumerate([-4.0, 0.0, 2.0, 6.0])])
    figures = {figure.name: figure.value for figure in result.figures}
    assert figures["calibration slope (of target on prediction)"] == pytest.approx(0.5)
    assert figures["calibration intercept"] == pytest.approx(1.0)
    assert figures["expected calibration error (score units)"] == pytest.approx((3 + 1 + 0 + 2) / 4)
    [check] = [check for check in result.checks if "calibration" in check.text]
    assert not check.passed  # 1.5, and a quarter of the targets' deviation is 0.45


def test_pairs_never_cross_questions() -> None:
    result = report([(0, 1.0, 0.0, 1), (1, 2.0, -5.0, 1)])
    assert result.facts["pairs"] == 0
    assert result.json()["figures"]["pair accuracy within a question"]["value"] is None


def test_predicting_the_mean_is_not_trusted_and_predicting_well_is() -> None:
    rows = [(number // 2, float(number % 2) * 2 - 1, 0.0, 10 + number % 3) for number in range(60)]
    assert report(rows).json()["trustworthy"] is False
    good = [(question, target, 0.9 * target, length) for question, target, _, length in rows]
    result = report(good)
    assert [check.text for check in result.checks if not check.passed] == []
    json.dumps(result.json(), allow_nan=False)
    assert "always the mean training score" in str(result)
