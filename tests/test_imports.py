"""Imports go one way: stages import `common`, nothing imports a stage from outside, training code never meets the oracle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "reward_model", "rlhf")
PACKAGES = ("common", *STAGES)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Every module that a source text imports, absolute names; `from a.b import c` counts as `a.b` and `a.b.c`."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: write the full name"
            modules.add(node.module or "")
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def tops(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_imported_modules_sees_every_form() -> None:
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\n"
    assert imported_modules(source) == {"a.b", "c.d", "c.d.e", "g"}


@pytest.mark.parametrize("path", python_files("common"), ids=str)
def test_common_imports_no_stage(path: Path) -> None:
    assert not tops(imported_modules(path.read_text())) & {*STAGES, "examples", "benchmarks", "tests"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    others = {*STAGES, "examples", "benchmarks", "tests"} - {stage}
    for path in python_files(stage):
        assert not tops(imported_modules(path.read_text())) & others, path


def test_the_two_kinds_of_reward_model_do_not_import_each_other() -> None:
    for kind, other in (("classification", "regression"), ("regression", "classification")):
        for path in python_files(f"reward_model/{kind}"):
            assert not any(module.startswith(f"reward_model.{other}") for module in imported_modules(path.read_text())), path


def test_modules_have_one_import_name() -> None:
    """`rlhf.ppo`, never `ppo`: no import may lean on a stage folder being on the path."""
    inner = {path.name for folder in PACKAGES for path in (ROOT / folder).iterdir() if path.is_dir()}
    inner |= {path.stem for folder in PACKAGES for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    inner -= {"data", "models"}
    for path in python_files(*PACKAGES):
        own = {module for module in imported_modules(path.read_text()) if module.split(".")[0] in inner}
        assert not own, f"{path}: {own}"


def test_no_training_code_mentions_the_oracle() -> None:
    files = python_files(*PACKAGES)
    assert len(files) > 20
    for path in files:
        for module in imported_modules(path.read_text()):
            assert module.split(".")[-1] != "oracle" and not module.startswith("examples"), path


@pytest.mark.parametrize(
    "module",
    ["common.config", "common.records", "common.prompts", "common.runs", "sft.config", "reward_model.config", "rlhf.config"],
)
def test_what_runs_before_the_checks_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'pytorch_lightning', 'trl') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
