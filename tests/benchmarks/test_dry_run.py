"""The benchmark of forecasts reads what dry runs print and says by how much they are off."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import dry_run
from benchmarks.dry_run import Taken, forecast_in, main

PRINTED = """steps: 7 optimizer steps
time: about 1 h 02 min, steps 1 h 00 min and validations 2 min; loading and saving not counted
memory: 0.50 GiB at the peak
disk: 1.5 MiB a checkpoint, 6 MiB for 4 at once (keep_last 2 + …); 52.9 GiB free in /
"""


def test_a_forecast_is_read() -> None:
    assert forecast_in(PRINTED) == Taken(3720, 0.5, 1.5 * 2**20)


@pytest.mark.parametrize(("seconds", "code"), [(80.0, 0), (79.0, 1)])
def test_a_forecast_that_is_off_by_more_than_a_quarter_fails(
    seconds: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def measured(stage: str, folder: Path, settings: list[str]) -> tuple[Taken, Taken]:
        asked.append((stage, settings))
        return Taken(100, 1.0, 2**20), Taken(seconds, 1.0, 2**20)

    monkeypatch.setattr(dry_run, "measure", measured)
    assert main(["--only", "ppo", "--set", "seed=3"]) == code
    assert asked == [("sft", []), ("reward", []), ("ppo", ["seed=3"])]
    out = capsys.readouterr().out.splitlines()
    assert out[2] == f"| ppo | seconds | 100.0 | {seconds} | {'+25%' if seconds == 80 else '+27%'} |"
    assert len(out) == 5


def test_its_commands_are_those_of_the_stages() -> None:
    for script, arguments in dry_run.commands(Path("/x")).values():
        assert (dry_run.ROOT / script).is_file() and (dry_run.ROOT / arguments[1]).is_file()
