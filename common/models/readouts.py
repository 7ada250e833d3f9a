"""Readouts: hidden states in, one score per row out. The objective (pairs or scores) does not matter here."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.models.backbone import States
from common.models.kinds import BackboneKind
from common.schema import Section


class ScoreHead(nn.Linear):
    """One output without bias, as transformers' sequence classifiers have it; weights normal with std 1 / sqrt(D + 1).

    It stays in float32 whatever the backbone's type: the difference of two scores is what matters, and bfloat16 has 8 bits of it.
    """

    def __init__(self, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.weight.normal_(std=1.0 / math.sqrt(hidden_size + 1), generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) of any type -> (B,) float32, whatever type the weights are of (float64 where they are float64)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(dtype), self.weight.to(dtype)).squeeze(-1)


class Readout(nn.Module):
    """Base of all readouts. `forward` maps states to scores (B,) in float32."""

    def forward(self, states: States) -> Tensor:
        raise NotImplementedError


class LastToken(Readout):
    """The state of the last real token (encoders: of the first, where they gather the sentence), through a linear head."""

    def __init__(self, hidden_size: int, kind: BackboneKind, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.first = kind == "encoder"
        self.score = ScoreHead(hidden_size, generator)

    def forward(self, states: States) -> Tensor:
        if self.first:
            read = states.last[:, 0]
        else:
            last = last_position(states.mask)  # (B,)
            read = states.last[torch.arange(len(last), device=last.device), last]
        scores: Tensor = self.score(read)
        return scores


def last_position(mask: Tensor) -> Tensor:
    """Index of the last True of each row of a (B, S) mask: (B,). Works for padding on either side."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * positions).argmax(dim=1)


def build_readout(settings: Section, hidden_size: int, kind: BackboneKind, seed: int) -> Readout:
    """The readout that `settings.name` asks for, with fresh weights that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    name: str = settings.name  # type: ignore[attr-defined]
    if name == "last_token":
        return LastToken(hidden_size, kind, generator)
    raise UserError(f"model_params.readout.name: got {name}, expected last_token")
