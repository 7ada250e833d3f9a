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
