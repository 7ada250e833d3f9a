"""Real data: subjects guessed from words, copies that keep every row, tables with intervals beside baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.real_data import copy_with_domains, domain
from examples.real_results import BREAKDOWN_BY_DOMAIN, BREAKDOWN_BY_LENGTH, markdown


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("Which hops suit a pale ale?", "beer"),
        ("How hot for espresso?", "coffee"),
        ("What does `yield` do?", "programming"),
        ("How do I teach fractions?", "teaching mathematics"),
        ("Can a machine be bored?", "artificial intelligence"),
        ("What scales?", "artificial intelligence"),  # "ale" only as a word of its own
    ],
)
def test_a_subject_is_guessed_from_whole_words(question: str, subject: str) -> None:
    assert domain(question) == subject


def test_copies_keep_rows_and_splits(tmp_path: Path) -> None:
    rows = {"train": [{"Question": "Beer?", "Answer": "é", "Score": 1.5}], "test": []}
    (tmp_path / "in.json").write_text(json.dumps(rows), encoding="utf-8")
    copy = json.loads(copy_with_domains(tmp_path / "in.json", tmp_path / "new" / "out.json").read_text(encoding="utf-8"))
    assert copy == {"train": [{"Question": "Beer?", "Answer": "é", "Score": 1.5, "Domain": "beer"}], "test": []}


def test_tables_show_intervals_beside_baselines() -> None:
    def figure(value: float, baseline: float | None = None) -> dict[str, object]:
        return {"value": value, "interval_95": [value - 0.25, value + 0.25], "baseline": baseline}

    slices = {
        BREAKDOWN_BY_DOMAIN: [{"Domain": "beer", "pairs": 3, "accuracy": 1.0}],
        BREAKDOWN_BY_LENGTH: [{"from": 12.0, "to": None, "pairs": 4, "accuracy": 0.125}],
    }
    results = {
        "sft": {
            "training": {"seconds": 90, "best_metrics": {"val/perplexity": 200.04, "val/token_accuracy": 0.25}},
            "test": {"figures": {"bleu": 0.5, "rougeL_fmeasure": 0.125}},
        },
        "a_classification": {
            "training": {"seconds": 30}, "pairs": 7, "questions": 3, "breakdowns": slices,
            "figures": {"accuracy": figure(0.5, 0.75), "accuracy above longer-wins": figure(-0.25)},
        },
        "a_regression": {
            "training": {"seconds": 60}, "answers": 9, "questions": 4, "breakdowns": {},
            "figures": {"MSE": figure(1.5, 1.75), "Spearman": {"value": 0.1}, "pair accuracy within a question": figure(0.5, 0.625)},
        },
    }  # fmt: skip
    lines = markdown(results).splitlines()
    assert "| SFT: perplexity of validation answers | 200.0 |" in lines
    assert "| a_classification | 7 | 3 | 0.50 [0.25, 0.75] | 0.75 | -0.25 [-0.50, 0.00] |" in lines
    assert "| a_regression | 9 | 4 | 1.50 [1.25, 1.75] | 1.75 | 0.10 | 0.50 [0.25, 0.75] | 0.62 |" in lines
    assert "| beer | 3 | 1.00 |" in lines and "| 12 |  | 4 | 0.12 |" in lines
    assert not any("PPO" in line for line in lines)
