"""Starting above the frozen layers gives what the whole model gives; a model that cannot is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.freezing import find_blocks
from common.models.lower_layers import LowerLayers
from rlhf.ppo.models import reference_copy

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2},
    "llama": LLAMA,
    "bloom": {"hidden_size": 16, "n_layer": 4, "n_head": 2},
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def make(kind: str, trained: int) -> Any:
    """A model of four blocks, of which the top `trained` and what stands above them train."""
    config = AutoConfig.for_model(kind, vocab_size=40, bos_token_id=1, eos_token_id=1, **MODELS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for block in find_blocks(model.base_model)[4 - trained :]:
        model.base_model.get_submodule(block.prefix.rstrip(".")).requires_grad_(True)
    return model


def states(trunk: Any) -> torch.Tensor:
    found: torch.Tensor = trunk(input_ids=IDS, use_cache=False).last_hidden_state
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("trained", [1, 3])
def test_states_and_gradients_above_the_frozen_layers_are_those_of_the_whole_model(kind: str, trained: int) -> None:
    trunk = make(kind, trained).base_model
    lower = LowerLayers.find(trunk)
    assert lower is not None and len(lower.below) == 4 - trained
    whole = states(trunk)
    whole.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in trunk.parameters() if parameter.grad is not None]
    trunk.zero_grad()
    entering = lower.states(input_ids=IDS)
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in lower.first.children()]
    with lower.replaced(entering):
        resumed = states(trunk)
    assert ran and not entering.requires_grad
    resumed.square().sum().backward()
    assert torch.equal(resumed, whole)
    got = [parameter.grad for parameter in trunk.parameters() if parameter.grad is not None]
    assert len(got) == len(expected) and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    for hook in hooks:
        hook.remove()
    assert torch.equal(states(trunk), whole)  # afterwards it computes everything again
    with lower.replaced(entering + 1):
        assert not torch.equal(states(trunk), whole)


def test_where_something_below_trains_nothing_is_kept() -> None:
    for spoil in (
        lambda model: model.get_input_embeddings().requires_grad_(True),
        lambda model: model.base_model.h[0].requires_grad_(True),
    ):
        model = make("gpt2", trained=1)
        assert LowerLayers.find(model.base_model) is not None
        spoil(model)
        assert LowerLayers.find(model.base_model) is None
    assert LowerLayers.find(make("gpt2", trained=4).base_model) is None


def test_layers_are_a_twins_too_only_while_they_are_the_same_tensors() -> None:
    model = make("gpt2", trained=2)
    lower = LowerLayers.find(model.base_model)
    assert lower is not None
    twin = reference_copy(model).base_model
    shared = lower.in_twin(twin)
    assert shared is not None
    with shared.replaced(lower.states(input_ids=IDS)):
        assert torch.equal(states(twin), states(model.base_model))
    apart = reference_copy(model, share_frozen=False).base_model
    assert lower.in_twin(apart) is None
