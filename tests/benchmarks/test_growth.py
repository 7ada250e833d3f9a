"""The table of growth divides by what was varied, relative to its first line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import main, run


def fake_run(arguments: Sequence[str]) -> dict[str, object]:
    """Seconds grow with the batch, memory with its square."""
    batch = int(arguments[-1])
    median = {"generate": 1.0, "score": 1.0, "train": batch - 2.0, "total": float(batch), "cpu_total": 2.0 * batch, "resp_tokens": 0.0}
    return {"median": median, "start_rss_mb": 400, "peak_rss_mb": 400 + batch**2, "params": 1}


def test_linear_growth_is_one_and_quadratic_growth_is_the_factor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(growth, "run", lambda arguments: asked.append(arguments) or fake_run(arguments))
    assert main(["--vary", "batch", "--values", "10", "40", "--epochs", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "| 10 | 1.00 | 1.00 | 8.00 | 10.00 | 20.00 | 400 | 100 | 1.00 | 1.00 |",
        "| 40 | 1.00 | 1.00 | 38.00 | 40.00 | 80.00 | 400 | 1600 | 1.00 | 4.00 |",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert asked[1][-2:] == ["--batch", "40"]
    assert asked[0].index("4") > asked[0].index("1")  # the caller's epochs come later, and win
    with pytest.raises(SystemExit):
        main(["--values", "1"])


def test_a_process_that_fails_ends_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SCRIPT", tmp_path / "contender.py")
    growth.SCRIPT.write_text("raise SystemExit('no luck')")
    with pytest.raises(SystemExit, match="no luck"):
        run(["--size", "s"])
