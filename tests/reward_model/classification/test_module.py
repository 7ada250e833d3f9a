"""Pairs in one forward pass, and a loss that knows neither padding nor micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from common.models.backbone import RewardInput
from common.models.load import build_backbone, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit
from reward_model.classification.dataset import PairBatch, PairRow, collate_pairs
from reward_model.classification.margins import Margin
from reward_model.classification.module import PairModule, pair_metrics
from reward_model.config import ClassificationParams, RewardData
from reward_model.loaders import training_loader, validation_loader
from reward_model.logged import PAIR_METRICS

PAD = 0


def answer(*ids: int) -> RewardInput:
    return RewardInput(list(ids))


ROWS = [
    PairRow((answer(5, 6, 7, 1), answer(5, 6, 8, 9, 10, 1)), Margin(), "question 1", "row 1"),
    PairRow((answer(4, 3, 2, 9, 9, 9, 9, 1), answer(4, 3, 1)), Margin(0.5), "question 2", "row 2"),
    PairRow((answer(7, 1), answer(7, 8, 1), answer(7, 9, 9, 1)), Margin(), "question 3", "row 3"),
    PairRow((answer(11, 12, 1), answer(11, 13, 1)), Margin(), "question 4", "row 4"),
    PairRow((answer(14, 15, 16, 1), answer(14, 15, 3, 1)), Margin(1.0), "question 5", "row 5"),
]


@pytest.fixture
def module() -> PairModule:
    """Without dropout, in training mode."""
    tokenizer = train_tokenizer(["a b c"], 258)
    config = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    backbone = build_backbone(ModelInit(model_type="gpt_neo", config=config), tokenizer, 32, seed=0)
    model = RewardModel.from_backbone(backbone, seed=0).train()
    module = PairModule(model, ClassificationParams(label_smoothing=0.1, centring_coef=0.2), total_steps=10)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer here
    return module


def gradient(module: PairModule, batches: list[PairBatch]) -> torch.Tensor:
    """Gradient after several micro-batches, divided by their number as Lightning does."""
    module.zero_grad()
    for number, batch in enumerate(batches):
        (module.training_step(batch, number) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_collating_lays_all_answers_under_one_another() -> None:
    batch = collate_pairs(ROWS[:3], [4, 0, 2], PAD, denominator=3.0)
    assert batch["inputs"].input_ids.shape == (7, 8)
    assert batch["chosen"].tolist() == [0, 2, 4, 4]
    assert batch["rejected"].tolist() == [1, 3, 5, 6]
    assert batch["weight"].tolist() == [1.0, 1.0, 0.5, 0.5]  # two rejected answers share their question's weight
    assert batch["margin"].tolist() == [0.0, 0.5, 0.0, 0.0]
    assert batch["question"].tolist() == [0, 1, 2, 2]
    assert batch["index"].tolist() == [4, 0, 2]
    assert batch["tokens"] == 4 + 6 + 8 + 3 + 2 + 3 + 4
    assert batch["inputs"].attention_mask.sum() == batch["tokens"]


def test_one_forward_gives_the_scores_of_separate_ones(module: PairModule) -> None:
    chosen, rejected = module(collate_pairs(ROWS, range(5), PAD, 1.0))
    pairs = [(row.answers[0], other) for row in ROWS for other in row.answers[1:]]
    for number, pair in enumerate(pairs):
        alone = [module.model(torch.tensor([ids.input_ids]), torch.ones(1, len(ids.input_ids), dtype=torch.bool)) for ids in pair]
        torch.testing.assert_close(torch.cat([chosen[number], rejected[number]]), torch.cat(alone), rtol=0, atol=1e-6)


def test_padding_never_changes_the_loss(module: PairModule) -> None:
    short, long = (module.training_step(collate_pairs(ROWS, range(5), PAD, 5.0, pad_to), 0) for pad_to in (None, 20))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_micro_batches(size: int, module: PairModule) -> None:
    """Five questions in one batch, or in several of unequal size: the mean over questions, not the mean of means."""
    whole = gradient(module, [collate_pairs(ROWS, range(5), PAD, 5.0)])
    count = math.ceil(5 / size)
    data = RewardData(data_dir="none", batch_size=size)
    loader = training_loader(ROWS, data, PAD, collate_pairs, seed=3, accumulate=count)
    batches = list(loader)
    assert len(batches) == count
    torch.testing.assert_close(gradient(module, batches), whole, rtol=1e-4, atol=1e-6)


def test_rows_that_fill_up_a_batch_carry_no_loss(module: PairModule) -> None:
    assert gradient(module, [collate_pairs(ROWS[:2], [0, 1], PAD, 2.0, counted=False)]).abs().max() == 0


def test_validation_sees_every_row_once() -> None:
    data = RewardData(data_dir="none", batch_size=8, val_batch_size=2)
    seen = [index for batch in validation_loader(ROWS, data, PAD, collate_pairs) for index in batch["index"].tolist()]
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_static_shapes_pad_every_batch_alike() -> None:
    data = RewardData(data_dir="none", batch_size=2, max_length=24, on_tpu=True)
    for batch in training_loader(ROWS, data, PAD, collate_pairs, seed=0, accumulate=1):
        assert batch["inputs"].input_ids.shape[1] == 24


def test_validation_metrics_by_hand() -> None:
    # (chosen, rejected, weight, loss): one question with one pair, one with two
    metrics = pair_metrics([[[1.0, 0.0, 1.0, 0.4]], [[2.0, 3.0, 0.5, 1.0], [2.0, 2.0, 0.5, 0.6]]])
    assert metrics["val/loss"] == pytest.approx((0.4 + 0.5 * 1.0 + 0.5 * 0.6) / 2)
    assert metrics["val/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["val/margin"] == pytest.approx((1 - 1 + 0) / 3)
    assert metrics["val/score_mean"] == pytest.approx((1 + 0 + 2 + 3 + 2) / 5)  # the chosen answer of two pairs is one answer
    assert set(metrics) == set(PAIR_METRICS)


def test_errors_can_name_the_rows_of_a_batch(module: PairModule) -> None:
    assert module.describe_rows(collate_pairs(ROWS[:2], [0, 1], PAD, 2.0)) == "row 1, row 2"
