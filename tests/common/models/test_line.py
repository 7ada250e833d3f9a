"""Rows in a line without padding, and beginnings that several rows share, change neither states nor gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common.collate import right_pad
from common.models.fused import set_fused
from common.models.packed import NOTHING, SHARED_TOKENS, Shared, as_line, can_pack, common_beginnings

VOCAB = 50
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
CONFIGS = {
    "gpt_neo": {
        "hidden_size": 16, "num_heads": 2, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4,
        "max_position_embeddings": 64, "resid_dropout": 0.5,
    },
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "llama": {**SMALL, "intermediate_size": 32},
    "qwen2": {**SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "use_sliding_window": True, "sliding_window": 4,
              "max_window_layers": 1},
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_neox": {**SMALL, "intermediate_size": 32},
}  # fmt: skip
QUESTION, OTHER = list(range(2, 14)), list(range(20, 30))
ROWS = [[*QUESTION, 30, 31, 1], [*OTHER, 32, 1], [*QUESTION, 33, 34, 35, 36, 37, 1], [3, 4, 5, 1], [*QUESTION, 30, 40, 1], [*QUESTION, 1]]
"""Three answers and an empty one to one question, one to another, and a row that is alike only further on."""


def make(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    # weights large enough that seeing one token more or less shows
    config = CONFIG_MAPPING[model_type](vocab_size=VOCAB, pad_token_id=0, initializer_range=0.3, **{**CONFIGS[model_type], **changes})
    model = AutoModel.from_config(config)
    set_fused(model)
    return model.train()


def states_and_gradients(model: PreTrainedModel, *, line: bool, share: bool = False) -> list[Tensor]:
    """States of the real tokens, row after row, and the gradients of a loss that tells them all apart."""
    ids, mask = right_pad(ROWS, 0)
    model.eval().zero_grad()
    if line:
        packed = as_line(ids, mask, share=share)
        states = packed.states(model)[packed.places[mask]]
    else:
        states = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    (states * weights).sum().backward()
    return [states.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("share", [False, True])
def test_states_and_gradients_are_those_of_padded_rows(model_type: str, share: bool) -> None:
    model = make(model_type)
    assert can_pack(model)
    got, expected = (states_and_gradients(model, line=line, share=share) for line in (True, False))
    largest = max(float(tensor.abs().max()) for tensor in expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6 * largest)


def test_a_line_by_hand() -> None:
    ids, mask = right_pad([[5, 6, 7], [8]], 0)
    line = as_line(ids, mask)
    assert (line.ids.tolist(), line.lengths, line.shared) == ([[5, 6, 7, 8]], [3, 1], None)
    assert line.places.tolist() == [[0, 1, 2], [3, 0, 0]]


def test_common_beginnings_stand_in_the_line_once() -> None:
    ids, mask = right_pad(ROWS, 0)
    # The fourth row is too little alike; the fifth could take one token more from the first than the question has.
    assert common_beginnings(ids, mask) == [NOTHING, NOTHING, Shared(0, 12), NOTHING, Shared(0, 13), Shared(0, 12)]
    line = as_line(ids, mask, share=True)
    assert line.lengths == [15, 12, 6, 4, 2, 1]
    assert line.ids.shape == (1, 40)
    assert torch.equal(line.ids[0][line.places][mask], ids[mask])


def test_the_last_token_of_a_row_stays_its_own() -> None:
    ids, mask = right_pad([list(range(2, 14)), list(range(2, 14)), list(range(2, 12))], 0)
    assert common_beginnings(ids, mask) == [NOTHING, Shared(0, 11), Shared(0, 9)]


@pytest.mark.parametrize("tokens", [SHARED_TOKENS - 1, SHARED_TOKENS])
def test_a_beginning_is_shared_from_so_many_tokens_on(tokens: int) -> None:
    beginning = list(range(2, 2 + tokens))
    ids, mask = right_pad([[*beginning, 30, 31], [*beginning, 32, 31]], 0)
    assert common_beginnings(ids, mask) == [NOTHING, Shared(0, tokens) if tokens == SHARED_TOKENS else NOTHING]


def test_padding_that_equals_a_token_is_no_common_beginning() -> None:
    for lengths in ((20, 10), (10, 20)):
        ids, mask = right_pad([[7] * length for length in lengths], 7)
        assert common_beginnings(ids, mask) == [NOTHING, Shared(0, min(10, lengths[1] - 1))]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 2}), ("bert", SMALL), ("mamba", {"hidden_size": 16, "num_hidden_layers": 2})],
)
def test_a_model_that_cannot_is_found_out(model_type: str, changes: dict[str, object]) -> None:
    """Bloom takes no positions, BERT sees forwards, Mamba carries its state on."""
    assert not can_pack(AutoModel.from_config(CONFIG_MAPPING[model_type](vocab_size=VOCAB, **changes)))


def test_plain_attention_of_gpt_neo_is_found_out_and_modes_stay() -> None:
    model = make("gpt_neo")
    model.h[0].eval()
    set_fused(model, False)
    assert not can_pack(model)
    assert model.training and not model.h[0].training
