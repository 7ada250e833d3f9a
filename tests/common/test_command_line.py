"""Every tool's command line: one line and exit code 2 on a mistake, either spelling of an option."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.command_line import Parser


@pytest.mark.parametrize("arguments", [["--batch_size", "3"], ["--batch-size", "3"], ["--batch-size=3"], ["--batch_size=3"]])
def test_words_of_an_option_are_joined_either_way(arguments: list[str]) -> None:
    parser = Parser()
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("texts", nargs="*")
    assert parser.parse_args([*arguments, "a-b", "x-y=z"]) == parser.parse_intermixed_args(["a-b", *arguments, "x-y=z"])
    assert vars(parser.parse_args([*arguments, "a-b"])) == {"batch_size": 3, "texts": ["a-b"]}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reward_model/score.py"], "the following arguments are required: model, file"),
        (["reward_model/score.py", "m", "f", "--batch_size", "many"], "argument --batch_size: invalid int value: 'many'"),
        (["reward_model/score.py", "m", "f", "--batch", "3"], "unrecognized arguments: --batch 3"),
        (["-m", "common.convert", "a.json", "b.json", "--to", "csv"], "argument --to: invalid choice: 'csv'"),
        (["sft/ask.py"], "the following arguments are required: MODEL"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: list[str], message: str, root: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: command line: {message}")
