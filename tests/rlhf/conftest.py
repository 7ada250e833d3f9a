"""Tiny policies and reward models for the tests of PPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from common.checkpoint import new_manifest, save_model_directory
from common.models.load import build_generator, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
    "t5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2},
}
TEXTS = [
    "Question: What is the capital of Peru?\nAnswer:",
    " The capital is Lima.",
    "Question: Is water wet?\nAnswer:",
    " Yes, it is. Thank you for asking!",
]
MakeModel = Callable[..., Any]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerBase) -> MakeModel:
    """`make_model(model_type, seed)`: a small generator whose logits are far from flat."""

    def make(model_type: str = "gpt_neo", seed: int = 0, **changes: Any) -> Any:
        init = ModelInit(model_type=model_type, config={**CONFIGS[model_type], **changes})
        model = build_generator(init, tokenizer, 64, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.3, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A causal policy as SFT saves it."""
    folder = tmp_path_factory.mktemp("sft") / "model"
    manifest = new_manifest("sft", tokenizer, max_length=64)
    return save_model_directory(folder, make_model("gpt_neo", 1), tokenizer, manifest)


@pytest.fixture(scope="session")
def t5_dir(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An encoder-decoder policy."""
    folder = tmp_path_factory.mktemp("sft_t5") / "model"
    return save_model_directory(folder, make_model("t5", 1), tokenizer, new_manifest("sft", tokenizer, max_length=64))


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A reward model with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = RewardModel.from_backbone(make_model("gpt_neo", 2).transformer, seed=3)
    manifest = new_manifest("reward_classification", tokenizer, max_length=64, score_mean=0.5, score_scale=2.0)
    return save_model_directory(folder, model, tokenizer, manifest)
