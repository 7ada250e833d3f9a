"""Texts in a line give what they give in rows, for every kind of model that can read one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.models.fused import set_fused
from common.models.packed import can_pack, line_positions, packed_line, texts_in_line

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
LENGTHS = [7, 1, 9, 3]


def make(kind: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(
        kind, vocab_size=40, bos_token_id=1, eos_token_id=1, pad_token_id=0, **{**MODELS.get(kind, LLAMA), **changes}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    set_fused(model)
    return model


def gradients(model: Any) -> torch.Tensor:
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat(found)


@pytest.mark.parametrize("kind", MODELS)
def test_a_line_of_texts_gives_states_and_gradients_of_texts_alone(kind: str) -> None:
    model = make(kind)
    trunk = model.base_model
    texts = [torch.randint(2, 40, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    assert can_pack(trunk)
    with packed_line(trunk, LENGTHS):
        line = trunk(input_ids=torch.cat(texts)[None], position_ids=line_positions(LENGTHS, "cpu"), use_cache=False).last_hidden_state[0]
    weights = torch.randn(line.shape, generator=torch.Generator().manual_seed(1))
    (line * weights).sum().backward()
    from_line = gradients(model)
    alone = torch.cat([trunk(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts])
    (alone * weights).sum().backward()
    torch.testing.assert_close(line, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_line, gradients(model), rtol=1e-4, atol=1e-4)


def test_after_a_line_the_model_reads_rows_as_before() -> None:
    model = make("llama")
    usual, ids = model.config._attn_implementation, torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with pytest.raises(RuntimeError), packed_line(model.base_model, [2, 1]):
        texts = texts_in_line()
        assert texts is not None and texts.lengths == (2, 1)
        raise RuntimeError
    assert texts_in_line() is None and model.config._attn_implementation == usual
    assert torch.equal(model(ids).logits, before)


def test_attention_that_was_exchanged_after_the_trial_is_found_out() -> None:
    model = make("gpt_neo")
    set_fused(model, False)
    with pytest.raises(RuntimeError, match="as one"), packed_line(model.base_model, [2, 1]):
        model.base_model(input_ids=torch.tensor([[5, 6, 7]]), position_ids=line_positions([2, 1], "cpu"), use_cache=False)


def test_a_mask_that_a_line_cannot_keep_is_refused() -> None:
    model = make("llama")
    with pytest.raises(NotImplementedError, match="this mask"), packed_line(model.base_model, [2, 1]):
        model.base_model(torch.tensor([[5, 6, 7]]), attention_mask=torch.zeros(1, 1, 3, 3), position_ids=line_positions([2, 1], "cpu"))


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "plain gpt_neo"])
def test_a_model_whose_attention_does_more_is_left_to_padded_rows(kind: str) -> None:
    """Gemma 2 caps its logits, Bloom knows distances alone, transformers' own GPT-Neo asks no registry."""
    if kind == "plain gpt_neo":
        model = make("gpt_neo")
        set_fused(model, False)
    else:
        model = make(kind, **({"head_dim": 8} if kind == "gemma2" else {}))
    assert not can_pack(model.base_model)


WINDOW = {"sliding_window": 8}
UNCAPPED = {**WINDOW, "head_dim": 8, "attn_logit_softcapping": None}


@pytest.mark.parametrize(
    ("kind", "changes", "packs"),
    [
        ("mistral", WINDOW, True),
        ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}, True),
        ("gemma2", UNCAPPED, True),
        ("gemma3_text", UNCAPPED, True),
        ("gpt_neo", {"window_size": 8}, True),
        ("phimoe", {**WINDOW, "num_local_experts": 2}, False),
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8}, False),
    ],
)
def test_a_window_that_a_line_loses_is_found_out_on_a_text_shorter_than_it(kind: str, changes: dict[str, Any], packs: bool) -> None:
    """PhiMoE and Llama 4 have their windows in the mask of padded rows alone; the others tell attention, too."""
    trunk = make(kind, **changes).get_submodule("transformer" if kind == "gpt_neo" else "model")
    assert can_pack(trunk) is packs
    held = ("sliding_window", "attention_chunk_size", "window_size")
    assert {getattr(trunk.config, name) for name in held if getattr(trunk.config, name, None)} == {8}
    ids = torch.arange(2, 22)
    with torch.no_grad():
        alone = trunk(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        with packed_line(trunk, [20]):
            line = trunk(input_ids=ids[None], position_ids=line_positions([20], "cpu"), use_cache=False).last_hidden_state[0]
    assert torch.allclose(line, alone, rtol=1e-4, atol=1e-4) is packs
