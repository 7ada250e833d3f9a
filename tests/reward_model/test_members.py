"""Training an ensemble of readouts: what each member learns from, what is logged of them, and what becomes of it."""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.checkpoint import read_manifest
from common.errors import UserError
from common.models.backbone import RewardInput
from common.models.load import build_backbone, train_tokenizer
from common.models.readouts import Ensemble
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import ReadoutSettings
from common.schema import ModelInit
from common.score_transform import ScoreTransform
from common.tracking import read_metrics
from reward_model import score
from reward_model.classification import test_reward as evaluate_pairs
from reward_model.classification import train_reward as train_pairs
from reward_model.classification.dataset import PairRow, collate_pairs
from reward_model.classification.losses import pair_loss
from reward_model.classification.margins import Margin
from reward_model.classification.module import PairModule, pair_metrics
from reward_model.config import ClassificationParams, RegressionParams
from reward_model.logged import PAIR_MEMBER_METRICS, PAIR_METRICS, SCORE_MEMBER_METRICS, SCORE_METRICS
from reward_model.members import bootstrap_counts, member_weights
from reward_model.regression import test_reward as evaluate_scores
from reward_model.regression import train_reward as train_scores
from reward_model.regression.dataset import ScoreRow, collate_scores
from reward_model.regression.module import ScoreModule

PAD = 0
MAINS: dict[str, Any] = {"pair": (train_pairs.main, evaluate_pairs.main), "score": (train_scores.main, evaluate_scores.main)}
PAIRS = [
    PairRow((RewardInput([5, 6, 7, 1]), RewardInput([5, 6, 8, 9, 1])), Margin(), "a"),
    PairRow((RewardInput([4, 3, 2, 9, 1]), RewardInput([4, 3, 1]), RewardInput([4, 8, 1])), Margin(0.5), "b"),
    PairRow((RewardInput([7, 1]), RewardInput([7, 8, 1])), Margin(importance=2.0), "c"),
]


def model(ensemble: int, **readout: Any) -> RewardModel:
    config = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    backbone = build_backbone(ModelInit(model_type="gpt_neo", config=config), train_tokenizer(["a b c"], 258), 32, seed=0)
    return RewardModel.from_backbone(backbone, ReadoutSettings(ensemble=ensemble, **readout), seed=0).eval()


def pair_module(ensemble: int, **readout: Any) -> PairModule:
    module = PairModule(model(ensemble, **readout), ClassificationParams(centring_coef=0.1), total_steps=10, seed=3)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer here
    return module


# --- resamples


def test_a_resample_is_a_function_of_seed_row_and_member() -> None:
    counts = bootstrap_counts(torch.arange(50), 4, seed=7)
    assert torch.equal(bootstrap_counts(torch.tensor([30, 2]), 4, seed=7), counts[[30, 2]])
    assert torch.equal(bootstrap_counts(torch.arange(50), 2, seed=7), counts[:, :2])
    assert not torch.equal(bootstrap_counts(torch.arange(50), 4, seed=8), counts)
    assert not torch.equal(counts[:, 0], counts[:, 1])


def test_rows_are_counted_as_poissons_distribution_says() -> None:
    counts = bootstrap_counts(torch.arange(20000), 3, seed=0).double()
    assert counts.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.025)
    assert counts.var(0).tolist() == pytest.approx([1.0] * 3, abs=0.05)
    assert counts.max() >= 6  # of 60000
    for number in range(6):
        share = math.exp(-1) / math.factorial(number)
        assert (counts == number).double().mean().item() == pytest.approx(share, abs=0.01)
    assert abs(torch.corrcoef(counts.T) - torch.eye(3)).max() < 0.03


def test_weights_are_multiplied_by_the_counts_or_shared_by_the_members() -> None:
    weight, rows, readout = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([7, 3, 30]), ReadoutSettings(ensemble=4, bootstrap=True)
    counts = bootstrap_counts(rows, 4, seed=5)
    assert counts.unique().numel() > 2
    by_hand = [[value * count for count in row] for value, row in zip(weight.tolist(), counts.tolist(), strict=True)]
    assert member_weights(weight, rows, readout, seed=5).tolist() == by_hand
    assert member_weights(weight, rows, ReadoutSettings(ensemble=4), seed=5).tolist() == [[0.5], [2.0], [1.0]]


# --- losses


def test_one_readout_has_the_loss_without_an_ensemble_bit_for_bit() -> None:
    module, batch = pair_module(1), collate_pairs(PAIRS, [0, 1, 2], PAD, 3.0)
    scores = module.model.scores(batch["inputs"])
    weight = batch["weight"] * batch["importance"]
    chosen, rejected = scores[batch["chosen"]], scores[batch["rejected"]]
    assert torch.equal(module.training_step(batch, 0), pair_loss(chosen, rejected, weight, batch["margin"], centring_coef=0.1) / 3.0)


def test_the_loss_of_pairs_is_the_mean_of_the_members() -> None:
    module, batch = pair_module(3), collate_pairs(PAIRS, [0, 1, 2], PAD, 3.0)
    assert isinstance(module.model.readout, Ensemble)
    losses = []
    for member in module.model.readout.members:
        alone = pair_module(1)
        alone.model.readout.load_state_dict(member.state_dict())
        losses.append(alone.training_step(batch, 0).item())
    assert len({round(loss, 4) for loss in losses}) == 3
    assert module.training_step(batch, 0).item() == pytest.approx(statistics.fmean(losses), rel=1e-6)


def test_a_member_learns_from_its_resample_alone() -> None:
    """Each row counts as often as its resample has it; a row that it lacks gives no gradient."""
    module = pair_module(3, bootstrap=True)
    assert isinstance(module.model.readout, Ensemble)
    counts = bootstrap_counts(torch.arange(40), 3, seed=3)
    index = next(row for row in range(40) if counts[row].tolist()[:2] == [0, 2])
    module.training_step(collate_pairs(PAIRS[:1], [index], PAD, 1.0), 0).backward()
    plain = pair_module(3)
    assert isinstance(plain.model.readout, Ensemble)
    plain.training_step(collate_pairs(PAIRS[:1], [index], PAD, 1.0), 0).backward()
    for member, same, count in zip(module.model.readout.members, plain.model.readout.members, counts[index].tolist(), strict=True):
        assert member.score.weight.grad is not None and same.score.weight.grad is not None
        torch.testing.assert_close(member.score.weight.grad, count * same.score.weight.grad)


def test_members_that_learn_from_scores_have_resamples_of_the_seed() -> None:
    """Two rows whose error is 1 for every member."""
    rows = [ScoreRow((RewardInput([5, 1]),), score, score, "q") for score in (1.0, -1.0)]
    settings: dict[str, Any] = {"transform": ScoreTransform(), "train_mean": 0.0, "validation_rows": rows, "seed": 3}
    module = ScoreModule(model(4, bootstrap=True), RegressionParams(loss="mse"), 10, **settings)
    module.forward = lambda batch: torch.zeros(2, 4)  # type: ignore[method-assign]
    index = [11, 4]
    counts = bootstrap_counts(torch.tensor(index), 4, seed=3)
    assert counts.sum() != bootstrap_counts(torch.tensor(index), 4, seed=0).sum()
    assert module.training_step(collate_scores(rows, index, PAD, 2.0), 0).item() == counts.sum().item() / (2 * 4)


# --- figures


def test_figures_of_pairs_by_hand() -> None:
    # (chosen, rejected, weight, loss, spread of the margins, mean loss of a member, share of members that are right)
    metrics = pair_metrics(
        [[[1.0, 0.0, 1.0, 0.4, 0.1, 0.6, 1.0]], [[2.0, 3.0, 0.5, 1.0, 0.3, 2.0, 0.25], [2.0, 2.0, 0.5, 0.6, 0.5, 1.0, 0.5]]]
    )
    assert metrics["val/spread"] == pytest.approx((0.1 + 0.3 + 0.5) / 3)
    assert metrics["val/member_loss"] == pytest.approx((0.6 + 0.5 * 2.0 + 0.5 * 1.0) / 2)
    assert metrics["val/member_accuracy"] == pytest.approx((1.0 + 0.25 + 0.5) / 3)
    assert set(metrics) == set(PAIR_METRICS) | set(PAIR_MEMBER_METRICS)


def test_validation_of_pairs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that score chosen answers 2 and 0 and the others 0 and 1: margins 2 and -1, mean 0.5, spread 1.5. The pair counts twice."""
    module = pair_module(2)
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", lambda metrics, **_: logged.update(metrics))
    monkeypatch.setattr(module, "forward", lambda batch: (torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])))
    module.on_validation_epoch_start()
    module.validation_step(collate_pairs([replace(PAIRS[0], margin=Margin(0.25, importance=2.0))], [0], PAD, 1.0), 0)
    module.on_validation_epoch_end()
    assert logged["val/margin"] == 0.5 and logged["val/accuracy"] == 1.0 and logged["val/spread"] == 1.5
    assert logged["val/loss"] == pytest.approx(2 * math.log1p(math.exp(-0.5 + 0.25)))
    assert logged["val/member_loss"] == pytest.approx(2 * (math.log1p(math.exp(-2.0 + 0.25)) + math.log1p(math.exp(1.0 + 0.25))) / 2)
    assert logged["val/member_accuracy"] == 0.5


def test_training_and_validation_on_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw predictions of (1, 0) and (-1, 1) are (6, 2) and (-2, 6) in the data's units, the targets 6 and -2 are raw 1 and -1."""
    transform = ScoreTransform(name="standardize", shift=2.0, scale=4.0)
    rows = [ScoreRow((RewardInput([5, 1]),), transform.apply([score])[0], score, "q") for score in (6.0, -2.0)]
    module = ScoreModule(model(2), RegressionParams(loss="mse"), 10, transform=transform, train_mean=0.0, validation_rows=rows)
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", lambda metrics, **_: logged.update(metrics))
    raw = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    monkeypatch.setattr(module, "forward", lambda batch: raw[batch["index"]])
    batch = collate_scores(rows, [0, 1], PAD, 2.0)
    assert module.training_step(batch, 0).item() == ((0 + 0) / 2 + (1 + 4) / 2) / 2
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    assert logged["val/loss"] == (0.25 + 1.0) / 2  # of the means 0.5 and 0
    assert logged["val/member_loss"] == 1.25
    assert logged["val/spread"] == (2.0 + 4.0) / 2
    assert logged["val/accuracy"] == 0.5 and logged["val/member_accuracy"] == 0.75
    assert set(logged) == set(SCORE_METRICS) | set(SCORE_MEMBER_METRICS)


# --- from the config on


@pytest.mark.parametrize(("kind", "readout"), [("pair", {"name": "last_token"}), ("score", {"name": "mean_pool", "hidden_sizes": [8]})])
def test_an_ensemble_is_trained_evaluated_and_asked_for_its_spread(
    kind: str, readout: dict[str, Any], write_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, evaluate = MAINS[kind]
    settings = {"freeze_backbone": True, "readout": {**readout, "ensemble": 3, "bootstrap": True}}
    config = write_config(kind, model_params=settings, trainer={"checkpoint": {"monitor": "val/member_loss"}})
    assert train(["--config_file", str(config), "trainer.params.max_steps=2", "trainer.params.val_check_interval=1"]) == 0
    latest = (tmp_path / "models" / "latest").resolve()
    lines = [line for line in read_metrics(latest.parents[1]) if "val/spread" in line]
    assert len(lines) == 2 and all(line["val/spread"] > 0 and line["val/member_loss"] >= line["val/loss"] for line in lines)
    manifest = read_manifest(latest)
    assert manifest is not None and manifest.member_means is not None and manifest.score_mean is not None
    assert statistics.fmean(manifest.member_means) == pytest.approx(manifest.score_mean, abs=1e-5)
    scorer = RewardScorer(latest)
    data = tmp_path / f"{kind}.json"
    answer = "Accepted_Answer" if kind == "pair" else "Answer"
    rows = json.loads(data.read_text())["train"]
    known = scorer.judge([row["Question"] for row in rows], [row[answer] for row in rows])
    assert [one.score for one in known] == scorer.score([row["Question"] for row in rows], [row[answer] for row in rows])
    if kind == "score":  # these are all that the mean and scale were measured on
        for member in zip(*(one.members for one in known), strict=True):
            assert statistics.fmean(member) == pytest.approx(manifest.score_mean, abs=1e-5)

    out = tmp_path / "out"
    test = {
        "model_name": str(latest),
        "data": {"data_dir": str(data), "batch_size": 4},
        "test_params": {"log_file": str(out / "scores.csv"), "bootstrap_samples": 20},
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    capsys.readouterr()
    assert evaluate(["--config_file", str(tmp_path / "test.yaml")]) == 0
    assert "by spread of the readouts" in capsys.readouterr().out
    with (out / "scores.csv").open(newline="") as file:
        tested = list(csv.DictReader(file))
    asked = json.loads(data.read_text())["test"]
    first = scorer.judge([row["Question"] for row in asked], [row[answer] for row in asked])
    if kind == "pair":
        second = scorer.judge([row["Question"] for row in asked], [row["Answer"] for row in asked])
        margins = [[a - b for a, b in zip(good.members, bad.members, strict=True)] for good, bad in zip(first, second, strict=True)]
        spreads = [statistics.pstdev(each) for each in margins]
    else:
        spreads = [statistics.pstdev(each.members) for each in first]
    assert [float(row["spread"]) for row in tested] == pytest.approx(spreads, abs=1e-5)
    for name in ("scores.jsonl", "all.csv"):
        assert score.main([str(latest), str(data), "--output", str(out / name)]) == 0
    assert "spread of the 3 readouts" in capsys.readouterr().out
    with (out / "all.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [float(row["spread"]) for row in table] == [row["spread"] for row in scored]
    assert scored[0]["spread"] == pytest.approx(known[0].spread, abs=1e-5)


def test_figures_of_members_are_no_monitor_without_an_ensemble(write_config) -> None:
    config = write_config("pair", trainer={"checkpoint": {"monitor": "val/spread"}})
    with pytest.raises(UserError, match="val/spread"):
        train_pairs.main(["--config_file", str(config), "--validate"])
    with pytest.raises(UserError, match=r"model_params\.readout\.bootstrap: got true, which needs an ensemble of 2 or more"):
        train_pairs.main(["--config_file", str(write_config("pair", model_params={"readout": {"bootstrap": True}})), "--validate"])
