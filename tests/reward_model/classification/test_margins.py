"""What a graded preference does to the loss, by hand, and what is said where it can do nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from common.errors import UserError
from common.records import read_splits
from reward_model.classification.dataset import PairRow, collate_pairs
from reward_model.classification.losses import bradley_terry_loss, pair_loss
from reward_model.classification.margins import Margin, check_margins, pair_margin
from reward_model.classification.train_reward import main
from reward_model.config import ClassificationParams
from tests.reward_model.classification.test_module import PAD, answer, gradient, module

__all__ = ["module"]

LN3 = math.log(3.0)


def loss_of(margin: float | None, **settings: Any) -> float:
    """Of one pair whose chosen answer scores log 3 more: its loss without a margin is log 4/3."""
    entered = pair_margin(margin, ClassificationParams(**settings))
    scores = torch.tensor([LN3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    subtracted = torch.tensor([entered.subtracted], dtype=torch.float64)
    return pair_loss(*scores, torch.tensor([entered.importance], dtype=torch.float64), subtracted).item()


@pytest.mark.parametrize(
    ("margin", "settings", "expected"),
    [
        (None, {}, math.log(4 / 3)),
        (None, {"margin_use": "weigh", "margin_scale": 7.0}, math.log(4 / 3)),
        (0.0, {}, math.log(4 / 3)),
        (LN3, {}, math.log(2.0)),  # log 3 - log 3 = 0, sigmoid(0) = 1/2
        (2 * LN3, {}, math.log(4.0)),  # sigmoid(-log 3) = 1/4
        (1.0, {"margin_scale": LN3}, math.log(2.0)),
        (-LN3, {}, math.log(10 / 9)),  # sigmoid(log 9) = 9/10
        (3.0, {"margin_use": "weigh"}, 3 * math.log(4 / 3)),
        (3.0, {"margin_use": "weigh", "margin_scale": 0.5}, 1.5 * math.log(4 / 3)),
        (0.0, {"margin_use": "weigh"}, 0.0),
        (2 * LN3, {"margin_use": "ignore"}, math.log(4 / 3)),
    ],
)
def test_a_margin_by_hand(margin: float | None, settings: dict[str, Any], expected: float) -> None:
    assert loss_of(margin, **settings) == pytest.approx(expected, abs=1e-12)


def test_all_rejected_answers_of_a_row_have_its_margin() -> None:
    rows = [
        PairRow((answer(5, 1), answer(6, 1), answer(7, 1)), Margin(2.0, 1.0), "a"),
        PairRow((answer(5, 1), answer(6, 1)), Margin(0.0, 3.0), "b"),
    ]
    batch = collate_pairs(rows, [0, 1], PAD, 2.0)
    assert batch["margin"].tolist() == [2.0, 2.0, 0.0]
    assert batch["importance"].tolist() == [1.0, 1.0, 3.0]
    assert batch["weight"].tolist() == [0.5, 0.5, 1.0]


def test_a_pair_of_importance_two_pulls_as_two_pairs(module: Any) -> None:
    pair = answer(5, 6, 7, 1), answer(5, 6, 8, 9, 1)
    once, twice = PairRow(pair, Margin(), "a"), PairRow(pair, Margin(importance=2.0), "a")
    torch.testing.assert_close(
        gradient(module, [collate_pairs([twice], [0], PAD, 1.0)]),
        gradient(module, [collate_pairs([once, once], [0, 1], PAD, 1.0)]),
        rtol=1e-3,
        atol=1e-5,
    )


def test_validation_measures_the_loss_that_is_trained(module: Any) -> None:
    rows = [
        PairRow((answer(5, 6, 7, 1), answer(5, 6, 8, 9, 1)), Margin(0.5), "a"),
        PairRow((answer(4, 1), answer(4, 3, 1)), Margin(importance=3.0), "b"),
    ]
    logged: dict[str, float] = {}
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    module.on_validation_epoch_start()
    batch = collate_pairs(rows, [0, 1], PAD, 2.0)
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    chosen, rejected = (scores.detach()[:, 0] for scores in module(batch))
    first, second = bradley_terry_loss(chosen - rejected, torch.zeros(2), torch.tensor([0.5, 0.0])).tolist()
    assert logged["val/loss"] == pytest.approx((first + 3 * second) / 2, rel=1e-5)


def splits(path: Path, *margins: float | None) -> Any:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} | ({} if m is None else {"margin": m}) for i, m in enumerate(margins)]
    path.write_text(json.dumps(rows))
    return read_splits(str(path), "pair", validation_split_percentage=0)


def test_settings_without_any_margin_and_rows_without_one_are_told(tmp_path: Path) -> None:
    path, weigh = tmp_path / "pairs.json", ClassificationParams(margin_use="weigh", margin_scale=2.0)
    assert check_margins(splits(path, 1.0, 2.0), weigh) == check_margins(splits(path, None), ClassificationParams()) == []
    assert check_margins(splits(path, None, None), weigh) == [
        "model_params.margin_use and model_params.margin_scale: no effect, since no row of train has a margin"
    ]
    assert check_margins(splits(path, None, 1.0, 2.0), ClassificationParams()) == [
        "2 of 3 rows of train have a margin; the others are read as pairs without one"
    ]


def test_a_margin_below_zero_cannot_weigh(tmp_path: Path) -> None:
    rows = splits(tmp_path / "pairs.json", 1.0, -2.0)
    check_margins(rows, ClassificationParams())
    weigh = ClassificationParams(margin_use="weigh")
    for misread in (rows, replace(rows, train=rows.val, val=rows.train)):  # validation measures the same loss
        with pytest.raises(UserError, match=r"train row 2: margin: got -2, expected a number >= 0, since model_params.margin_use is weigh"):
            check_margins(misread, weigh)
    assert check_margins(splits(tmp_path / "zero.json", 0.0, 1.0), weigh) == []


def test_a_scale_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="margin_scale is 2, but margin_use is ignore"):
        ClassificationParams(margin_use="ignore", margin_scale=2.0)


def test_the_script_checks_margins(write_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config_file", str(write_config("pair")), "--validate", "model_params.margin_scale=0.5"]) == 0
    assert "model_params.margin_scale: no effect, since no row of train has a margin" in capsys.readouterr().out
