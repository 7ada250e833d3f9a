"""The table of the benchmark of readouts, from figures by hand, and that what it measures is what it says."""

from __future__ import annotations

from benchmarks.readouts import READOUTS, build_backbone, growth_table, parse, table


def figures(epochs: list[float], losses: list[float], fill: float = 0.0) -> dict[str, object]:
    cpu = [2 * epoch for epoch in epochs[:-1]] + [epochs[-1]]
    return {"epochs": epochs, "cpu": cpu, "losses": losses, "fill": fill, "bytes": 3 * 2**20, "answers": 6, "peak_rss_mb": 700}


def test_the_table_holds_medians_ratios_and_the_break_even() -> None:
    rounds = {"never": [figures([10.0], [0.7, 0.6])], "cached": [figures([1.0, 2.0, 2.5], [0.7, 0.6005], fill=4.0)]}
    rows = table({"mean_pool": rounds}).splitlines()
    assert rows[2] == "| mean_pool | 10.00 | 2.000 | **5.0** | 4.0 | 4.00 | 0.5 | 524,288 | 5.0e-04 | 700 |"
    assert growth_table("mean_pool", {8: figures([1.0], [])}).splitlines()[2] == "| 8 | 3 | 700 | 1.00 | 0.00 |"


def test_every_readout_is_measured_over_ten_million_parameters() -> None:
    assert parse(["--readouts", "mean_pool,last_token"]).readouts == "mean_pool,last_token"
    for kind in set(READOUTS.values()):
        assert 9.5e6 < sum(parameter.numel() for parameter in build_backbone(kind).parameters()) < 11e6
