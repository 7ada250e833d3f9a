"""The pairwise objective as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from common.freezing import freeze_eval
from common.gathered import Gathered
from common.models.reward import RewardModel
from common.optim import build_optimizer
from reward_model.classification.dataset import PairBatch
from reward_model.classification.losses import bradley_terry_loss, pair_loss
from reward_model.config import ClassificationParams
from reward_model.members import member_weights, spread
from reward_model.metrics import wins


class PairModule(pl.LightningModule):
    """Trains a reward model on preferences; the loss of a window of micro-batches is a mean over its questions, however it is split."""

    def __init__(self, model: RewardModel, params: ClassificationParams, total_steps: int, seed: int = 0) -> None:
        """`seed`: of the resamples that the members of an ensemble learn from."""
        super().__init__()
        self.model = model
        self.params = params
        self.total_steps = total_steps
        self.seed = seed
        self.means: dict[str, tuple[Tensor, Tensor]] = {}
        self._validation = Gathered()

    def describe_rows(self, batch: PairBatch) -> str:
        """Where the rows of a batch stand in the data."""
        return ", ".join(batch["where"])

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected answers by each of the M members of an ensemble, (P, M) each, from one forward pass."""
        scores = self.model.member_scores(batch["inputs"])  # (R, M)
        return scores[batch["chosen"]], scores[batch["rejected"]]

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self(batch)
        rows = batch["index"][batch["question"]]
        loss_sum = pair_loss(
            chosen,
            rejected,
            member_weights(batch["weight"] * batch["importance"], rows, self.model.readout_settings, self.seed),
            batch["margin"][:, None],
            label_smoothing=self.params.label_smoothing,
            centring_coef=self.params.centring_coef,
        )
        margins = (chosen - rejected).detach().mean(1)
        counted = batch["weight"] > 0
        self.means = {"train/accuracy": (ordered_rightly(margins), counted), "train/margin": (margins, counted)}
        return loss_sum / (batch["denominator"] * chosen.shape[1])

    def on_fit_start(self) -> None:
        freeze_eval(self.model)  # Lightning restores these modes after each validation

    def on_validation_epoch_start(self) -> None:
        self._validation = Gathered()

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        members = self(batch)
        if not batch["weight"].any():
            return  # a row of another process, which keeps their batches alike
        chosen, rejected = (scores.mean(1) for scores in members)
        margin, importance = batch["margin"], batch["importance"]
        columns = [chosen, rejected, batch["weight"], importance * bradley_terry_loss(chosen, rejected, margin)]
        if self.model.members > 1:
            margins, losses = members[0] - members[1], importance[:, None] * bradley_terry_loss(*members, margin[:, None])
            right = ordered_rightly(margins)
            columns += [spread(margins), losses.mean(1), right.mean(1)]
        table = torch.stack([column.float() for column in columns], dim=1).cpu()  # (P, 4), of an ensemble (P, 7)
        question = batch["question"].cpu()
        for number, index in enumerate(batch["index"].tolist()):
            self._validation.add(index, table[question == number].tolist())

    def on_validation_epoch_end(self) -> None:
        self.log_dict(pair_metrics(self._validation.rows()), prog_bar=False)

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(self.model, self.params, self.total_steps)


def ordered_rightly(margins: Tensor) -> Tensor:
    """1 where the chosen answer scores higher, 0.5 where both score alike, else 0."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def pair_metrics(questions: list[list[list[float]]]) -> dict[str, float]:
    """Figures of the validation split from each question's pairs (chosen, rejected, weight, loss).

    Pairs judged by an ensemble have three figures more: the spread of the members' margins, a member's mean loss, the share of members
    that are right.
    """
    chosen, rejected, weight, loss, *members = np.array([pair for pairs in questions for pair in pairs], dtype=np.float64).T
    answers = [score for pairs in questions for score in (pairs[0][0], *(pair[1] for pair in pairs))]
    metrics = {
        "val/loss": float((weight * loss).sum() / weight.sum()),
        "val/accuracy": float(wins(chosen - rejected).mean()),
        "val/margin": float((chosen - rejected).mean()),
        "val/score_mean": float(np.mean(answers)),
    }
    if members:
        spreads, member_loss, right = members
        metrics["val/spread"] = float(spreads.mean())
        metrics["val/member_loss"] = float((weight * member_loss).sum() / weight.sum())
        metrics["val/member_accuracy"] = float(right.mean())
    return metrics
