"""Activations that are recomputed leave alone what does not train."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common.models.recompute import recompute_activations

CONFIGS = {
    "gpt_neo": {"hidden_size": 16, "num_heads": 2, "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "llama": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32},
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_backward_pass_ends_at_the_lowest_block_that_trains(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](vocab_size=20, **CONFIGS[model_type])).requires_grad_(False)
    blocks = model.h if model_type == "gpt_neo" else model.layers
    blocks[2].requires_grad_(True)
    recompute_activations(model)
    model.train()
    ran = [0] * 4
    for index, block in enumerate(blocks):
        part = block.attn if model_type == "gpt_neo" else block.self_attn
        part.register_forward_hook(lambda *_, index=index: ran.__setitem__(index, ran[index] + 1))
    model(torch.arange(2, 12)[None]).last_hidden_state.sum().backward()
    assert ran == [1, 1, 2, 2]
    assert all(parameter.grad is not None for parameter in blocks[2].parameters())
