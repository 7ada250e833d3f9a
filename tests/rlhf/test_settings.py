"""Every setting has a reader, and what cannot be pushed stays where it is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from common.schema import RowSettings
from rlhf.config import PPOData, PPOEvaluation, PPOParams, PPORunConfig, RewardSettings, SaveSettings
from rlhf.ppo.config import PPOConfig
from rlhf.training import push_to_hub

SECTIONS = [PPOData, PPOParams, PPOEvaluation, SaveSettings, RewardSettings, PPORunConfig]


def readers(root: Path) -> str:
    return "\n".join(path.read_text() for path in (root / "rlhf").rglob("*.py") if path.name != "config.py")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_is_read(section: type, root: Path) -> None:
    text = readers(root)
    read_as = {"mini_batch_size": "minibatch"}
    # read by common/records.py, common/resume.py, common/runs.py and common/schema.py
    shared = {*RowSettings.model_fields, "desc", "require_clean_git", "results_root"}
    unread = [
        name
        for name in section.model_fields
        if not re.search(rf"\.{read_as.get(name, name)}\b", text) and name not in shared and name not in trainer_settings()
    ]
    assert unread == []


def test_the_trainer_reads_every_setting_of_its_own(root: Path) -> None:
    names = ("trainer", "classic_attributes", "update", "estimators", "loop", "logs", "config")
    code = "".join((root / "rlhf" / "ppo" / f"{name}.py").read_text() for name in names)
    for_the_record = {"task_name", "model_name", "query_dataset", "reward_model"}
    read = {name for name in trainer_settings() if re.search(rf"(config|self|settings)\.{name}\b", code)}
    assert trainer_settings() - read == for_the_record


def trainer_settings() -> set[str]:
    return {field.name for field in fields(PPOConfig)}


def test_a_section_becomes_the_trainers_settings() -> None:
    params = PPOParams(model_name="x", batch_size=12, gradient_accumulation_steps=2, mini_batch_size=3, lam=0.9, dual_clip=2.0)
    config = PPOConfig.from_params(params, seed=7)
    assert (config.batch_size, config.mini_batch_size, config.backward_batch_size) == (12, 3, 6)
    assert (config.lam, config.dual_clip, config.seed, config.classic_quirks) == (0.9, 2.0, 7, False)
    assert PPOConfig.from_params(PPOParams(model_name="x", batch_size=12), 0).mini_batch_size == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_estimator": "rloo"}, "compares answers to one prompt: samples_per_prompt 1 is less than 2"),
        ({"samples_per_prompt": 7}, "batch_size 64 counts answers and is not divisible by samples_per_prompt 7"),
        ({"advantage_estimator": "grpo", "samples_per_prompt": 4, "critic": "model"}, "critic: model: advantage_estimator grpo needs no"),
        ({"use_score_norm": True}, "use_score_norm has no effect without use_score_scaling"),
    ],
)
def test_a_section_whose_settings_do_not_fit_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOParams(model_name="x", **settings)


def test_without_a_login_nothing_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    push_to_hub(tmp_path, "user/name")
    assert f"no Hugging Face login (hf auth login); the model is in {tmp_path}" in capsys.readouterr().out


def test_a_push_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    push_to_hub(tmp_path, "user/name")
    assert capsys.readouterr().err == f"warning: pushing to user/name failed (no route to host); the model is in {tmp_path}\n"


def test_a_new_repository_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: asked.update(options, name=name))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: asked.update(options))
    push_to_hub(tmp_path, "user/name")
    assert asked["name"] == asked["repo_id"] == "user/name" and asked["private"] is True
