"""SECURITY.md claims nothing without a test, and the tests that it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ELSEWHERE = ("test_ray.py", "test_workers.py")
HERE = "Known vulnerabilities of what is installed"


@pytest.fixture(scope="module")
def sections(root: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", (root / "SECURITY.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))


def test_the_tests_it_names_exist(sections: dict[str, str]) -> None:
    for file, test in named("".join(sections.values())):
        (path,) = FOLDER.parent.rglob(file) if file in ELSEWHERE else [FOLDER / file]
        defined = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert test in defined, f"{file}::{test}"


def test_every_row_of_a_claim_names_a_test(sections: dict[str, str]) -> None:
    claims = ["What each load path does", "Names and paths", "Secrets", "The network"]
    rows = [line for section in claims for line in sections[section].splitlines() if line.startswith("| ") and not line.startswith("| | ")]
    rows = [row for row in rows if not row.startswith("| path |")]
    assert len(rows) > 20
    assert [row for row in rows if not named(row)] == []


def test_the_readme_leads_to_it(root: Path) -> None:
    assert "(SECURITY.md)" in (root / "README.md").read_text(encoding="utf-8")


def test_its_versions_are_those_of_the_requirements(root: Path, sections: dict[str, str]) -> None:
    """The floors that its table of advisories counts on stand in the requirements."""
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    for requirement in ("torch==2.13.0", "transformers>=5.17,", "pytorch-lightning>=2.6.6,"):
        assert requirement in text
        assert re.search(rf"{re.escape(requirement.split('=')[-1].rstrip(','))}\b", sections[HERE])
