"""Best of n and the best that can be, counted among draws: by hand, and against distributions that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.best_of_n import best_of_n, extrapolated, frontier, kl_bound, optimum, plug_in


def test_the_best_of_two_by_hand() -> None:
    weights = best_of_n(2)(np.array([3.0, 1.0, 1.0, 2.0]))
    # both 1: 1/4, shared by two draws; 2 at most: 9/16; the rest is 3
    assert weights == pytest.approx([7 / 16, 1 / 8, 1 / 8, 5 / 16])


def test_answers_that_repeat_take_no_more_kl_than_they_need() -> None:
    scores = np.array([[0.0, 1.0] * 8])
    kl, score, quality = plug_in(best_of_n(2), scores, 2 * scores)
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert (score, quality) == pytest.approx((0.75, 1.5))
    assert plug_in(best_of_n(64), np.zeros((1, 8)), np.zeros((1, 8))).kl == pytest.approx(0)


def test_answers_that_never_repeat_meet_the_bound() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 4096))
    for n in (1, 2, 16):
        assert plug_in(best_of_n(n), scores, scores).kl == pytest.approx(kl_bound(n), abs=1e-4)


def test_the_optimum_by_hand() -> None:
    scores = np.array([[0.0, 0.5 * math.log(3)]])
    kl, score, _ = plug_in(optimum(0.5), scores, scores)
    assert score == pytest.approx(0.75 * 0.5 * math.log(3))
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_nothing_surpasses_the_optimum() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 512)).round(1)
    for coef in (0.2, 1.0):
        best = plug_in(optimum(coef), scores, scores)
        for n in (1, 2, 3, 8, 64):
            other = plug_in(best_of_n(n), scores, scores)
            assert best.score - coef * best.kl > other.score - coef * other.kl


def test_prompts_count_alike() -> None:
    scores = np.array([[0.0, 1.0], [2.0, 2.0]])
    both = plug_in(best_of_n(2), scores, scores)
    each = [plug_in(best_of_n(2), scores[row : row + 1], scores[row : row + 1]) for row in (0, 1)]
    assert both == pytest.approx(np.mean(each, axis=0))


@pytest.mark.parametrize("n", [8, 64])
def test_extrapolation_takes_the_bias_away(n: int) -> None:
    """200 answers of very different probability, a few common ones among them; 400 prompts alike, so that noise averages out."""
    rng = np.random.default_rng(0)
    p, scores = rng.dirichlet(np.full(200, 0.1)) + 1e-9, np.sort(rng.normal(size=200))
    p /= p.sum()
    best = np.diff(np.concatenate([[0], np.cumsum(p) ** n]))
    exact = float((best * np.log(np.maximum(best, 1e-300) / p)).sum()), float((best * scores).sum())
    drawn = scores[rng.choice(200, size=(400, 256), p=p)]
    plain, better = plug_in(best_of_n(n), drawn, drawn), extrapolated(best_of_n(n), drawn, drawn)
    for name, truth in zip(("kl", "score"), exact, strict=True):
        assert abs(getattr(better, name) - truth) < 0.6 * abs(getattr(plain, name) - truth), name
    assert better.kl == pytest.approx(exact[0], abs=0.01)


def test_the_frontier_holds_mixtures_and_ignores_what_they_surpass() -> None:
    points = [(2.0, 0.6), (1.0, 0.5), (0.5, 0.1), (1.5, 0.4)]
    assert frontier(points, 0.5) == pytest.approx(0.25)  # a coin between the start and (1, 0.5)
    assert frontier(points, 1.0) == pytest.approx(0.5)
    assert frontier(points, 1.5) == pytest.approx(0.55)
    assert frontier(points, 9.0) == pytest.approx(0.6)


def test_what_is_worse_than_the_start_gains_nothing() -> None:
    assert frontier([(0.5, -1.0), (1.0, -0.2)], 0.7) == 0
    assert frontier([], 1.0) == 0
