"""The runner says what it leaves out and why, and its table holds medians and ratios to the first contender."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import Contender, contenders, main, run, table


def measured(total: float, cpu: float, peak: int) -> dict[str, object]:
    figures = {"generate": 0.5, "score": 0.25, "train": total - 0.75, "total": total, "cpu_total": cpu}
    return {"median": figures, "iters": [figures, {**figures, "total": total + 2}], "peak_rss_mb": peak, "versions": {"torch": "2"}}


def script(folder: Path, text: str) -> Path:
    path = folder / "contender.py"
    path.write_text(text)
    return path


def test_the_table_holds_medians_and_ratios() -> None:
    rows = table({"floor": [measured(3.0, 8.0, 1000)], "ours": [measured(1.0, 2.0, 400), measured(1.0, 2.0, 600)]}).splitlines()
    assert rows[2] == "| floor | 0.50 | 0.25 | 2.25 | 4.00 | 3.00 | 8.00 | 1.00 | 1.00 | 1000 |"
    assert rows[3] == "| ours | 0.50 | 0.25 | 0.25 | 2.00 | 1.00 | 2.00 | 0.50 | 0.25 | 500 |"


def test_a_contender_runs_with_the_arguments_and_threads_bound(tmp_path: Path) -> None:
    text = "import json, os, sys\nprint('noise')\nprint('RESULT ' + json.dumps([sys.argv[1:], os.environ['OMP_PROC_BIND']]))"
    contender = Contender(Path(sys.executable), script(tmp_path, text), ("--top", "2"))
    assert run(contender, ["--size", "xs"]) == [["--top", "2", "--size", "xs"], "true"]


def test_a_contender_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Contender(Path(sys.executable), script(tmp_path, "raise SystemExit('no luck')")), []) is None
    assert "no luck" in capsys.readouterr().err


def test_every_contender_of_this_repository_has_its_script(tmp_path: Path) -> None:
    for name, contender in contenders(tmp_path).items():
        assert name == "target" or contender.script.is_file()
        assert (contender.python == Path(sys.executable)) is not name.startswith("trl")


def test_what_is_missing_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Contender(Path(sys.executable), script(tmp_path, f"print('RESULT ' + {json.dumps(json.dumps(measured(1.0, 2.0, 400)))})"))
    absent = Contender(tmp_path / "python", here.script)
    slow = Contender(here.python, here.script, slow=True)
    monkeypatch.setattr(compare, "contenders", lambda envs: {"ours": here, "peer": absent, "slow": slow})
    assert main(["--rounds", "1", "--json", str(tmp_path / "all.jsonl")]) == 0
    output = capsys.readouterr().out
    assert f"left out: peer, for lack of {tmp_path / 'python'}" in output
    assert "| ours |" in output and "slow" not in output
    assert [json.loads(line)["contender"] for line in (tmp_path / "all.jsonl").read_text().splitlines()] == ["ours"]
    with pytest.raises(SystemExit):
        main(["--only", "nobody"])
