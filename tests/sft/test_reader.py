"""Which way a model reads a batch, and that all ways give the same loss and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common import chunks
from common.batching import Batch
from common.models.fused import set_fused
from common.tokenization import Encoded
from sft.dataset import SFTRows
from sft.losses import answer_loss
from sft.reader import AnswerReader, rows_of_like_length

VOCAB, PAD, EOS = 40, 0, 1
LENGTHS = [(6, 5), (9, 3), (1, 2), (7, 12), (4, 4)]  # prompt and answer tokens
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}


def rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(2, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [Encoded(draw(prompt), [*draw(answer - 1), EOS]) for prompt, answer in LENGTHS]


def make(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "gpt_neo": {
            "hidden_size": 16, "num_heads": 2, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4,
            "max_position_embeddings": 64,
        },
        "qwen2": {**SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "use_sliding_window": True, "sliding_window": 4,
                  "max_window_layers": 1},
        "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
        "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2},
        "gemma2": {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    }[model_type]  # fmt: skip
    config = CONFIG_MAPPING[model_type](vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS, **sizes)
    for name in ("resid_dropout", "embed_dropout", "attention_dropout"):
        if model_type == "gpt_neo":
            setattr(config, name, 0.0)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    set_fused(model)
    return model.train()


def loss_and_gradients(reader: AnswerReader, batch: dict[str, object]) -> list[torch.Tensor]:
    reader.model.zero_grad()
    losses = [answer_loss(*predictions, reader.head, reader.vocab) for predictions in reader(batch)]
    loss = torch.stack(losses).sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in reader.model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(
    ("model_type", "packs"), [("gpt_neo", True), ("qwen2", True), ("opt", True), ("bloom", False), ("gemma2", False), ("t5", False)]
)
def test_no_way_of_reading_changes_loss_or_gradients(model_type: str, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.FORWARD_TOKENS, "cpu", 4)  # or so few tokens would share one forward
    model = make(model_type)
    batch = SFTRows(rows(), PAD, is_encoder_decoder=model_type == "t5")(Batch([0, 1, 2, 3, 4], 1.0))
    fast, plain = AnswerReader(model), AnswerReader(model, padding_free=False)
    assert (fast.packs, plain.packs) == (packs, False)
    assert len(list(plain(batch))) == 1 and (len(list(fast(batch))) > 1) is not packs
    (got, *gradients), (expected, *exact) = loss_and_gradients(fast, batch), loss_and_gradients(plain, batch)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in exact)
    torch.testing.assert_close(gradients, exact, rtol=1e-5, atol=1e-6 * largest)


def test_plain_transformers_attention_of_gpt_neo_is_not_given_a_line() -> None:
    model = make("gpt_neo")
    set_fused(model, False)
    assert not AnswerReader(model).packs


def test_rows_of_like_length_are_each_cut_to_their_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.FORWARD_TOKENS, "cpu", 4)
    parts = rows_of_like_length(SFTRows(rows(), PAD)(Batch([0, 1, 2, 3, 4], 1.0)))
    assert sorted(tuple(part["input_ids"].shape) for part in parts) == [(1, 3), (1, 19), (3, 12)]
    for part in parts:
        assert part["input_ids"].shape == part["attention_mask"].shape == part["labels"].shape
        assert bool(part["attention_mask"][:, -1].any())
