"""Figures about scores against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward_model import metrics


def test_ties_count_half_and_nan_counts_as_lost() -> None:
    assert metrics.wins([2.0, 0.0, -1.0, math.nan]).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_correlations_by_hand() -> None:
    # x centred -1 0 1, y centred -1 1 0: 1 / 2
    assert metrics.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5, abs=1e-12)
    assert metrics.spearman([1, 2, 3], [10, 1000, 100]) == pytest.approx(0.5, abs=1e-12)
    assert metrics.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(metrics.pearson([1, 1, 1], [1, 2, 3]))
    assert math.isnan(metrics.spearman([], []))


def test_equal_values_share_their_rank() -> None:
    assert metrics.ranks([5, 1, 5, 9]).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_r2_is_measured_against_the_train_mean_not_the_test_mean() -> None:
    target = [1.0, 3.0]
    assert metrics.r2([0.0, 0.0], target, baseline=0.0) == 0.0
    assert metrics.r2([2.0, 2.0], target, baseline=0.0) == pytest.approx(1 - 2 / 10)
    assert metrics.r2(target, target, baseline=0.0) == 1.0
    assert metrics.r2([9.0, 9.0], target, baseline=2.0) < 0


def test_same_sign() -> None:
    assert metrics.same_sign([0.1, -0.1, -2, 3, 0], [0, 0, -1, -1, 5]).tolist() == [1, 0, 1, 0, 1]


def test_pairs_within_a_question() -> None:
    groups = metrics.group_ids(["a", "b", "a", "b", "a"])
    assert groups.tolist() == [0, 1, 0, 1, 0]
    better, worse = metrics.pairs_within(groups, [1.0, 5.0, 3.0, 5.0, 1.0])  # b's two answers are equal: no pair
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(2, 0), (2, 4)]
    empty = metrics.pairs_within(metrics.group_ids([]), [])
    assert [len(part) for part in empty] == [0, 0]


def test_bootstrap_draws_questions_not_rows() -> None:
    """Two questions of 50 equal rows each: whole questions come and go, so the interval is everything from 0 to 1."""
    groups = np.repeat([0, 1], 50)
    right = np.repeat([0.0, 1.0], 50)
    interval = metrics.bootstrap_ratio(right, np.ones(100), groups, 500, seed=0)
    assert interval == (0.0, 1.0)
    rowwise = metrics.bootstrap_ratio(right, np.ones(100), np.arange(100), 500, seed=0)
    assert 0.35 < rowwise.low < 0.45 < 0.55 < rowwise.high < 0.65
    assert metrics.bootstrap_ratio(right, np.ones(100), groups, 500, seed=0) == interval
    assert math.isnan(metrics.bootstrap_ratio([1.0], [1.0], np.array([0]), 500, seed=0).low)


def test_slices_hold_every_row_once_and_keep_equal_values_together() -> None:
    slices = metrics.quantile_slices([0, 0, 0, 0, 0, 1, 2, 3], 4)
    assert sorted(np.concatenate([part.rows for part in slices]).tolist()) == list(range(8))
    assert slices[0].low == slices[0].high == 0 and len(slices[0].rows) == 5
    assert metrics.quantile_slices([], 4) == []


def test_a_calibrated_model_has_no_calibration_error() -> None:
    sure = math.log(3.0)  # sigmoid = 0.75: right three times of four
    table, error = metrics.preference_calibration([sure, sure, sure, -sure])
    assert error == pytest.approx(0.0, abs=1e-12)
    assert [(entry.low, entry.high, entry.count) for entry in table] == [(0.7, pytest.approx(0.8), 4)]
    _, overconfident = metrics.preference_calibration([50.0, -50.0])
    assert overconfident == pytest.approx(0.5, abs=1e-12)


def test_score_calibration_compares_means_of_like_predictions() -> None:
    table, error = metrics.score_calibration([0.0, 0.0, 1.0, 1.0], [1.0, 3.0, 5.0, 7.0], parts=2)
    assert [(entry.expected, entry.observed, entry.count) for entry in table] == [(0.0, 2.0, 2), (1.0, 6.0, 2)]
    assert error == (2 * 2.0 + 2 * 5.0) / 4


def test_fitted_line_by_hand() -> None:
    assert metrics.fitted_line([0.0, 1.0, 2.0], [1.0, 2.0, 6.0]) == pytest.approx((2.5, 0.5))
    assert all(math.isnan(value) for value in metrics.fitted_line([1.0, 1.0], [0.0, 2.0]))
