"""The README tells the truth: its commands run as they stand there, its links and files exist, its generated parts are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from common.freezing import apply_freezing
from common.schema import FreezeSettings
from tests.processes import as_typed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def stage_commands() -> list[tuple[str, str]]:
    """(folder, script with its options) of every `cd FOLDER && python …` line."""
    return re.findall(r"^cd (\S+) +&& python (.+)$", README, flags=re.MULTILINE)


def test_the_readme_has_the_eight_commands() -> None:
    assert [(folder, command.split()[0]) for folder, command in stage_commands()] == [
        ("sft", "train_sft.py"),
        ("reward_model/classification", "train_reward.py"),
        ("reward_model/regression", "train_reward.py"),
        ("rlhf", "train_ppo.py"),
        ("sft", "test_sft.py"),
        ("reward_model/classification", "test_reward.py"),
        ("reward_model/regression", "test_reward.py"),
        ("rlhf", "test_ppo.py"),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("picture")
def test_the_commands_run_from_their_folders_for_two_steps(tmp_path: Path) -> None:
    """Each command word for word, plus overrides that shorten it and keep what it writes out of the repository."""
    models = {stage: tmp_path / stage for stage in ("sft", "classification", "regression", "rlhf")}
    short = ["trainer.params.max_steps=2", "trainer.params.limit_val_batches=1", "trainer.params.max_epochs=1"]
    latest = {stage: str(folder / "latest") for stage, folder in models.items()}
    overrides = {
        ("sft", "train_sft.py"): [f"trainer.checkpoint.dirpath={models['sft']}", "evaluation.num_generated=4", *short],
        ("rlhf", "train_ppo.py"): [
            f"save_config.checkpoint_dir={models['rlhf']}", f"ppo_config.model_name={latest['sft']}",
            f"reward_config.reward_model_name={latest['classification']}", "ppo_config.steps=2", "ppo_config.batch_size=8",
            "ppo_config.mini_batch_size=4", "evaluation.num_prompts=4", "generation_config.max_new_tokens=8",
        ],
        ("sft", "test_sft.py"): [f"model_name={latest['sft']}", f"test_params.log_file={tmp_path / 'sft.csv'}", "data.max_rows=5"],
        ("rlhf", "test_ppo.py"): [f"model_name={latest['rlhf']}", f"test_params.log_file={tmp_path / 'ppo.csv'}", "data.max_rows=5"],
    }  # fmt: skip
    for kind in ("classification", "regression"):
        folder = f"reward_model/{kind}"
        overrides[folder, "train_reward.py"] = [f"trainer.checkpoint.dirpath={models[kind]}", f"model_name={latest['sft']}", *short]
        overrides[folder, "test_reward.py"] = [
            f"model_name={latest[kind]}", f"test_params.log_file={tmp_path / kind}.csv", "test_params.bootstrap_samples=10",
        ]  # fmt: skip
    for folder, command in stage_commands():
        arguments = command.split("#")[0].split()
        code, printed = as_typed(ROOT / folder, [*arguments, *overrides[folder, arguments[0]]], tmp_path / "printed")
        assert code == 0, f"cd {folder} && python {command}\n{printed[-4000:]}"
    for stage, folder in models.items():
        assert (folder / "latest" / "manifest.json").exists(), stage


def test_files_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`([\w/.-]+\.(?:py|yaml|md|json|txt|yml))`", README))
    assert len(named) > 5
    written_by_runs = {"manifest.json", "metrics.csv", "results/quickstart.json"}
    for name in named - written_by_runs:
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), name


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake (venv|quickstart|test|docs|data|lint)\b", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")


def test_generated_tables_are_current(tmp_path: Path) -> None:
    code, printed = as_typed(ROOT, ["docs/tables.py", "--check"], tmp_path / "printed")
    assert code == 0, f"{printed} (make docs regenerates them)"


@pytest.mark.parametrize("document", ["README.md", "rlhf/reward_pipelines/README.md"])
def test_the_reward_functions_named_exist(document: str) -> None:
    named = re.findall(r"\.\./(\S+\.py):(\w+)", (ROOT / document).read_text(encoding="utf-8"))
    assert named
    for file, function in named:
        assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{document}: {file}:{function}"


def test_the_freezing_shown_trains_the_two_upper_layers_alone() -> None:
    [block] = re.findall(r"^```yaml\n(model_params:[^`]*layers_not_to_freeze[^`]*)^```", README, flags=re.MULTILINE)
    config = GPTNeoConfig(vocab_size=9, hidden_size=4, num_layers=4, num_heads=1, attention_types=[[["global"], 4]])
    model = GPTNeoForCausalLM(config)
    apply_freezing(model, FreezeSettings.model_validate(yaml.safe_load(block)["model_params"]))
    trained = {name.split(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"2", "3"}
    assert all(parameter.requires_grad for layer in model.transformer.h[2:] for parameter in layer.parameters())


def anchors(document: Path) -> set[str]:
    """The anchors that a page shows for its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.md")
        if not {".venv", "models", "results"} & set(path.relative_to(ROOT).parts)
    ),
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{document}: {target}"
        assert not anchor or anchor in anchors(linked), f"{document}: {target}"
