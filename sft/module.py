"""SFT as Lightning sees it: a thin adapter around one pure loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from common.collate import IGNORED
from common.freezing import freeze_eval
from common.optim import build_optimizer
from common.schema import ModelParams


def answer_loss(logits: Tensor, labels: Tensor, is_encoder_decoder: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy over answer tokens (nats), their number, and how many were the likeliest token.

    logits (B, S, V); labels (B, S), -100 where a token carries no loss. A causal model's logits at t predict token t + 1; a decoder's
    predict token t, since its input was shifted already.
    """
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    kept_logits, kept_labels = logits[counted].float(), labels[counted]  # (N, V), (N,)
    loss = F.cross_entropy(kept_logits, kept_labels, reduction="sum")
    correct = (kept_logits.detach().argmax(-1) == kept_labels).sum()
    return loss, counted.sum(), correct


class SFTModule(pl.LightningModule):
    """Trains `model` on answer tokens alone; the loss of a window of micro-batches is a mean over its tokens, however it is split."""

    def __init__(
        self,
        model: torch.nn.Module,
        params: ModelParams,
        total_steps: int,
        generate: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        """`generate(step)` answers the fixed validation questions and returns their metrics; None leaves that out."""
        super().__init__()
        self.model = model
        self.params = params
        self.total_steps = total_steps
        self.generate = generate
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._validation = torch.zeros(3, dtype=torch.float64)
        self.model.train()  # Lightning keeps the mode it finds
        freeze_eval(self.model)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits (B, S, V)."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if batch.get(name) is not None}
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return self.model(**inputs, use_cache=False).logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss_sum, tokens, _ = answer_loss(self(batch), batch["labels"], self.is_encoder_decoder)
        self.log("train/loss", loss_sum.detach() / tokens.clamp(min=1), prog_bar=True)
        return loss_sum / batch["denominator"]

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        sums = answer_loss(self(batch), batch["labels"], self.is_encoder_decoder)
        self._validation += torch.stack([value.detach().double().cpu() for value in sums])

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
