"""SFT as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.freezing import freeze_eval
from common.optim import build_optimizer
from common.record_types import SFTRecord
from common.schema import ModelParams
from sft.losses import answer_figures, answer_loss
from sft.reader import AnswerReader


class SFTModule(pl.LightningModule):
    """Trains a model on answer tokens alone; the loss of a window of micro-batches is a mean over its tokens, however it is split."""

    def __init__(
        self,
        reader: AnswerReader,
        params: ModelParams,
        total_steps: int,
        generate: Callable[[int], dict[str, float]] | None = None,
        records: Sequence[SFTRecord] = (),
    ) -> None:
        """`generate(step)` answers the fixed validation questions and returns their metrics; None leaves that out.

        records: those of the training rows, for errors.
        """
        super().__init__()
        self.model = reader.model
        self.reader = reader
        self.params = params
        self.total_steps = total_steps
        self.generate = generate
        self.records = records
        self._validation = torch.zeros(3, dtype=torch.float64)
        self.model.train()  # Lightning keeps the mode it finds
        freeze_eval(self.model)

    def describe_rows(self, batch: dict[str, Any]) -> str:
        """Where the rows of a batch stand in the data."""
        return ", ".join(self.records[row].where for row in batch["rows"]) if self.records else "unknown"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = [answer_loss(*predictions, self.reader.head, self.reader.vocab) for predictions in self.reader(batch)]
        return torch.stack(losses).sum() / batch["denominator"]

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for predictions in self.reader(batch):
            self._validation += torch.tensor(answer_figures(*predictions, self.reader.head, self.reader.vocab), dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        loss_sum, tokens, correct = self.trainer.strategy.reduce(self._validation.to(self.device), reduce_op="sum").tolist()
        loss = loss_sum / max(tokens, 1)
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", math.exp(min(loss, 700.0)))
        self.log("val/token_accuracy", correct / max(tokens, 1))
        if self.generate is not None:
            self.log_dict(self.generate(self.trainer.global_step))

    def configure_optimizers(self) -> dict[str, Any]:
        return build_optimizer(self.model, self.params, self.total_steps)
