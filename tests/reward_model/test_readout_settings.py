"""Readouts as a user asks for them: what a config may say, and training with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import new_manifest, read_manifest, save_model_directory
from common.errors import UserError
from common.models.load import build_backbone, build_generator, train_tokenizer
from common.models.readouts import build_readout
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import ReadoutSettings
from common.schema import ModelInit
from reward_model.classification import train_reward as train_pairs
from reward_model.regression import train_reward as train_scores
from tests.reward_model.conftest import ARCHITECTURES

MAINS: dict[str, Any] = {"pair": train_pairs.main, "score": train_scores.main}


def refusal(config: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        MAINS["pair"](["--config_file", str(config), "--validate", *overrides])
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("architecture", "readout", "key", "message"),
    [
        ("gpt_neo", {"name": "decoder_output"}, "name", "got decoder_output, which makes no sense over a causal model, expected one of: "
         "last_token, layerwise_attention, full_attention_pooling, mean_pool, weighted_layers"),
        ("llama", {"name": "attention_pooled_encoder"}, "name", "got attention_pooled_encoder, which makes no sense over a causal model"),
        ("bert", {"name": "attention_pooled_decoder"}, "name", "got attention_pooled_decoder, which makes no sense over an encoder"),
        ("t5", {"name": "attention_pooled_decoder", "n_layers": 2}, "n_layers", "got 2, expected at most the model's 1 layers"),
        ("gpt_neo", {"name": "weighted_layers", "n_layers": 3}, "n_layers", "got 3, expected at most the model's 2 layers"),
        ("gpt_neo", {"n_layers": 2}, "n_layers", "got 2, expected nothing here: last_token has no settings"),
        ("gpt_neo", {"name": "mean_pool", "attention_size": 8}, "attention_size", "got 8, expected nothing here: mean_pool has "
         "hidden_sizes, dropout"),
        ("gpt_neo", {"name": "mean_pool", "hidden_sizes": [0]}, "hidden_sizes.0", "got 0, expected a whole number >= 1"),
        ("gpt_neo", {"name": "mean"}, "name", "got 'mean', expected last_token, "),
    ],
)  # fmt: skip
def test_a_readout_that_cannot_be_is_refused_with_its_line(
    architecture: str, readout: dict[str, Any], key: str, message: str, write_config, tmp_path: Path
) -> None:
    config = write_config("pair", architecture, model_params={"readout": readout})
    lines = config.read_text().splitlines()
    first = lines.index("  readout:") + 1
    [problem] = refusal(config)
    number = int(problem.removeprefix(f"{config}:").partition(":")[0])
    assert problem.startswith(f"{config}:{number}: model_params.readout.{key}: {message}")
    assert number > first and lines[number - 1].split()[0] in (f"{key.partition('.')[0]}:", "-")
    assert not (tmp_path / "models").exists()


def test_the_readout_is_checked_against_a_model_directory_too(write_config, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Question: What?\nAnswer: good"], 270)
    t5 = build_generator(ModelInit(model_type="t5", config=ARCHITECTURES["t5"]), tokenizer, 64, 0)
    folder = save_model_directory(tmp_path / "t5", t5, tokenizer, new_manifest("sft", tokenizer))
    bert = RewardModel(build_backbone(ModelInit(model_type="bert", config=ARCHITECTURES["bert"]), tokenizer, 64, 0), ReadoutSettings(), 0)
    reward = save_model_directory(tmp_path / "bert", bert, tokenizer, new_manifest("reward_classification", tokenizer, max_length=64))
    config = write_config("pair", model_init=None, model_name=str(folder), model_params={"readout": {"name": "decoder_output"}})
    assert MAINS["pair"](["--config_file", str(config), "--validate"]) == 0
    [problem] = refusal(config, f"trainer.ckpt_path={reward}")
    assert "model_params.readout.name: got decoder_output, which makes no sense over an encoder" in problem
    [problem] = refusal(config, "model_params.readout={name: layerwise_attention, n_layers: 3}")
    assert problem == "override model_params.readout: model_params.readout.n_layers: got 3, expected at most the model's 2 layers"


def test_a_name_on_the_command_line_is_enough(write_config) -> None:
    assert MAINS["pair"](["--config_file", str(write_config("pair")), "--validate", "model_params.readout.name=mean_pool"]) == 0


@pytest.mark.parametrize(
    ("kind", "architecture", "readout"),
    [
        ("pair", "t5", {"name": "layerwise_attention", "attention_size": 4, "dropout": 0.1}),
        ("score", "t5", {"name": "decoder_output", "hidden_sizes": [8]}),
        ("score", "bert", {"name": "attention_pooled_encoder"}),
        ("pair", "gpt_neo", {"name": "weighted_layers", "n_layers": 2}),
        ("score", "llama", {"name": "full_attention_pooling"}),
    ],
)
def test_it_trains_and_the_parts_that_are_read_move(kind: str, architecture: str, readout: dict[str, Any], write_config) -> None:
    config = write_config(kind, architecture, model_params={"readout": readout})
    assert MAINS[kind](["--config_file", str(config), "trainer.params.max_steps=2", "trainer.params.val_check_interval=1"]) == 0
    folder = (config.parent / "models" / "latest").resolve()
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.readout is not None and readout.items() <= manifest.readout.items()
    assert len(set(RewardScorer(folder).score(["What is thing 1?"] * 2, ["good 1", "bad 3"]))) == 2
    trained, model = load_file(folder / "readout.safetensors"), RewardModel.load(folder)
    fresh = build_readout(model.readout_settings, model.needs, 32, seed=42).state_dict()
    assert fresh.keys() == trained.keys() and not any(torch.equal(fresh[name], trained[name]) for name in fresh)


def test_a_decoder_that_is_not_read_stays_as_it_is(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {}
    for steps in (1, 2):
        config = write_config("pair", "t5", desc=f"steps{steps}", model_params={"readout": {"name": "mean_pool"}})
        assert MAINS["pair"](["--config_file", str(config), f"trainer.params.max_steps={steps}"]) == 0
        tensors[steps] = load_file((config.parent / "models" / "latest").resolve() / "model.safetensors")
    assert "tensors stay as they are: no score is read out of them" in capsys.readouterr().out
    moved = {name for name, tensor in tensors[1].items() if not torch.equal(tensor, tensors[2][name])}
    assert moved and not any(name.startswith("decoder") for name in moved)
    assert any(name.startswith("decoder") for name in tensors[1])
