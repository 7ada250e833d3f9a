"""The Makefile's environment leaves every process all cores: two commands run at a time, and so do two test workers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_no_process_is_bound_to_a_core(tmp_path: Path) -> None:
    extra = tmp_path / "environment.mk"
    extra.write_text("environment:\n\t@env\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    result = subprocess.run(
        ["make", "--no-print-directory", "-f", "Makefile", "-f", str(extra), "environment"],
        cwd=ROOT, env=clean, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = dict(line.partition("=")[::2] for line in result.stdout.splitlines() if "=" in line)
    assert names["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_PROC_BIND" not in names and "GOMP_CPU_AFFINITY" not in names


def test_bench_makes_the_environments_that_are_missing_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / ".installed").touch()
    result = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--assume-old=venv", "bench", f"BENCH_ENVS={tmp_path}", "BENCH=--size xs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = result.stdout.splitlines()
    assert [line.rpartition("/")[2] for line in commands if " -m venv " in line and str(tmp_path) in line] == ["new", "classic"]
    installs = [line.partition("--disable-pip-version-check ")[2] for line in commands if str(tmp_path) in line and " pip install " in line]
    assert [line.split()[:2] for line in installs] == [["torch==2.13.0", "trl==1.16.0"], ["torch==2.13.0", "trl==0.11.4"]]
    assert commands[-1].endswith(f"benchmarks/compare.py --envs {tmp_path} --size xs")
