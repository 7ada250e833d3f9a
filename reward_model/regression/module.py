"""The score objective as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from common.freezing import freeze_eval
from common.gathered import Gathered
from common.models.reward import RewardModel
from common.optim import build_optimizer
from common.score_transform import ScoreTransform
from reward_model.config import RegressionParams
from reward_model.members import member_weights
from reward_model.metrics import group_ids, mean, pairs_within, pearson, r2, same_sign, spearman, wins
from reward_model.regression.dataset import ScoreBatch, ScoreRow
from reward_model.regression.losses import score_loss


class ScoreModule(pl.LightningModule):
    """Trains a reward model on scores; the loss of a window of micro-batches is a mean over its rows, however it is split."""

    def __init__(
        self,
        model: RewardModel,
        params: RegressionParams,
        total_steps: int,
        *,
        transform: ScoreTransform,
        train_mean: float,
        validation_rows: Sequence[ScoreRow],
        seed: int = 0,
    ) -> None:
        """`train_mean`: mean training score in the data's units, the baseline of R2. `seed`: of an ensemble's resamples of the rows."""
        super().__init__()
        self.model = model
        self.params = params
        self.total_steps = total_steps
        self.transform = transform
        self.train_mean = train_mean
        self.validation_rows = validation_rows
        self.seed = seed
        self._validation = Gathered()

    def describe_rows(self, batch: ScoreBatch) -> str:
        """Where the rows of a batch stand in the data."""
        return ", ".join(batch["where"])

    def forward(self, batch: ScoreBatch) -> Tensor:
        """Raw scores by each of the M members of an ensemble, (B, M), on the transformed scale."""
        return self.model.member_scores(batch["inputs"])

    def losses(self, batch: ScoreBatch, scores: Tensor) -> Tensor:
        """Loss of each row by each of the scores (B, M) that it has: (B, M)."""
        return score_loss(scores, batch["target"][:, None], self.params.loss_name, self.params.huber_delta)

    def training_step(self, batch: ScoreBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, self(batch))  # (B, M)
        weight = member_weights(batch["weight"], batch["index"], self.model.readout_settings, self.seed)
        return torch.sum(weight * losses) / (batch["denominator"] * losses.shape[1])

    def on_fit_start(self) -> None:
        freeze_eval(self.model)  # Lightning restores these modes after each validation

    def on_validation_epoch_start(self) -> None:
        self._validation = Gathered()

    def validation_step(self, batch: ScoreBatch, batch_idx: int) -> None:
        members = self(batch)  # (B, M)
        if not batch["weight"].any():
            return  # a row of another process, which keeps their batches alike
        scores = members.mean(1, keepdim=True)
        table = torch.cat([scores, self.losses(batch, scores), self.losses(batch, members).mean(1, keepdim=True), members], 1)
        for index, row in zip(batch["index"].tolist(), table.tolist(), strict=True):
            self._validation.add(index, row)

    def on_validation_epoch_end(self) -> None:
        gathered = self._validation.by_index()
        rows = [self.validation_rows[index] for index in gathered]
        raw, losses, member_losses, *members = zip(*gathered.values(), strict=True)
        targets = [row.score for row in rows]
        metrics = score_metrics(self.transform.invert(raw), targets, [row.question for row in rows], self.train_mean)
        metrics["val/loss"] = mean(losses)
        if len(members) > 1:
            metrics |= member_metrics([self.transform.invert(scores) for scores in members], targets)
            metrics["val/member_loss"] = mean(member_losses)
        self.log_dict(metrics)

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(self.model, self.params, self.total_steps)


def score_metrics(predicted: Sequence[float], target: Sequence[float], questions: Sequence[str], train_mean: float) -> dict[str, float]:
    """Figures of predictions, in the data's score units: NaN where one cannot be computed, no pair accuracy where no two answers differ."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    better, worse = pairs_within(group_ids(questions), y)
    metrics = {
        "val/mse": mean((p - y) ** 2),
        "val/mae": mean(np.abs(p - y)),
        "val/r2": r2(p, y, train_mean),
        "val/pearson": pearson(p, y),
        "val/spearman": spearman(p, y),
        "val/accuracy": mean(same_sign(p, y)),
    }
    return metrics | ({"val/pair_accuracy": mean(wins(p[better] - p[worse]))} if len(better) else {})


def member_metrics(predicted: Sequence[Sequence[float]], target: Sequence[float]) -> dict[str, float]:
    """How the members of an ensemble differ, and how good one is, from the predictions of each, in the data's score units."""
    p = np.asarray(predicted, dtype=np.float64)  # (M, N)
    return {"val/spread": mean(p.std(0)), "val/member_accuracy": mean([mean(same_sign(scores, target)) for scores in p])}
