"""The last block's feed-forward part runs for the tokens that are read, and what is read stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from common.models.fused import set_fused
from common.models.last_layer import LastFeedForward
from common.models.packed import line_positions, packed_line
from common.models.recompute import recompute_activations

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "llama": LLAMA,
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
LENGTHS = [7, 1, 9]
PLACES = torch.tensor([16, 5, 6, 5])  # a token may be read twice


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=40, **{**MODELS.get(kind, {}), **changes})).eval()
    set_fused(model)
    return model


def last_part(model: Any) -> Any:
    blocks = model.h if hasattr(model, "h") else model.layers
    return blocks[-1].mlp


def read(model: Any, last: LastFeedForward | None) -> tuple[Tensor, Tensor, list[int]]:
    """States that are read, the gradient of all parameters, and how many tokens entered the last feed-forward part."""
    entered: list[int] = []
    with last_part(model).register_forward_hook(lambda _, arguments, __: entered.append(arguments[0].shape[1])):
        ids = torch.arange(2, 2 + sum(LENGTHS))[None]
        with packed_line(model, LENGTHS):
            inputs = {"input_ids": ids, "position_ids": line_positions(LENGTHS, "cpu")}
            if last is None:
                states = model(**inputs, use_cache=False).last_hidden_state[0, PLACES]
            else:
                with last.at(PLACES):
                    states = model(**inputs, use_cache=False).last_hidden_state[0, PLACES]
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return states.detach(), gradient, entered


@pytest.mark.parametrize("kind", MODELS)
def test_states_and_gradients_are_those_of_the_whole_model(kind: str) -> None:
    model = make(kind)
    last = LastFeedForward.find(model)
    assert last is not None and last.module is last_part(model)
    expected, whole_gradient, whole = read(model, None)
    states, gradient, entered = read(model, last)
    assert whole == [17] and entered == [3]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5)
    assert read(model, None)[2] == [17]  # afterwards the model is as it was


def test_a_model_that_computes_activations_again_computes_them_for_all_tokens() -> None:
    model = make("gpt_neo").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    last = LastFeedForward.find(model)
    expected = read(model, None)
    recompute_activations(model)
    states, gradient, entered = read(model, last)
    assert set(entered) == {17}
    torch.testing.assert_close(states, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5)
    assert read(model.eval(), last)[2] == [3]  # at rest nothing is computed again


def test_the_trial_draws_no_dropout_and_modes_stay() -> None:
    model = make("gpt_neo", resid_dropout=0.5, embed_dropout=0.5).train()
    model.h[0].eval()
    assert LastFeedForward.find(model) is not None
    assert model.training and not model.h[0].training


def test_blocks_of_another_kind_are_left_alone() -> None:
    model = make("gpt_neo")
    block = model.h[-1]
    block.second = torch.nn.Linear(16, 16)
    assert LastFeedForward.find(model) is None  # two such parts
    del block.second
    block.mlp.register_forward_hook(lambda _, __, states: states + states.mean(1, keepdim=True))
    assert LastFeedForward.find(model) is None  # a token's result hangs on other tokens
    block.mlp, block.idle = torch.nn.Identity(), torch.nn.Linear(16, 16)
    assert LastFeedForward.find(model) is None  # a part that nothing runs
