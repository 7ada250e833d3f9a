from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.plots import group_panels, plot_curves, read_series, smoothed


def write(run: Path, lines: list[dict[str, float | None]]) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **line}) + "\n" for line in lines))


def test_series_are_by_step_without_null_and_the_later_value_wins(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 2, "a": 2.0}, {"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": 3.0}])
    assert read_series(tmp_path) == {"a": [(1, 1.0), (2, 3.0)]}


def test_train_and_validation_share_a_panel_and_machine_figures_have_none() -> None:
    names = ["perf/step_seconds", "train/lr", "train/loss", "val/loss", "val/accuracy", "train/epoch", "objective/kl", "ppo/loss", "other"]
    panels = group_panels({name: [(1, 1.0)] for name in names})
    assert [(title, list(panel)) for title, panel in panels.items()] == [
        ("loss", ["train/loss", "val/loss"]),
        ("val/accuracy", ["val/accuracy"]),
        ("objective/kl", ["objective/kl"]),
        ("ppo/loss", ["ppo/loss"]),
        ("train/lr", ["train/lr"]),
        ("other", ["other"]),
    ]


def test_smoothing_by_hand() -> None:
    # span 3 keeps 1/2: weights 1 | 1/2, 1 | 1/4, 1/2, 1
    assert smoothed([1.0, 4.0, 4.0], 3.0) == pytest.approx([1.0, (0.5 * 1 + 4) / 1.5, (0.25 * 1 + 0.5 * 4 + 4) / 1.75], rel=1e-12)
    assert smoothed([7.0] * 50, 9.0) == pytest.approx([7.0] * 50, rel=1e-12)


@pytest.mark.parametrize("points", [1, 40])
def test_a_picture_is_drawn_beside_the_metrics(tmp_path: Path, points: int) -> None:
    lines: list[dict[str, float | None]] = [
        {"step": step, "train/loss": 1.0 / step, "train/lr": 1e-5, "val/loss": 2.0 / step} for step in range(1, points + 1)
    ]
    write(tmp_path / "run", lines)
    path = plot_curves(tmp_path / "run")
    assert path == tmp_path / "run" / "curves.png"
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (840, 300)  # two panels of 4.2 x 2.6 inches and the title, at 100 dots per inch


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [{"step": 1, "perf/step_seconds": 1.0}])
    with pytest.raises(ValueError, match="no metrics to draw"):
        plot_curves(tmp_path)
