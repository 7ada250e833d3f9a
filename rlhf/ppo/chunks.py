"""Which answers share a forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.chunks import length_chunks
from common.models.packed import SHARED_TOKENS
from rlhf.ppo.answers import Answers

CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Numbers in one forward's logits at most: answer tokens x V (256 MiB and 2 GiB in float32)."""


def chunks(rows: Tensor, answers: Answers, vocab: int, *, packed: bool = False) -> list[Tensor]:
    """The rows (numbers in `answers`) in forwards of like length, bounded by tokens and by logits, at least one row each.

    `packed`: the model reads them without padding. Their lengths need not be alike then; rows that follow each other and begin alike, as
    the answers to one prompt do, share a forward where they can.
    """
    most_logits = CHUNK_LOGITS.get(rows.device.type, CHUNK_LOGITS["cpu"])
    if packed:
        rows = rows.sort().values
    widths = [answers.lengths[rows]]
    if answers.encoder_mask is not None:
        widths.append(answers.encoder_mask[rows].sum(1))
    groups = length_chunks(
        torch.stack(widths, 1),
        weights=answers.present[rows].sum(1),
        most_weight=most_logits // vocab,
        spared=_alike(answers, rows) if packed else None,
    )
    return [rows[group] for group in groups]


def _alike(answers: Answers, rows: Tensor) -> Tensor:
    """(B,) tokens that a row has in common with the one before it, where those are shared; its last one stays its own."""
    ids, real = answers.ids[rows], answers.real()[rows]
    alike = ((ids[1:] == ids[:-1]) & real[1:] & real[:-1]).cumprod(1).sum(1)
    alike = torch.minimum(nn.functional.pad(alike, (1, 0)), answers.lengths[rows] - 1)
    return torch.where(alike >= SHARED_TOKENS, alike, 0)
