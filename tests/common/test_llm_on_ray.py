"""Configs of llm-on-ray are read: each key has a place that exists, a reason for none, or a line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import Invocation, parse_command_line, resolved_dict
from common.errors import UserError
from common.evaluation.config import GenerationTestConfig
from common.llm_on_ray import KEYS, NO_EFFECT, REFUSED, stage_of
from common.schema_types import type_at
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

SCHEMAS: dict[str, Any] = {"sft": SFTConfig, "reward": ClassificationConfig, "ppo": PPORunConfig}
# A Python literal, as their first files were.
PPO_CONF = """\
# python, not json
{
    "General": {"model_name": "EleutherAI/gpt2", "model_pretrain": None, "rm_name": "EleutherAI/gpt2", "rm_pretrain": "checkpoint/rm"},
    "Dataset": {
        "train_file": "data/ppo.jsonl",
        "validation_file": None,
        "validation_split_percentage": 5
    },
    "Training": {
        "optimizer": "AdamW",
        "experience_batch_size": 2,
        "epochs": 3,
        "learning_rate": 1e-5,
        "kl_coeff": 0.1,
        "num_training_workers": 2,
        "resources_per_worker": {
            "CPU": 32
        },
    },
}
"""
FINETUNE = """\
General:
  base_model: EleutherAI/gpt-j-6b
  gpt_base_model: true
  output_dir: out
  checkpoint_dir: checkpoints
  save_strategy: no
  config: {trust_remote_code: false, use_auth_token: null}
  lora_config: {task_type: CAUSAL_LM, r: 4, lora_alpha: 32, lora_dropout: 0.1}
  enable_gradient_checkpointing: true
Dataset:
  train_file: data/sft.jsonl
  group: true
  max_length: 256
  validation_split_percentage: 10
Training:
  optimizer: adamw_torch
  batch_size: 2
  epochs: 3
  learning_rate: 1.0e-05
  lr_scheduler: cosine_with_restarts
  weight_decay: 0.0
  mixed_precision: bf16
  device: CPU
  num_training_workers: 2
  resources_per_worker: {CPU: 2, GPU: 0, HPU: 0}
  accelerate_mode: CPU_DDP
  gradient_accumulation_steps: 4
  logging_steps: 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory beside the stage's folder."""
    (tmp_path / "stage/configs").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def invoke(schema: Any, here: Path, text: str, *overrides: str) -> Invocation[Any]:
    (here / "C").write_text(text)
    return parse_command_line(schema, here.parent / "stage", ["--config_path", "C", *overrides], description="")


def problems(schema: Any, here: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        invoke(schema, here, text, *overrides)
    return list(caught.value.problems)


def value(config: Any, setting: str) -> Any:
    found = resolved_dict(config)
    for part in setting.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_place_exists_and_everything_else_has_a_reason(key: str, stage: str) -> None:
    cell = getattr(KEYS[key], stage)
    if cell in (NO_EFFECT, REFUSED):
        assert KEYS[key].why
    else:
        assert type_at(SCHEMAS[stage], tuple(cell.split("."))) is not None


def test_stages_are_told_by_their_schemas() -> None:
    stages = {SFTConfig: "sft", ClassificationConfig: "reward", RegressionConfig: "reward", PPORunConfig: "ppo"}
    assert all(stage_of(schema) == stage for schema, stage in stages.items())
    assert [stage_of(schema) for schema in (GenerationTestConfig, RewardTestConfig)] == [None, None]


def test_a_python_file_of_ppo_settings_is_read(here: Path) -> None:
    invocation = invoke(PPORunConfig, here, PPO_CONF)
    expected = {
        "ppo_config.model_name": "EleutherAI/gpt2",
        "ppo_config.model_pretrain": None,
        "reward_config.reward_model_name": "EleutherAI/gpt2",
        "reward_config.rm_pretrain": "checkpoint/rm",
        "data_config.data_file_path": str(here / "data/ppo.jsonl"),  # from the working directory, as there
        "data_config.validation_file": None,
        "data_config.validation_split_percentage": 5.0,
        "ppo_config.optimizer": "AdamW",
        "ppo_config.batch_size": 2,
        "global_epochs": 3,
        "ppo_config.learning_rate": 1e-5,
        "ppo_config.init_kl_coef": 0.1,
        "ppo_config.adap_kl_ctrl": False,
        "ppo_config.ppo_epochs": 1,
        "generation_config.max_new_tokens": 50,
        "launch.engine": "ray",
        "launch.num_training_workers": 2,
        "launch.resources_per_worker": {"CPU": 32, "GPU": 0},
    }
    assert {setting: value(invocation.config, setting) for setting in expected} == expected
    assert "C:14: Training.kl_coeff is read as ppo_config.init_kl_coef" in invocation.notes
    assert "C:9: launch.engine is ray, as in llm-on-ray" in invocation.notes


@pytest.mark.parametrize("schema", [SFTConfig, ClassificationConfig, RegressionConfig])
def test_finetuning_settings_are_read(schema: Any, here: Path) -> None:
    invocation = invoke(schema, here, FINETUNE)
    expected = {
        "model_name": "EleutherAI/gpt-j-6b",
        "trainer.checkpoint.dirpath": str(here / "out"),
        "trust_remote_code": False,
        "model_params.lora": {"r": 4, "lora_alpha": 32.0, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "model_params.gradient_checkpointing": True,
        "data.data_dir": str(here / "data/sft.jsonl"),
        "data.max_length": 256,
        "data.validation_split_percentage": 10.0,
        "model_params.optimizer": "AdamW",
        "model_params.adam_betas": [0.9, 0.999],
        "model_params.learning_rate": 1e-5,
        "model_params.lr_scheduler": "cosine_with_restarts",
        "model_params.warmup_steps_per_cent": 0.0,
        "model_params.weight_decay": 0.0,
        "data.batch_size": 2,
        "launch.engine": "ray",
        "launch.resources_per_worker": {"CPU": 2, "GPU": 0},
        "trainer.params": {
            "max_epochs": 3,
            "precision": "bf16-mixed",
            "accelerator": "cpu",
            "accumulate_grad_batches": 4,
            "log_every_n_steps": 7,
        },
    }
    assert {setting: value(invocation.config, setting) for setting in expected} == expected
    assert value(invocation.config, "data.batching") == ("packed" if schema is SFTConfig else "bucketed")
    assert "C:5: General.checkpoint_dir has no effect: General.output_dir says it" in invocation.notes
    assert "C:16: Training.optimizer is read as model_params.optimizer: AdamW" in invocation.notes
    assert any(note.startswith("C:6: General.save_strategy has no effect: ") for note in invocation.notes)


def test_steps_end_a_run_where_they_are_given(here: Path) -> None:
    config = invoke(SFTConfig, here, FINETUNE + "  max_train_steps: 20\n").config
    assert (config.trainer.params["max_steps"], config.trainer.params["max_epochs"]) == (20, -1)
    text = PPO_CONF.replace('"epochs": 3', '"training_iteration": 1000')
    for overrides, steps in (((), 1000), (("Training.training_iteration=2000",), 2000)):
        ppo = invoke(PPORunConfig, here, text, *overrides).config
        assert (ppo.ppo_config.steps, ppo.global_epochs) == (steps, steps)
    ppo = invoke(PPORunConfig, here, PPO_CONF, "Training.training_iteration=20").config
    assert (ppo.ppo_config.steps, ppo.global_epochs) == (20, 3)
    assert invoke(SFTConfig, here, FINETUNE, "Training.max_train_steps=20").config.trainer.params["max_epochs"] == -1


def test_sections_of_another_kind_are_refused_and_empty_ones_are_none(here: Path) -> None:
    text = "General: {base_model: m, config: null}\nDataset: {train_file: a}\nTraining:\n"
    assert invoke(SFTConfig, here, text).config.model_name == "m"
    assert problems(SFTConfig, here, text.replace("Training:", "Training: [1]").replace("config: null", "config: x")) == [
        "C:1: General.config: got a single value, expected a section",
        "C:3: Training: got a list, expected a section",
    ]
    assert problems(SFTConfig, here, text + "data: rows\n") == [
        "C:4: data: got 'rows', expected a section with keys such as data_dir, columns, validation_file, validation_split_percentage"
    ]


def test_a_whole_section_may_come_from_the_command_line(here: Path) -> None:
    config = invoke(SFTConfig, here, FINETUNE, "Dataset={train_file: /b.jsonl, max_length: 64}").config
    assert (config.data.data_dir, config.data.max_length, config.data.batching) == ("/b.jsonl", 64, "packed")


def test_what_has_no_place_is_a_line_each_that_says_what_to_do(here: Path) -> None:
    text = FINETUNE.replace("use_auth_token: null", "use_auth_token: abc123") + ("  kl_coeff: 0.2\n  optimiser: SGD\n  sampler: x\n")
    lines = problems(SFTConfig, here, text)
    assert lines == [
        "C:7: General.config.use_auth_token: a key belongs into the environment (HF_TOKEN)",
        "C:29: Training.kl_coeff: it belongs to PPO (rlhf/train_ppo.py), and stays fixed there (`adap_kl_ctrl: false`)",
        "C:30: Training.optimiser: unknown key; did you mean Training.optimizer?",
        "C:31: Training.sampler: unknown key; docs/llm_on_ray.md lists those that are read",
    ]
    assert "abc123" not in "".join(lines)


def test_a_value_that_we_do_not_have_is_told_at_its_line(here: Path) -> None:
    text = FINETUNE.replace("adamw_torch", "Adadelta").replace("mixed_precision: bf16", "mixed_precision: fp8")
    assert problems(SFTConfig, here, text) == [
        "C:16: model_params.optimizer: got 'Adadelta', expected AdamW, Adam, Adafactor or SGD",
        *[line for line in problems(SFTConfig, here, text) if line.startswith("C:22: trainer.params.precision: got 'fp8', expected ")],
    ]


def test_the_command_line_takes_their_names_too_and_comes_last(here: Path) -> None:
    config = invoke(PPORunConfig, here, PPO_CONF, "Training.kl_coeff=0.5", "ppo_config.steps=7", "General.rm_pretrain=null").config
    assert (config.ppo_config.init_kl_coef, config.ppo_config.steps) == (0.5, 7)
    assert config.reward_config.rm_pretrain == "checkpoint/rm"  # null asks for nothing
    assert problems(PPORunConfig, here, PPO_CONF, "General.base_model=x") == [
        "override General.base_model: PPO's policy is `General.model_name`"
    ]


def test_our_settings_may_stand_beside_theirs_but_not_twice(here: Path) -> None:
    text = FINETUNE + "desc: mine\nevaluation: {num_generated: 3}\nmodel_params: {warmup_steps_per_cent: 0.1}\n"
    config = invoke(SFTConfig, here, text).config
    assert (config.desc, config.evaluation.num_generated, config.model_params.warmup_steps_per_cent) == ("mine", 3, 0.1)
    twice = problems(SFTConfig, here, FINETUNE + "model_params: {learning_rate: 0.1}\n")
    assert twice == [
        "C:19: Training.learning_rate: is llm-on-ray's name of model_params.learning_rate, which C:29 gives too; keep "
        "model_params.learning_rate"
    ]


def test_a_script_that_does_not_train_says_so(here: Path) -> None:
    assert problems(GenerationTestConfig, here, FINETUNE) == [
        "C:1: General: is a section of llm-on-ray's training configs, and this script does not train"
    ]


def test_single_names_of_theirs_are_read_in_our_sections(here: Path) -> None:
    text = "ppo_config: {model_name: m, kl_coeff: 0.3, experience_batch_size: 4}\nreward_config: {reward_model_name: r}\n"
    invocation = invoke(PPORunConfig, here, text + "data_config: {train_file: /a.jsonl}\nsave_config: {output_dir: /out}\n")
    config = invocation.config
    assert (config.ppo_config.init_kl_coef, config.ppo_config.batch_size) == (0.3, 4)
    assert (config.data_config.data_file_path, config.save_config.checkpoint_dir) == ("/a.jsonl", "/out")
    assert "C:1: ppo_config.kl_coeff is read as init_kl_coef" in invocation.notes
    sft = invoke(SFTConfig, here, "data: {train_file: /a.jsonl}\nmodel_name: m\n", "trainer.checkpoint.output_dir=/o").config
    assert (sft.data.data_dir, sft.trainer.checkpoint.dirpath) == ("/a.jsonl", "/o")
