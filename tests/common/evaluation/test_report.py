"""Figures over answers and their differences, by hand."""

from __future__ import annotations

import math

import pytest

from common.evaluation.report import differences, figures, figures_table, table


def row(generated: str, original: str = "", **metrics: float) -> dict[str, str]:
    names = ("bleu", "rouge1_fmeasure", "rouge2_fmeasure", "rougeL_fmeasure")
    return {"generated_answer": generated, "original_answer": original, **{name: str(metrics.get(name, "")) for name in names}}


def test_figures_by_hand() -> None:
    rows = [row("a b", "a b"), row("a b", "c"), row("", "d"), row("x y z w", "")]
    out = figures(rows, compute_metrics=True)
    assert out["rows"] == 4
    assert out["answer_words"] == 8 / 4
    assert out["empty_answer_rate"] == 1 / 4
    assert out["commonest_answer_share"] == 2 / 4
    assert out["exact_match"] == 1 / 3  # of the three with an original answer
    assert out["rouge1_fmeasure"] == pytest.approx(1 / 3)
    assert "bleu" not in figures(rows, compute_metrics=False)
    assert "bleu" not in figures([row("a")], compute_metrics=True)


def test_differences_by_hand() -> None:
    first = [row("", "", rougeL_fmeasure=value) for value in (0.1, 0.5, 0.4)] + [row("")]
    second = [row("", "", rougeL_fmeasure=value) for value in (0.4, 0.5, 0.1)] + [row("")]
    out = differences(first, second)
    assert list(out) == ["rougeL_fmeasure"]
    result = out["rougeL_fmeasure"]
    assert result["difference"] == pytest.approx(0.0)
    # differences 0.3, 0, -0.3: standard deviation 0.3, standard error 0.3 / sqrt(3)
    assert result["interval"] == pytest.approx(1.96 * 0.3 / math.sqrt(3))
    assert (result["first_better"], result["second_better"], result["equal"]) == (1, 1, 1)


def test_tables_are_aligned() -> None:
    assert table(["", "value", ""], [["bleu", "1", "x"], ["rouge", "12.5", "y"]]) == "       value\nbleu       1  x\nrouge   12.5  y"
    shown = figures_table({"first": {"rows": 12, "bleu": 3.14159}, "second": {"rows": 12}})
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [["rows", "12", "12"], ["bleu", "3.142", "-"]]
