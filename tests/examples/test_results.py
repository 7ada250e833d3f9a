"""Results of the quickstart: means by hand, files that read back, tables with a column for each run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.results import FIGURES, KINDS, Example, Results, draw, example_lines, markdown, table_lines

EXAMPLE = Example("Which?", "4, I think.", 0.2, "It is 5.", 0.6)


def results(*values: float) -> Results:
    kinds = {name: {"fact": 0.25} for name in KINDS}
    return Results({str(seed): dict.fromkeys(FIGURES, value) for seed, value in enumerate(values)}, {"0": kinds, "1": kinds}, [EXAMPLE])


def test_the_file_of_one_run_holds_its_figures_at_the_top(tmp_path: Path) -> None:
    one = results(0.75)
    one.save(tmp_path / "new" / "quickstart.json")
    values = json.loads((tmp_path / "new" / "quickstart.json").read_text(encoding="utf-8"))
    assert {name: values[name] for name in FIGURES} == one.runs["0"]
    assert Results.load(tmp_path / "new" / "quickstart.json") == one


def test_several_runs_are_shown_with_their_mean() -> None:
    two = results(0.5, 1.0)
    assert two.mean["oracle_ppo"] == 0.75
    heading, *rows = table_lines(two)
    assert heading.split() == ["seed", "0", "seed", "1", "mean"]
    assert rows[0].endswith("     0.500     1.000     0.750")
    assert "| PPO, greedy answers: oracle score | 0.500 | 1.000 | 0.750 |" in markdown(two).splitlines()
    assert "| PPO, greedy answers: share that are right | 0.250 |" in markdown(two).splitlines()


def test_one_run_needs_no_heading_and_no_mean() -> None:
    first, *_ = table_lines(results(0.5))
    assert first.split()[-1] == "0.500" and first.split()[-2] == "rightly"
    assert markdown(results(0.5)).startswith("| | seed 0 |\n|---|---:|\n")


def test_examples_say_what_each_model_answered() -> None:
    assert example_lines([EXAMPLE]) == ["  Which?", "    SFT (0.2): 4, I think.", "    PPO (0.6): It is 5."]


def test_a_pipe_in_an_answer_stays_in_its_cell() -> None:
    odd = results(0.5)
    odd.examples = [Example("a|b?", "x", 0.0, "y", 1.0)]
    assert markdown(odd).splitlines()[-1] == r"| a\|b? | x | 0.0 | y | 1.0 |"


def test_the_picture_is_written(tmp_path: Path) -> None:
    assert draw(results(0.2, 0.8), tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["seconds", "kl_ppo"])
def test_seconds_and_nats_are_not_rates(name: str) -> None:
    row = next(line for line in table_lines(results(2.345)) if line.strip().startswith(FIGURES[name]))
    assert row.split()[-1] == {"seconds": "2", "kl_ppo": "2.35"}[name]
