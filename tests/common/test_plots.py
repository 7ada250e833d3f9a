from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.plots import MAX_PANELS, Series, choose_panels, group_panels, plot_curves, read_series, smoothed


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
        ("train/lr", ["train/lr"]),
        ("ppo/loss", ["ppo/loss"]),
        ("other", ["other"]),
    ]


def test_the_picture_leaves_out_what_is_constant_twice_the_same_or_beyond_the_cap() -> None:
    def changing(number: int) -> Series:
        return [(1, float(number)), (2, number + 1.5)]

    series = {f"ppo/x{number:02}": changing(number) for number in range(MAX_PANELS)}
    series |= {"eval/kl": changing(50), "ppo/same": [(1, 50.0000001), (2, 51.5)], "ppo/flat": [(1, 2.0), (2, 2.0)], "ppo/one": [(1, 2.0)]}
    panels, note = choose_panels(group_panels(series))
    assert list(panels) == ["eval/kl", "ppo/one", *(f"ppo/x{number:02}" for number in range(MAX_PANELS - 2))]
    assert note == "constant, not drawn: ppo/flat 2; 2 further metrics are in metrics.csv"
    flat, note = choose_panels(group_panels({"ppo/flat": series["ppo/flat"]}))
    assert list(flat) == ["ppo/flat"] and note == ""


def test_smoothing_by_hand() -> None:
    # span 3 keeps 1/2: weights 1 | 1/2, 1 | 1/4, 1/2, 1
    assert smoothed([1.0, 4.0, 4.0], 3.0) == pytest.approx([1.0, (0.5 * 1 + 4) / 1.5, (0.25 * 1 + 0.5 * 4 + 4) / 1.75], rel=1e-12)
    assert smoothed([7.0] * 50, 9.0) == pytest.approx([7.0] * 50, rel=1e-12)


@pytest.mark.parametrize("points", [1, 40])
def test_a_picture_is_drawn_beside_the_metrics(tmp_path: Path, points: int) -> None:
    lines: list[dict[str, float | None]] = [
        {"step": step, "train/loss": 1.0 / step, "train/lr": 1e-5 * step, "val/loss": 2.0 / step} for step in range(1, points + 1)
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
