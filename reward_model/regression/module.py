"""The score objective as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from common.freezing import freeze_eval
from common.models.reward import RewardModel
from common.score_transform import ScoreTransform
from reward_model.config import RegressionParams
from reward_model.lightning import Gathered, configure_optimizers
from reward_model.metrics import group_ids, mean, pairs_within, pearson, r2, same_sign, spearman, wins
from reward_model.regression.dataset import ScoreBatch, ScoreRow
from reward_model.regression.losses import score_loss

# What this stage logs beside the figures of training itself, a line of definition each; `monitor` may name any of them.
METRICS = {
    "val/loss": "Mean loss per answer over the whole validation split, on the transformed scale.",
    "val/mse": "Mean squared error, in the data's score units.",
    "val/mae": "Mean absolute error, in the data's score units.",
    "val/r2": "1 - squared error / squared error of always predicting the mean training score; above 0 is better than that.",
    "val/pearson": "Linear correlation of predicted and target scores.",
    "val/spearman": "Rank correlation of predicted and target scores.",
    "val/accuracy": "Sign accuracy: share of answers whose predicted and target score are both negative or both not.",
    "val/pair_accuracy": "Share of pairs of answers to one question, of different score, that are ordered rightly; ties count half.",
}

CHOICES = tuple(name for name in METRICS if name.startswith("val/"))
"""What `monitor` may name."""


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
    ) -> None:
        """`train_mean`: mean training score in the data's units, the baseline of R2."""
        super().__init__()
        self.model = model
        self.params = params
        self.total_steps = total_steps
        self.transform = transform
        self.train_mean = train_mean
        self.validation_rows = validation_rows
        self._validation = Gathered()

    @property
    def logged_metrics(self) -> tuple[str, ...]:
        """Names that `monitor` may choose from."""
        groups = group_ids([row.question for row in self.validation_rows])
        has_pairs = len(pairs_within(groups, [row.score for row in self.validation_rows])[0]) > 0
        return tuple(name for name in CHOICES if has_pairs or name != "val/pair_accuracy")

    def describe_rows(self, batch: ScoreBatch) -> str:
        """Where the rows of a batch stand in the data."""
        return ", ".join(batch["where"])

    def forward(self, batch: ScoreBatch) -> Tensor:
        """Raw scores (B,), on the transformed scale."""
        scores: Tensor = self.model(*batch["inputs"])
        return scores

    def losses(self, batch: ScoreBatch, scores: Tensor) -> Tensor:
        """Loss of each row, (B,)."""
        return score_loss(scores, batch["target"], self.params.loss_name, self.params.huber_delta)

    def training_step(self, batch: ScoreBatch, batch_idx: int) -> Tensor:
        return torch.sum(batch["weight"] * self.losses(batch, self(batch))) / batch["denominator"]

    def on_fit_start(self) -> None:
        freeze_eval(self.model)  # Lightning restores these modes after each validation

    def on_validation_epoch_start(self) -> None:
        self._validation = Gathered()

    def validation_step(self, batch: ScoreBatch, batch_idx: int) -> None:
        scores = self(batch)
        losses = self.losses(batch, scores)
        for index, score, loss in zip(batch["index"].tolist(), scores.tolist(), losses.tolist(), strict=True):
            self._validation.add(index, [score, loss])

    def on_validation_epoch_end(self) -> None:
        gathered = self._validation.by_index()
        rows = [self.validation_rows[index] for index in gathered]
        raw, losses = zip(*gathered.values(), strict=True)
        metrics = score_metrics(self.transform.invert(raw), [row.score for row in rows], [row.question for row in rows], self.train_mean)
        metrics["val/loss"] = mean(losses)
        self.log_dict({name: metrics[name] for name in self.logged_metrics})

    def configure_optimizers(self) -> dict[str, Any]:
        return configure_optimizers(self.model, self.params, self.total_steps)


def score_metrics(predicted: Sequence[float], target: Sequence[float], questions: Sequence[str], train_mean: float) -> dict[str, float]:
    """Figures of predictions, in the data's score units. NaN where one cannot be computed."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    better, worse = pairs_within(group_ids(questions), y)
    return {
        "val/mse": mean((p - y) ** 2),
        "val/mae": mean(np.abs(p - y)),
        "val/r2": r2(p, y, train_mean),
        "val/pearson": pearson(p, y),
        "val/spearman": spearman(p, y),
        "val/accuracy": mean(same_sign(p, y)),
        "val/pair_accuracy": mean(wins(p[better] - p[worse])),
    }
