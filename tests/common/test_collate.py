"""Padding and packing: masks by position, and neither of them changes a loss or a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common.collate import left_pad, packed_batch, right_pad, sft_batch, supports_packing
from common.tokenization import Encoded

VOCAB = 50
# Each with layers that see only a few tokens back, where the type has such.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neo": dict(
        hidden_size=16, num_heads=2, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64,
    ),
    "gpt2": dict(n_embd=16, n_head=2, n_layer=2, n_positions=64),
    "llama": dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64),
    "qwen2": dict(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=32,
        use_sliding_window=True, sliding_window=4, max_window_layers=1,
    ),
    "gpt_neox": dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=64),
}  # fmt: skip
DROPOUTS = ("resid_dropout", "embed_dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout")


def make_model(model_type: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    # weights large enough that seeing one token more or less shows
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
    config = CONFIG_MAPPING[model_type](vocab_size=VOCAB, **special, **CONFIGS[model_type], **changes)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config)


def rows(lengths: list[tuple[int, int]]) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [Encoded(draw(prompt), [*draw(answer - 1), 1]) for prompt, answer in lengths]


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1), reduction="sum", ignore_index=-100
    )


def gradients(model: Any, losses: list[torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_padding_to_either_side_by_hand() -> None:
    ids, mask = right_pad([[7, 8, 9], [5]], pad_id=0)
    assert ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    ids, mask = left_pad([[7, 8, 9], [5]], pad_id=0, length=4)
    assert ids.tolist() == [[0, 7, 8, 9], [0, 0, 0, 5]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_a_token_equal_to_padding_still_counts() -> None:
    """Where pad is EOS, a mask made from ids would lose the EOS."""
    batch = sft_batch([Encoded([5], [6, 0]), Encoded([5], [0])], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0], [-100, 0, -100]]


def test_sft_batch_by_hand_and_padded_to_a_fixed_length() -> None:
    batch = sft_batch([Encoded([3, 4], [5, 1]), Encoded([3], [1])], pad_id=0, pad_to=5)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 0], [3, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 1, -100], [-100, 1, -100, -100, -100]]


def test_a_row_longer_than_the_fixed_length_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        right_pad([[1, 2, 3]], 0, length=2)


def test_encoder_decoder_batch_keeps_prompt_and_answer_apart() -> None:
    batch = sft_batch([Encoded([3, 4], [5, 1]), Encoded([3], [6, 7, 1])], pad_id=0, is_encoder_decoder=True)
    assert batch["input_ids"].tolist() == [[3, 4], [3, 0]]
    assert batch["labels"].tolist() == [[5, 1, -100], [6, 7, 1]]


def test_encoder_decoder_padding_changes_no_loss() -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["t5"](
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    data = rows([(5, 3), (9, 6), (2, 2)])

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss * (batch["labels"] != -100).sum()

    together = loss(sft_batch(data, 0, pad_to=12, is_encoder_decoder=True))
    apart = sum(loss(sft_batch([row], 0, is_encoder_decoder=True)) for row in data)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_packed_batch_by_hand() -> None:
    data = [Encoded([3, 4], [1]), Encoded([5], [6, 1]), Encoded([7], [8, 9, 1])]
    batch = packed_batch(data, pad_id=0, capacity=7)
    assert batch["input_ids"].tolist() == [[3, 4, 1, 5, 6, 1], [7, 8, 9, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 1, -100, 6, 1], [-100, 8, 9, 1, -100, -100]]


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_padding_and_packing_change_neither_loss_nor_gradient(model_type: str, form: str) -> None:
    model = make_model(model_type)
    data = rows([(6, 5), (9, 3), (1, 2), (7, 12), (4, 4)])
    batch = sft_batch(data, 0, pad_to=24) if form == "padded" else packed_batch(data, 0, capacity=24, pad_to=24)
    if form == "packed":
        assert len(batch["input_ids"]) == 3
    alone = [summed_loss(model, sft_batch([row], 0)) for row in data]
    together = summed_loss(model, batch)
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(model, [together]), gradients(model, alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_works_with_each_attention(attention: str) -> None:
    model = make_model("llama", attn_implementation=attention)
    data = rows([(6, 5), (9, 3), (1, 2)])
    alone = torch.stack([summed_loss(model, sft_batch([row], 0)) for row in data]).sum()
    torch.testing.assert_close(summed_loss(model, packed_batch(data, 0, capacity=40)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_packing_is_found_to_work(model_type: str) -> None:
    model = make_model(model_type).train()
    assert supports_packing(model)
    assert model.training


@pytest.mark.parametrize("model_type", ["bloom", "opt"])
def test_packing_is_refused_where_positions_do_not_reach_the_mask(model_type: str) -> None:
    """Bloom takes no positions, OPT keeps them from its mask: packed rows would see each other."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "word_embed_proj_dim": 16, "ffn_dim": 32}
    assert not supports_packing(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](vocab_size=VOCAB, **sizes)))
