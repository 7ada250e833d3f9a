"""Bad input through every script, as a user gives it: one line per problem, exit code 2, nothing made, and torch not even imported.

The cases are data: `configs.yaml` and `data.yaml` here, and the malformed configs of `tests/common`.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = {
    "train_sft": "sft/train_sft.py",
    "test_sft": "sft/test_sft.py",
    "ask": "sft/ask.py",
    "train_pairs": "reward_model/classification/train_reward.py",
    "test_pairs": "reward_model/classification/test_reward.py",
    "train_scores": "reward_model/regression/train_reward.py",
    "test_scores": "reward_model/regression/test_reward.py",
    "compare_readouts": "reward_model/compare_readouts.py",
    "score": "reward_model/score.py",
    "train_ppo": "rlhf/train_ppo.py",
    "test_ppo": "rlhf/test_ppo.py",
    "convert": "common/convert.py",
}
# The schemas of the table in tests/common -> scripts that have them.
SCHEMAS = {
    "sft": "train_sft",
    "classification": "train_pairs",
    "regression": "train_scores",
    "ppo": "train_ppo",
    "generation_test": "test_ppo",
    "reward_test": "test_scores",
}
DEFAULTS = yaml.safe_load((HERE / "defaults.yaml").read_text())


def read_cases() -> list[dict[str, Any]]:
    cases = [case for name in ("configs", "data") for case in yaml.safe_load((HERE / f"{name}.yaml").read_text())]
    for case in yaml.safe_load((ROOT / "tests/common/malformed_configs.yaml").read_text()):
        arguments = ["--config", "C", *case.get("overrides", ())]
        cases.append({**case, "script": SCHEMAS[case["schema"]], "arguments": arguments})
    return cases


CASES = read_cases()


def content(text: Any) -> bytes:
    """The bytes of a file: text in UTF-8, rows of JSON, or a mapping that says more (`bytes`: one byte per character; `gzip`)."""
    if isinstance(text, dict) and "gzip" in text:
        return gzip.compress(content(text["gzip"]), mtime=0)
    if isinstance(text, dict) and "bytes" in text:
        return bytes(text["bytes"], "latin-1")
    return text.encode() if isinstance(text, str) else json.dumps(text).encode()


def command(case: dict[str, Any]) -> dict[str, Any]:
    """A case with its defaults, as `run_cases.py` reads it: a good config `C`, good rows `data.json`, and models."""
    script = case["script"]
    files = {**DEFAULTS["files"], **DEFAULTS["data"].get(script, {}), **case.get("files", {})}
    config = case.get("config", DEFAULTS["configs"].get(script))
    if config is not None:
        files["C"] = config
    if "data" in case:
        files["data.json"] = case["data"]
    arguments = case.get("arguments", DEFAULTS["arguments"][script]) + case.get("more", [])
    encoded = {name: base64.b64encode(content(text)).decode() for name, text in files.items() if text is not None}
    return {
        "script": SCRIPTS[script],
        "arguments": arguments,
        "files": encoded,
        "environment": case.get("environment", {}),
    }


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key not in {"WANDB_API_KEY", "RESULTS_ROOT_DIR"}}
    sent = json.dumps([command(case) for case in cases])
    program = [sys.executable, "-m", "tests.bad_input.run_cases"]
    result = subprocess.run(program, input=sent, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=True)
    ran: list[dict[str, Any]] = json.loads(result.stdout)
    return ran


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What each case did: those that need no torch in one process, where it must not be imported, then the others in another."""
    ran = {}
    for torch in (False, True):
        cases = [case for case in CASES if case.get("torch", False) == torch]
        ran |= zip((case["case"] for case in cases), run(cases), strict=True)
    return ran


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_what_a_script_says(case: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    result = results[case["case"]]
    refused = "expected" in case
    assert result["code"] == (2 if refused else 0), result
    if refused:
        lines = [line.removeprefix("error: ") for line in result["errors"] if case.get("torch") is None or line.startswith("error: ")]
        assert len(lines) == len(case["expected"]), lines
        for line, start in zip(lines, case["expected"], strict=True):
            assert line.startswith(start), line
        assert result["made"] == case.get("made", [])
    for words in case.get("says", ()):
        assert words in result["out"], result["out"]
    if not case.get("torch"):
        assert not result["torch"] and result["made"] == []


def test_the_cases_differ_and_reach_every_script() -> None:
    names = [case["case"] for case in CASES]
    assert len(set(names)) == len(names)
    refused, valid = ({case["script"] for case in CASES if ("expected" in case) == bad} for bad in (True, False))
    assert refused == valid == SCRIPTS.keys()
