"""The report on a pairwise reward model: figures by hand, baseline, and what makes a model untrustworthy."""

from __future__ import annotations

import json
import math

import pytest

from reward_model.classification.report import ScoredPair, pair_report
from reward_model.report import Report

SAME = {"in batches": 0.0, "in another order": 1e-7, "under more padding": 0.0}


def pair(question: int, margin: float, length_difference: int, chosen_score: float = 0.0) -> ScoredPair:
    return ScoredPair(question, chosen_score, chosen_score - margin, 100 + length_difference, 100, 50 + question)


def report(pairs: list[ScoredPair], differences: dict[str, float] = SAME) -> Report:
    return pair_report(pairs, differences, samples=200, seed=0, title="model")


def test_figures_by_hand() -> None:
    pairs = [pair(0, 1.0, 10), pair(0, -1.0, 10), pair(1, 2.0, -10), pair(2, 0.0, 0)]
    figures = {figure.name: figure for figure in report(pairs).figures}
    assert figures["accuracy"].value == (1 + 0 + 1 + 0.5) / 4
    assert figures["accuracy"].baseline == (1 + 1 + 0 + 0.5) / 4  # ties of the longer-wins rule count half, too
    assert figures["accuracy above longer-wins"].value == 0.0
    assert figures["accuracy where the chosen answer is shorter"].value == 1.0
    assert figures["mean margin"].value == pytest.approx(0.5)
    loss = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1)) + math.log1p(math.exp(-2)) + math.log(2)) / 4
    assert figures["loss (nats)"].value == pytest.approx(loss, abs=1e-12)


def test_a_good_model_passes_every_check() -> None:
    # Right with probability sigmoid(1.5) = 0.82 (nine of eleven), whatever the length.
    pairs = [pair(number, 1.5 if number % 11 < 9 else -1.5, (-1) ** number * 20) for number in range(220)]
    result = report(pairs)
    assert [check.text for check in result.checks if not check.passed] == []
    assert result.json()["trustworthy"] is True


def test_a_length_meter_is_found_out() -> None:
    pairs = [ScoredPair(number, 3.0, 2.0, 300, 200, 10) for number in range(50)]
    failed = [check.text for check in report(pairs).checks if not check.passed]
    assert any("no length meter" in text for text in failed)
    assert any("better than counting characters" in text for text in failed)


def test_an_overconfident_model_is_found_out() -> None:
    pairs = [pair(number, 9.0 if number % 4 else -9.0, (-1) ** number) for number in range(100)]
    failed = [check.text for check in report(pairs).checks if not check.passed]
    assert len(failed) == 1 and "expected calibration error 0.250" in failed[0]


def test_scores_that_change_under_padding_are_found_out() -> None:
    failed = [check.text for check in report([pair(n, 1.0, 0) for n in range(9)], {"under more padding": 0.02}).checks if not check.passed]
    assert any("2.0e-02" in text for text in failed)


def test_the_report_is_a_readable_table_and_plain_json() -> None:
    result = report([pair(number, 1.0 - number, number) for number in range(5)])
    text = str(result)
    assert "longer answer wins" in text and "can it be trusted?" in text
    assert max(len(line) for line in text.splitlines()) <= 200
    plain = json.loads(json.dumps(result.json(), allow_nan=False))
    assert plain["pairs"] == 5 and plain["questions"] == 5
    assert plain["figures"]["accuracy"]["baseline_name"] == "the longer answer wins"


def test_one_pair_is_no_evidence() -> None:
    result = report([pair(0, 1.0, 1)])
    assert math.isnan(result.figures[0].interval.low)
    assert not result.checks[0].passed
