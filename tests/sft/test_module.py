"""The SFT loss: by hand, and unchanged by padding, batch order, packing and the split into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from common.batching import Batch, BatchPlan
from common.collate import IGNORED
from common.schema import ModelParams
from common.tokenization import Encoded
from sft.dataset import SFTRows
from sft.module import SFTModule, answer_loss

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


def gradient(model: PreTrainedModel, batches: Sequence[dict[str, object]]) -> tuple[float, dict[str, Tensor]]:
    """Summed training loss and gradients over micro-batches, as the module computes them."""
    module = SFTModule(model, ModelParams(), total_steps=1)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
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


def test_answer_loss_by_hand() -> None:
    # Vocabulary of 2; logits (0, ln 3) give probabilities 1/4 and 3/4.
    logits = torch.tensor([[[0.0, math.log(3.0)]] * 3])
    labels = torch.tensor([[IGNORED, 1, 0]])
    loss, tokens, correct = answer_loss(logits, labels)
    assert loss.item() == pytest.approx(-math.log(0.75) - math.log(0.25))
    assert (tokens.item(), correct.item()) == (2, 1)


def test_a_decoders_logits_are_not_shifted() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    loss, tokens, _ = answer_loss(logits, torch.tensor([[1, IGNORED]]), is_encoder_decoder=True)
    assert loss.item() == pytest.approx(-math.log(0.75))
    assert tokens.item() == 1


def test_no_answer_token_gives_zero_and_not_nan() -> None:
    loss, tokens, _ = answer_loss(torch.randn(1, 3, 5), torch.full((1, 3), IGNORED))
    assert (loss.item(), tokens.item()) == (0.0, 0)


def test_labels_are_the_answer_with_eos_and_nothing_else() -> None:
    batch = SFTRows(ROWS, PAD)(Batch([0, 1], 5.0))
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 8, 9, EOS], [IGNORED, 3, EOS, IGNORED, IGNORED, IGNORED]]


def test_changing_prompt_labels_is_impossible_and_eos_carries_loss() -> None:
    model = models()["gpt2"].eval()
    batch = SFTRows(ROWS, PAD)(Batch([0], 3.0))
    logits = model(input_ids=batch["input_ids"]).logits
    with_eos, _, _ = answer_loss(logits, batch["labels"])
    without = batch["labels"].clone()
    without[without == EOS] = IGNORED
    less, tokens, _ = answer_loss(logits, without)
    assert tokens.item() == 2
    expected = -torch.log_softmax(logits[0, 4].float(), -1)[EOS].item()
    assert (with_eos - less).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "llama"])
def test_padding_and_batch_order_change_nothing(name: str) -> None:
    model = models()[name]
    tokens = float(sum(len(row.answer_ids) for row in ROWS))
    truth = one_by_one(model)
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD)(Batch([0, 1, 2, 3], tokens))]))
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD)(Batch([3, 1, 0, 2], tokens))]))
    assert_same(truth, gradient(model, [SFTRows(ROWS, PAD, pad_to=20)(Batch([0, 1, 2, 3], tokens))]))


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


def test_a_filler_batch_counts_nothing() -> None:
    model = models()["gpt2"]
    loss, gradients = gradient(model, [SFTRows(ROWS, PAD)(Batch([0], 3.0, filler=True))])
    assert loss == 0.0
    assert all(float(value.abs().sum()) == 0.0 for value in gradients.values())
