"""Score batches, a loss that knows neither padding nor micro-batches, and metrics in the data's units."""

from __future__ import annotations

import math

import pytest
import torch

from common.models.backbone import RewardInput
from common.models.load import build_backbone, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit
from common.score_transform import ScoreTransform
from reward_model.config import RegressionParams, RewardData
from reward_model.loaders import training_loader
from reward_model.logged import SCORE_METRICS
from reward_model.regression.dataset import ScoreBatch, ScoreRow, collate_scores
from reward_model.regression.module import ScoreModule, score_metrics

PAD = 0
TRANSFORM = ScoreTransform(name="standardize", shift=2.0, scale=4.0)


def row(ids: list[int], score: float, question: str) -> ScoreRow:
    return ScoreRow((RewardInput(ids),), TRANSFORM.apply([score])[0], score, question)


ROWS = [row([5, 6, 1], 6.0, "a"), row([5, 7, 8, 9, 1], -2.0, "a"), row([3, 1], 2.0, "b"), row([4, 4, 4, 4, 4, 4, 1], 0.0, "c")]


def make_module(loss: str = "huber", rows: list[ScoreRow] = ROWS) -> ScoreModule:
    tokenizer = train_tokenizer(["a b c"], 258)
    config = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    backbone = build_backbone(ModelInit(model_type="gpt_neo", config=config), tokenizer, 32, seed=0)
    model = RewardModel.from_backbone(backbone, seed=0).train()
    params = RegressionParams(loss=loss, huber_delta=0.3)  # type: ignore[arg-type]
    return ScoreModule(model, params, 10, transform=TRANSFORM, train_mean=1.0, validation_rows=rows)


def gradient(module: ScoreModule, batches: list[ScoreBatch]) -> torch.Tensor:
    module.zero_grad()
    for number, batch in enumerate(batches):
        (module.training_step(batch, number) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_does_not_depend_on_the_micro_batches(size: int) -> None:
    module = make_module()
    whole = gradient(module, [collate_scores(ROWS, range(4), PAD, 4.0)])
    loader = training_loader(
        ROWS, RewardData(data_dir="none", batch_size=size), PAD, collate_scores, seed=3, accumulate=math.ceil(4 / size)
    )
    torch.testing.assert_close(gradient(module, list(loader)), whole, rtol=1e-4, atol=1e-6)


def test_answers_to_one_question_make_one_batch() -> None:
    data = RewardData(data_dir="none", batch_size=2, batching="by_question")
    scattered = [ROWS[0], ROWS[2], ROWS[3], ROWS[1]]
    for seed in range(8):
        loader = training_loader(scattered, data, PAD, collate_scores, seed=seed, accumulate=1)
        assert {0, 3} in [set(batch["index"].tolist()) for batch in loader]


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_padding_never_changes_the_loss(loss: str) -> None:
    module = make_module(loss)
    short, long = (module.training_step(collate_scores(ROWS, range(4), PAD, 4.0, pad_to), 0) for pad_to in (None, 20))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-6)


def test_rows_that_fill_up_a_batch_carry_no_loss() -> None:
    assert gradient(make_module("mse"), [collate_scores(ROWS[:2], [0, 1], PAD, 2.0, counted=False)]).abs().max() == 0


def test_validation_metrics_are_in_the_datas_units_over_exactly_the_rows() -> None:
    """Raw predictions of 1, -1, 0, 0 are 6, -2, 2, 2 in the data's units: right but for the last."""
    module = make_module("mse")
    logged: dict[str, float] = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)  # type: ignore[method-assign]
    raw = torch.tensor([1.0, -1.0, 0.0, 0.0])
    module.forward = lambda batch: raw[batch["index"]][:, None]  # type: ignore[method-assign]
    module.on_validation_epoch_start()
    for indices in ([3, 0], [1, 2], [2, 2]):  # a row seen again counts once
        module.validation_step(collate_scores([ROWS[index] for index in indices], indices, PAD, 1.0), 0)
    module.on_validation_epoch_end()
    assert logged["val/mse"] == pytest.approx(4.0 / 4)
    assert logged["val/mae"] == pytest.approx(2.0 / 4)
    assert logged["val/loss"] == pytest.approx(0.5**2 / 4)
    assert logged["val/r2"] == pytest.approx(1 - 4 / (25 + 9 + 1 + 1))
    assert logged["val/accuracy"] == 1.0
    assert logged["val/pair_accuracy"] == 1.0
    assert set(logged) == set(SCORE_METRICS)


def test_pair_accuracy_is_left_out_where_no_question_has_two_scores() -> None:
    assert "val/pair_accuracy" in score_metrics([0.0, 1.0], [1.0, 2.0], ["q", "q"], train_mean=0.0)
    assert "val/pair_accuracy" not in score_metrics([0.0, 1.0], [1.0, 2.0], ["q", "r"], train_mean=0.0)


def test_score_metrics_by_hand() -> None:
    metrics = score_metrics([1.0, 2.0, -1.0], [2.0, 1.0, 3.0], ["q", "q", "r"], train_mean=0.0)
    assert metrics["val/mse"] == pytest.approx((1 + 1 + 16) / 3)
    assert metrics["val/mae"] == pytest.approx(2.0)
    assert metrics["val/r2"] == pytest.approx(1 - 18 / 14)
    assert metrics["val/accuracy"] == pytest.approx(2 / 3)
    assert metrics["val/pair_accuracy"] == 0.0
    assert metrics["val/spearman"] == pytest.approx(-1.0)
