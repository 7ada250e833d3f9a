"""Small texts that a model is tried on: what it can do is seen, never guessed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def trial_ids(model: nn.Module, rows: int, columns: int) -> Tensor:
    """Token ids (rows, columns), on the device of the model's embeddings; different ones, as far as the vocabulary has that many."""
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.arange(1, rows * columns + 1, device=embedding.device).reshape(rows, columns) % len(embedding)


def trial_rows(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Right-padded rows (2, 5) of five and three tokens, and their mask."""
    ids = trial_ids(model, 2, 5)
    return ids, torch.arange(5, device=ids.device) < torch.tensor([[5], [3]], device=ids.device)
