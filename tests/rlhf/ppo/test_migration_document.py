"""docs/migrating_from_trl_ppo.md tells the truth: its scripts run, its tables name everything that trl 0.11.4 had."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from common.tracking import read_metrics
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.classic_attributes import INSTEAD
from rlhf.ppo.classic_names import ELSEWHERE
from tests.rlhf.ppo.conftest import BATCH
from tests.rlhf.ppo.test_classic_interface import CLASSIC_FIELDS

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "migrating_from_trl_ppo.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
CLASSIC_STATISTICS = frozenset(
    {
        "objective/entropy", "objective/kl", "objective/kl_coef", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs",
        "ppo/learning_rate", "ppo/loss/policy", "ppo/loss/total", "ppo/loss/value", "ppo/mean_non_score_reward", "ppo/mean_scores",
        "ppo/policy/advantages", "ppo/policy/advantages_mean", "ppo/policy/approxkl", "ppo/policy/clipfrac", "ppo/policy/entropy",
        "ppo/policy/policykl", "ppo/policy/ratio", "ppo/returns/mean", "ppo/returns/var", "ppo/std_scores", "ppo/val/clipfrac",
        "ppo/val/error", "ppo/val/mean", "ppo/val/var", "ppo/val/var_explained", "ppo/val/vpred", "time/ppo/calc_stats",
        "time/ppo/compute_advantages", "time/ppo/compute_rewards", "time/ppo/forward_pass", "time/ppo/optimize_step", "time/ppo/total",
        "tokens/queries_dist", "tokens/queries_len_mean", "tokens/queries_len_std", "tokens/responses_dist",
        "tokens/responses_len_mean", "tokens/responses_len_std",
    }
)  # fmt: skip
"""Of trl 0.11.4's `step`."""


CLASSIC_ATTRIBUTES = frozenset(
    {
        "accelerator", "batched_forward_pass", "compare_step", "compute_advantages", "compute_rewards", "config", "create_model_card",
        "current_device", "current_step", "data_collator", "dataloader", "dataset", "from_pretrained", "gather_stats", "generate",
        "highest_reward", "is_distributed", "is_encoder_decoder", "is_peft_model", "is_using_text_environment", "kl_ctl", "log_stats",
        "loss", "lr_scheduler", "model", "model_params", "optimizer", "optional_peft_ctx", "prepare_dataloader", "prepare_model_inputs",
        "push_to_hub", "push_to_hub_kwargs", "record_step_stats", "ref_model", "running", "save_pretrained", "step", "tokenizer",
        "train_minibatch",
    }
)  # fmt: skip
"""Public ones of trl 0.11.4's `PPOTrainer`."""


def blocks(text: str = TEXT) -> list[tuple[str, str]]:
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def half(diff: str, sign: str) -> str:
    """The lines of a diff before (`-`) or after (`+`) the change."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in (" ", sign))


def rows(heading: str) -> list[tuple[list[str], str]]:
    """(names in the first column, second column) of the first table below a heading."""
    table = re.search(r"((?:^\|.*\n)+)", TEXT[TEXT.index(f"\n## {heading}\n") :], flags=re.MULTILINE)
    assert table is not None
    cells = [line.strip("| \n").split(" | ") for line in table[1].splitlines()[2:]]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1].rstrip(" |")) for row in cells]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_scripts_run_as_they_stand_there(here: Path, policy_dir: Path, t5_dir: Path) -> None:
    names: dict[str, Any] = {}
    for language, code in blocks():
        script = half(code, "+") if language == "diff" else code
        for model, folder in (("gpt2", policy_dir), ("google/flan-t5-small", t5_dir)):
            script = script.replace(f'"{model}"', repr(str(folder)))
        exec(compile(script, str(DOCUMENT), "exec"), names)
    for folder in ("kind-gpt2", "kind-gpt2-lora", "brief-gpt2/best"):
        AutoModelForCausalLM.from_pretrained(here / folder)
    AutoModelForSeq2SeqLM.from_pretrained(here / "longer-t5")
    lines = read_metrics(here / "logs" / "desc-ppo,index-0")
    assert [line["step"] for line in lines] == [1, 2] and all("env/reward_mean" in line for line in lines)


def test_the_readmes_script_runs(here: Path, policy_dir: Path) -> None:
    readme = (DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Moving from trl's PPOTrainer") :]
    [script] = [code for language, code in blocks(section) if language == "python"]
    exec(compile(script.replace('"sft/models/latest"', repr(str(policy_dir))), "README.md", "exec"), {})
    AutoModelForCausalLM.from_pretrained(here / "brief")


def test_only_imports_and_what_the_text_names_change() -> None:
    changed = [line for language, code in blocks() if language == "diff" for line in code.splitlines() if line[0] in "+-"]
    rest = [line for line in changed if not re.match(r"[+-]from (trl|trl\.core|rlhf\.ppo) import ", line)]
    assert rest == ["-    optimize_cuda_cache=True,"]
    for language, code in blocks():
        if language == "diff":
            ast.parse(half(code, "-"))


def test_every_classic_setting_has_a_row_that_is_right() -> None:
    named: dict[str, str] = {name: told for names, told in rows("Settings") for name in names}
    assert named.keys() == CLASSIC_FIELDS
    ours = {field.name for field in dataclasses.fields(PPOConfig)}
    for name, told in named.items():
        assert told in ("same", "changed", "refused")
        assert (name in ELSEWHERE) == (told == "refused") and (name in ours) == (told != "refused"), name


def test_every_classic_statistic_has_a_row_that_is_right(build: Callable[..., PPOTrainer]) -> None:
    named: dict[str, str] = {name: told for names, told in rows("Statistics") for name in names}
    assert {name for name in named if not name.startswith("env/") and name not in ("game_log", "log_stats")} == CLASSIC_STATISTICS
    stats = build().step(*BATCH)
    assert {name for name, told in named.items() if told in ("same", "changed")} - stats.keys() == {
        "env/reward_mean", "env/reward_std", "env/reward_dist", "game_log", "log_stats",
    }  # fmt: skip
    for told in named.values():
        assert told in ("same", "changed", "none") or told.strip("`") in stats
    assert stats["tokens/queries_dist"].tolist() == [3, 6, 2, 4] and stats["tokens/responses_dist"].tolist() == [3, 5, 2, 4]
    assert stats["tokens/queries_len_std"] == pytest.approx(float(torch.tensor([3.0, 6, 2, 4]).std()))
    assert stats["tokens/responses_len_std"] == pytest.approx(float(torch.tensor([3.0, 5, 2, 4]).std()))


def test_every_classic_attribute_has_a_row_that_is_right(build: Callable[..., PPOTrainer]) -> None:
    trainer = build()
    told = {re.match(r"\.(\w+)", name): told for names, told in rows("The trainer") for name in names}
    named = {match[1]: told for match, told in told.items() if match is not None}
    assert named.keys() == CLASSIC_ATTRIBUTES
    assert {name for name, told in named.items() if told == "same"} == {name for name in CLASSIC_ATTRIBUTES if hasattr(trainer, name)}
    assert {name for name, told in named.items() if told == "refused"} == INSTEAD.keys()
    for name, instead in INSTEAD.items():
        with pytest.raises(AttributeError, match=re.escape(f"PPOTrainer has no {name}: {instead}")):
            getattr(trainer, name)
