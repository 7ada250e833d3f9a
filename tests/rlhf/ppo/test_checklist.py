"""docs/ppo_checklist.md against the tests and the code that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINES = range(1, 36)


def table() -> dict[int, tuple[str, str, str]]:
    """Number -> what is right, tests, code."""
    rows: dict[int, tuple[str, str, str]] = {}
    for line in (ROOT / "docs" / "ppo_checklist.md").read_text().splitlines():
        if match := re.fullmatch(r"\| (\d+) \| (.+) \| (.+) \| (.+) \|", line):
            assert int(match[1]) not in rows
            rows[int(match[1])] = (match[2], match[3], match[4])
    return rows


def functions(path: Path) -> set[str]:
    """Every function and class that a file defines, methods included."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def numbered_tests(pattern: str) -> dict[int, set[str]]:
    """Number -> the tests that bear it; `test_18_19_…` bears two."""
    tests: dict[int, set[str]] = {number: set() for number in LINES}
    for path in (ROOT / "tests" / "rlhf").rglob(pattern):
        for name in functions(path):
            if match := re.match(r"test_((?:\d\d_)+)", name):
                for number in match[1].split("_")[:-1]:
                    tests[int(number)].add(name)
    return tests


def test_every_line_has_a_row_and_every_row_a_line() -> None:
    assert list(table()) == list(LINES)
    assert all(len(text) > 20 for text, _, _ in table().values())


@pytest.mark.parametrize("number", LINES)
def test_the_tests_of_a_row_exist_and_those_of_these_files_are_all_named(number: int) -> None:
    named = set(re.findall(r"`(test_\w+)`", table()[number][1]))
    here = numbered_tests("test_checklist_*.py")[number]
    assert here and here <= named <= numbered_tests("test_*.py")[number]


@pytest.mark.parametrize("number", LINES)
def test_the_code_of_a_row_exists(number: int) -> None:
    places = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", table()[number][2])
    assert places
    for path, names in places:
        missing = set(re.findall(r"`(\w+)`", names)) - functions(ROOT / path)
        assert not missing, f"{path} has no {', '.join(sorted(missing))}"
