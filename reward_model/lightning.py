"""What both LightningModules share: the optimizer, and validation over exactly the rows there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from common.models.reward import RewardModel
from common.optim import build_adamw, lr_lambda, warmup_steps
from common.schema import ModelParams


def configure_optimizers(model: RewardModel, params: ModelParams, total_steps: int) -> dict[str, Any]:
    """AdamW with decay groups, and a schedule that moves with every optimizer step."""
    optimizer = build_adamw(model, params)
    schedule = lr_lambda(params.lr_scheduler, warmup_steps(params.warmup_steps_per_cent, total_steps), total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Gathered:
    """Results of validation rows by their index. Rows that several processes saw (to have batches alike) count once."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def add(self, index: int, result: Any) -> None:
        self._rows[index] = result

    def by_index(self) -> dict[int, Any]:
        """Everything that all processes added, in the order of the data. Every process must call this."""
        rows = self._rows
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            parts: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, rows)
            rows = {index: result for part in parts for index, result in part.items()}
        return dict(sorted(rows.items()))

    def rows(self) -> list[Any]:
        return list(self.by_index().values())
