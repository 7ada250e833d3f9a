"""Score transforms, by hand and as round trips."""

from __future__ import annotations

import math

import pytest

from common.errors import UserError
from common.score_transform import ScoreTransform

SCORES = [-3.0, 1.0, 5.0, 5.0]  # mean 2, population variance (25 + 1 + 9 + 9) / 4 = 11


def test_standardize_by_hand() -> None:
    transform = ScoreTransform.fit("standardize", SCORES)
    assert (transform.shift, transform.scale) == (2.0, math.sqrt(11.0))
    assert transform.apply([2.0, 2.0 + math.sqrt(11.0)]) == pytest.approx([0.0, 1.0], abs=1e-12)


def test_minmax_by_hand() -> None:
    transform = ScoreTransform.fit("minmax", SCORES)
    assert transform.apply([-3.0, 1.0, 5.0]) == [0.0, 0.5, 1.0]
    assert transform.invert([0.25]) == [-1.0]


def test_log1p_keeps_the_sign() -> None:
    transform = ScoreTransform.fit("log1p", SCORES)
    assert transform.apply([math.e - 1, 1 - math.e, 0.0]) == pytest.approx([1.0, -1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("name", ["none", "standardize", "log1p", "minmax"])
def test_invert_undoes_apply(name: str) -> None:
    transform = ScoreTransform.fit(name, SCORES)
    values = [-40.0, -0.5, 0.0, 0.25, 3.0, 1e4]
    assert transform.invert(transform.apply(values)) == pytest.approx(values, rel=1e-12, abs=1e-12)
    assert ScoreTransform.model_validate_json(transform.model_dump_json()) == transform


@pytest.mark.parametrize("name", ["none", "standardize", "log1p", "minmax"])
def test_order_is_kept(name: str) -> None:
    values = sorted([-7.0, -0.1, 0.0, 2.0, 9.0])
    assert ScoreTransform.fit(name, SCORES).apply(values) == sorted(ScoreTransform.fit(name, SCORES).apply(values))


@pytest.mark.parametrize(
    ("name", "scores"),
    [("none", [0.0, 1e19]), ("standardize", [1e300, -1e300]), ("standardize", [1e308, 1e308]), ("minmax", [-1e308, 1e308])],
)
def test_scores_that_stay_too_large_to_be_squared_are_refused(name: str, scores: list[float]) -> None:
    with pytest.raises(UserError, match=f"{name} of training scores from .* is too large for the loss"):
        ScoreTransform.fit(name, scores)
    assert max(ScoreTransform.fit("log1p", scores).apply(scores)) < 1000


@pytest.mark.parametrize("name", ["standardize", "minmax"])
def test_equal_scores_keep_their_scale(name: str) -> None:
    transform = ScoreTransform.fit(name, [4.0, 4.0])
    assert transform.apply([4.0, 5.0]) == [0.0, 1.0]


def test_wild_predictions_do_not_raise() -> None:
    out, nan = ScoreTransform(name="log1p").invert([1e9, math.nan])
    assert out > 1e300 and math.isnan(nan)


def test_nothing_to_fit_on_is_an_error() -> None:
    with pytest.raises(UserError, match="no training scores"):
        ScoreTransform.fit("minmax", [])
    with pytest.raises(UserError, match="not finite"):
        ScoreTransform.fit("standardize", [1.0, math.inf])
