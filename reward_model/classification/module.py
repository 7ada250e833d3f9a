"""The pairwise objective as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from common.freezing import freeze_eval
from common.models.reward import RewardModel
from common.optim import build_optimizer
from reward_model.classification.dataset import PairBatch
from reward_model.classification.losses import bradley_terry_loss, pair_loss
from reward_model.config import ClassificationParams
from reward_model.gathered import Gathered
from reward_model.metrics import wins


class PairModule(pl.LightningModule):
    """Trains a reward model on preferences; the loss of a window of micro-batches is a mean over its questions, however it is split."""

    def __init__(self, model: RewardModel, params: ClassificationParams, total_steps: int) -> None:
        super().__init__()
        self.model = model
        self.params = params
        self.total_steps = total_steps
        self._validation = Gathered()

    def describe_rows(self, batch: PairBatch) -> str:
        """Where the rows of a batch stand in the data."""
        return ", ".join(batch["where"])

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected answers, (P,) each, from one forward pass over all answers."""
        scores = self.model.scores(batch["inputs"])  # (R,)
        return scores[batch["chosen"]], scores[batch["rejected"]]

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self(batch)
        loss_sum = pair_loss(
            chosen,
            rejected,
            batch["weight"] * batch["importance"],
            batch["margin"],
            label_smoothing=self.params.label_smoothing,
            centring_coef=self.params.centring_coef,
        )
        margins = (chosen - rejected).detach()
        right = (margins > 0).float() + 0.5 * (margins == 0).float()
        self.log("train/accuracy", right.mean(), prog_bar=True)
        self.log("train/margin", margins.mean())
        return loss_sum / batch["denominator"]

    def on_fit_start(self) -> None:
        freeze_eval(self.model)  # Lightning restores these modes after each validation

    def on_validation_epoch_start(self) -> None:
        self._validation = Gathered()

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        chosen, rejected = self(batch)
        loss = batch["importance"] * bradley_terry_loss(chosen, rejected, batch["margin"])
        table = torch.stack([column.float() for column in (chosen, rejected, batch["weight"], loss)], dim=1).cpu()  # (P, 4)
        question = batch["question"].cpu()
        for number, index in enumerate(batch["index"].tolist()):
            self._validation.add(index, table[question == number].tolist())

    def on_validation_epoch_end(self) -> None:
        self.log_dict(pair_metrics(self._validation.rows()), prog_bar=False)

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(self.model, self.params, self.total_steps)


def pair_metrics(questions: list[list[list[float]]]) -> dict[str, float]:
    """Figures of the validation split from each question's pairs (chosen, rejected, weight, loss)."""
    chosen, rejected, weight, loss = np.array([pair for pairs in questions for pair in pairs], dtype=np.float64).T
    answers = [score for pairs in questions for score in (pairs[0][0], *(pair[1] for pair in pairs))]
    return {
        "val/loss": float((weight * loss).sum() / weight.sum()),
        "val/accuracy": float(wins(chosen - rejected).mean()),
        "val/margin": float((chosen - rejected).mean()),
        "val/score_mean": float(np.mean(answers)),
    }
