"""Run scripts of the project on many inputs in one process: cases as JSON on stdin, what each of them did as JSON on stdout.

    python -m tests.bad_input.run_cases < cases.json

A case is {"script": path, "arguments": [...], "files": {name: base64}, "environment": {...}}. Its folder, which is also the working
directory, is made anew and called `D` in arguments, files and results; the repository's root is called `ROOT` in results. A result is
{"code": exit code, "out": stdout, "errors": lines of stderr, "made": paths made or removed, "torch": whether it was the first to import
torch}.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from common.errors import locate_problems

ROOT = Path(__file__).resolve().parents[2]
# Where a script could leave something beside the case's own folder.
MODELS = [ROOT / stage / "models" for stage in ("sft", "reward_model", "reward_model/classification", "reward_model/regression", "rlhf")]


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    def here(text: str) -> str:
        return text.replace("D/", f"{folder}/")

    for name, content in case["files"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content).replace(b"D/", f"{folder}/".encode()))
    before, had_torch = listing(folder), "torch" in sys.modules
    environment = dict(os.environ)
    os.environ.update(case["environment"])
    os.chdir(folder)
    locate_problems(lambda problem: problem)  # a process of its own knows no config yet
    sys.argv = [case["script"], *map(here, case["arguments"])]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(str(ROOT / case["script"]), run_name="__main__")
            code: Any = "the script came back"
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            code = 1
            traceback.print_exc()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)

    def named(text: str) -> str:
        return text.replace(str(folder), "D").replace(str(ROOT), "ROOT")

    made = sorted(map(named, before ^ listing(folder)))
    return {
        "code": code,
        "out": named(out.getvalue()),
        "errors": named(errors.getvalue()).splitlines(),
        "made": made,
        "torch": "torch" in sys.modules and not had_torch,
    }


def listing(folder: Path) -> set[str]:
    return {str(path) for place in (folder, *MODELS) for path in place.rglob("*")}


if __name__ == "__main__":
    results = []
    for case in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as name:
            results.append(run(case, Path(name).resolve()))
    json.dump(results, sys.stdout)
