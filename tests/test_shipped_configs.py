"""Every config that ships is read by its stage's schema, from its stage's folder, and says nothing outdated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from common.config import load_config, parse_command_line, resolved_dict
from common.config_keys import ALIASES
from common.config_yaml import read_marked_yaml
from common.evaluation.config import GenerationTestConfig
from common.readout_settings import SETTINGS, ReadoutName, ReadoutSettings
from common.schema import Section
from reward_model.comparison_config import ComparisonConfig
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, tuple[type[Section], type[Section]]] = {  # folder -> (training, evaluation)
    "sft": (SFTConfig, GenerationTestConfig),
    "reward_model/classification": (ClassificationConfig, RewardTestConfig),
    "reward_model/regression": (RegressionConfig, RewardTestConfig),
    "rlhf": (PPORunConfig, GenerationTestConfig),
}
EXPECTED = {"trainer_config.yaml", "test_config.yaml", "gpt_neo_125m.yaml", "qwen_0.5b.yaml"}
FOLDERS = (*STAGES, "reward_model")  # the last one has the comparison of readouts
SHIPPED = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder / "configs").glob("*.yaml"))


def schema_of(path: Path) -> type[Section]:
    if path.name.startswith("compare"):
        return ComparisonConfig
    return STAGES[str(path.parts[0] if path.parts[0] != "reward_model" else Path(*path.parts[:2]))][path.name.startswith("test")]


def shipped(stage: str, name: str) -> Any:
    path = Path(stage) / "configs" / name
    return load_config(schema_of(path), ROOT / path)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_ships_its_configs(stage: str) -> None:
    assert {path.name for path in (ROOT / stage / "configs").glob("*.yaml")} >= EXPECTED


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_config_is_valid_without_a_note_about_old_names(path: Path) -> None:
    stage_dir = ROOT / path.parent.parent
    invocation = parse_command_line(schema_of(path), stage_dir, ["--config", str(ROOT / path)], description="")
    assert not [note for note in invocation.notes if "read as" in note or "obsolete" in note]
    text = (ROOT / path).read_text()
    assert not [old for old in ALIASES if old in text]
    assert text.startswith("# ")
    resolved = resolved_dict(invocation.config)
    assert "api" not in resolved["wandb"]


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_paths_lie_inside_the_repository(path: Path) -> None:
    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    config = load_config(schema_of(path), ROOT / path)
    absolute = [Path(text) for text in texts(resolved_dict(config)) if text.startswith("/")]
    assert absolute
    assert all(found.is_relative_to(ROOT) for found in absolute)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_data_that_a_shipped_config_names_is_there(path: Path) -> None:
    config: Any = load_config(schema_of(path), ROOT / path)
    data = Path(config.data_config.data_file_path if isinstance(config, PPORunConfig) else config.data.data_dir)
    assert data.is_file() or str(data).startswith("hf:")


@pytest.mark.parametrize("stage", ["reward_model/classification", "reward_model/regression"])
def test_every_readout_is_a_choice_that_spells_out_its_settings(stage: str) -> None:
    group = ROOT / stage / "configs" / "readout"
    assert {path.stem for path in group.glob("*.yaml")} == set(get_args(ReadoutName))
    for name in get_args(ReadoutName):
        config = load_config(STAGES[stage][0], ROOT / stage / "configs/trainer_config.yaml", [f"readout={name}", "model_name=google/t5"])
        assert isinstance(config, (ClassificationConfig, RegressionConfig))
        readout = config.model_params.readout
        assert readout == ReadoutSettings(name=name)
        assert readout.model_fields_set == {"name", *SETTINGS[name]}
        assert (group / f"{name}.yaml").read_text() == (ROOT / "reward_model/classification/configs/readout" / f"{name}.yaml").read_text()


def test_the_flan_t5_settings_ship() -> None:
    config = shipped("reward_model/classification", "flan_t5_hh_rlhf.yaml")
    assert (config.model_name, config.data.data_dir) == ("google/flan-t5-base", "hf:Anthropic/hh-rlhf")
    assert (config.data.batch_size, config.data.val_batch_size, config.trainer.params["max_epochs"]) == (96, 1024, 6)
    assert config.model_params.freeze_backbone and config.model_params.readout.name == "attention_pooled_encoder"
    assert (config.trainer.checkpoint.monitor, config.trainer.checkpoint.mode, config.tensorboard) == ("val/loss", "min", True)


def test_readouts_are_compared_over_flan_t5_at_the_same_settings() -> None:
    one, many = shipped("reward_model/classification", "flan_t5_hh_rlhf.yaml"), shipped("reward_model", "compare_flan_t5_hh_rlhf.yaml")
    assert many.data == one.data and many.model_name == one.model_name and many.trainer.params.items() >= one.trainer.params.items()
    assert many.model_params.kept_states == "bfloat16" and many.model_params.learning_rate == one.model_params.learning_rate
    small = shipped("reward_model", "compare_readouts.yaml")
    assert small.model_name == shipped("reward_model/classification", "trainer_config.yaml").model_name and small.readouts is None


def test_the_embedded_default_needs_neither_network_nor_gpu_nor_account() -> None:
    for stage in STAGES:
        for name in ("trainer_config.yaml", "test_config.yaml"):
            config = shipped(stage, name)
            if isinstance(config, PPORunConfig):
                assert config.ppo_config.log_with is None and config.hf_hub_name is None
            else:
                assert config.wandb.mode == "disabled"
            if name == "test_config.yaml":
                assert not config.cuda


def test_the_embedded_default_hands_each_stage_the_one_before() -> None:
    latest = {stage: os.path.realpath(ROOT / stage / "models/latest") for stage in STAGES}
    assert shipped("sft", "trainer_config.yaml").model_init.model_type == "gpt_neo"
    # in the order of the README's commands, each stage starts from what an earlier one wrote
    assert shipped("reward_model/classification", "trainer_config.yaml").model_name == latest["sft"]
    earlier = (latest["sft"], latest["reward_model/classification"])
    assert shipped("reward_model/regression", "trainer_config.yaml").model_name in earlier
    ppo = shipped("rlhf", "trainer_config.yaml")
    assert ppo.ppo_config.model_name == latest["sft"]
    assert ppo.reward_config.reward_model_name in (latest["reward_model/classification"], latest["reward_model/regression"])
    for stage in STAGES:
        assert shipped(stage, "test_config.yaml").model_name == latest[stage]
        assert shipped(stage, "trainer_config.yaml").index == "auto"  # so that the commands can be run again and again


def test_the_embedded_default_fits_together() -> None:
    """No prompt of the default is longer in one stage than in another, and answers fit into the model's positions."""
    sft, ppo = shipped("sft", "trainer_config.yaml"), shipped("rlhf", "trainer_config.yaml")
    positions = sft.model_init.config["max_position_embeddings"]
    assert sft.data.max_length <= positions
    assert ppo.data_config.max_prompt_length + ppo.generation_config.max_new_tokens <= positions
    for stage in ("reward_model/classification", "reward_model/regression"):
        assert shipped(stage, "trainer_config.yaml").data.max_length <= positions


@pytest.mark.parametrize("stage", ["sft", "reward_model/classification", "reward_model/regression"])
def test_the_original_settings_ship(stage: str) -> None:
    config = shipped(stage, "gpt_neo_125m.yaml")
    params = config.model_params
    assert (params.learning_rate, params.adam_betas, params.warmup_steps_per_cent, params.weight_decay) == (2e-5, (0.9, 0.95), 0.01, 0.001)
    assert params.active and params.layers_not_to_freeze == [0, 11]
    assert config.data.max_length == 512


def test_the_original_ppo_settings_ship() -> None:
    config = shipped("rlhf", "gpt_neo_125m.yaml")
    assert (config.ppo_config.batch_size, config.ppo_config.ppo_epochs, config.ppo_config.learning_rate) == (64, 4, 1.41e-5)
    assert config.freeze_config.active and config.freeze_config.layers_not_to_freeze == [0, 11]


def test_the_embedded_default_spells_out_the_sections_of_the_original() -> None:
    """Whoever opens the default finds what can be set, under the names it has."""
    sections = {
        "sft": {"data", "model_params", "seed", "trainer", "wandb"},
        "reward_model/classification": {"data", "model_name", "model_params", "seed", "trainer", "wandb"},
        "reward_model/regression": {"data", "model_name", "model_params", "seed", "trainer", "wandb"},
        "rlhf": {"data_config", "generation_config", "global_epochs", "ppo_config", "reward_config", "save_config"},
    }
    for stage, names in sections.items():
        marked = read_marked_yaml(ROOT / stage / "configs/trainer_config.yaml", stage)
        assert not marked.problems
        assert names <= set(marked.data), stage
