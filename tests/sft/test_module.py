"""The SFT loss: by hand, and unchanged by padding, batch order, packing and the split into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common.batching import Batch, BatchPlan
from common.collate import IGNORED
from common.launch.callbacks import count_tokens
from common.schema import ModelParams
from common.tokenization import Encoded
from sft.dataset import SFTRows
from sft.module import SFTModule
from sft.reader import AnswerReader

PAD, EOS, VOCAB = 0, 1, 23
ROWS = [
    Encoded([5, 6, 7], [8, 9, EOS]),
    Encoded([4], [3, EOS]),
    Encoded([9, 8, 7, 6, 5, 4], [2, EOS]),
    Encoded([11, 12], [13, 14, 15, 16, EOS]),
]


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    drop = {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
    neo = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3,
        max_position_embeddings=32, **drop,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    llama = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    return {"gpt_neo": GPTNeoForCausalLM(neo), "gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}


def gradient(
    model: PreTrainedModel, batches: Sequence[dict[str, object]], *, padding_free: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Summed training loss and gradients over micro-batches, as the module computes them."""
    module = SFTModule(AnswerReader(model, padding_free=padding_free), ModelParams(), total_steps=1)
    model.zero_grad()
    total = 0.0
    for number, batch in enumerate(batches):
        loss = module.training_step(batch, number)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert first[1].keys() == second[1].keys()
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], rtol=1e-4, atol=2e-7, msg=name)


def one_by_one(model: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
    """The truth: every row alone, without padding, over all answer tokens."""
    tokens = float(sum(len(row.answer_ids) for row in ROWS))
    return gradient(model, [SFTRows(ROWS, PAD)(Batch([number], tokens)) for number in range(len(ROWS))])


def test_tokens_are_counted_without_padding() -> None:
    for rows in (SFTRows(ROWS, PAD), SFTRows(ROWS, PAD, pad_to=20), SFTRows(ROWS, PAD, capacity=17)):
        assert count_tokens(rows(Batch([0, 1, 2, 3], 1.0))) == 6 + 3 + 8 + 7


def test_labels_are_the_answer_with_eos_and_nothing_else() -> None:
    batch = SFTRows(ROWS, PAD)(Batch([0, 1], 5.0))
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 8, 9, EOS], [IGNORED, 3, EOS, IGNORED, IGNORED, IGNORED]]


def test_eos_carries_loss() -> None:
    model = models()["gpt2"].eval()
    batch = SFTRows(ROWS, PAD)(Batch([0], 1.0))
    without = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == EOS, IGNORED)}
    logits = model(input_ids=batch["input_ids"]).logits
    expected = -torch.log_softmax(logits[0, 4].float(), -1)[EOS].item()
    assert gradient(model, [batch])[0] - gradient(model, [without])[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_padding_and_batch_order_change_nothing(name: str) -> None:
    model = models()[name]
    tokens = float(sum(len(row.answer_ids) for row in ROWS))
    truth = one_by_one(model)
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD)(Batch([0, 1, 2, 3], tokens))]))
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD)(Batch([3, 1, 0, 2], tokens))]))
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD, pad_to=20)(Batch([0, 1, 2, 3], tokens))]))


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_reading_rows_without_padding_changes_nothing(name: str) -> None:
    model = models()[name]
    tokens = float(sum(len(row.answer_ids) for row in ROWS))
    assert_same(one_by_one(model), gradient(model, [SFTRows(ROWS, PAD)(Batch([0, 1, 2, 3], tokens))], padding_free=True))


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_packing_changes_nothing(name: str) -> None:
    model = models()[name]
    tokens = float(sum(len(row.answer_ids) for row in ROWS))
    packed = SFTRows(ROWS, PAD, capacity=17)(Batch([0, 1, 2, 3], tokens))
    assert packed["input_ids"].shape[0] == 2  # 6 + 3 + 8 tokens, then 7
    assert_same(one_by_one(model), gradient(model, [packed]))


@pytest.mark.parametrize("mode", ["random", "bucketed", "packed"])
def test_the_split_into_micro_batches_changes_nothing(mode: str) -> None:
    model = models()["gpt_neo"]
    capacity = 10 if mode == "packed" else None
    weights = [len(row.answer_ids) for row in ROWS]
    accumulate = 4
    plan = BatchPlan(
        [row.length for row in ROWS], weights=weights, batch_size=1, accumulate=accumulate, seed=3, mode=mode, capacity=capacity
    )  # type: ignore[arg-type]
    rows = SFTRows(ROWS, PAD, capacity=capacity)
    loss, gradients = gradient(model, [rows(batch) for batch in plan.batches(0)])
    # Lightning divides by the number of accumulated batches.
    assert_same(one_by_one(model), (loss / accumulate, {name: value / accumulate for name, value in gradients.items()}))


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_filler_batch_counts_nothing(padding_free: bool) -> None:
    model = models()["gpt2"]
    loss, gradients = gradient(model, [SFTRows(ROWS, PAD)(Batch([0], 3.0, filler=True))], padding_free=padding_free)
    assert loss == 0.0
    assert all(float(value.abs().sum()) == 0.0 for value in gradients.values())
