"""Which answers share a forward."""

from __future__ import annotations

import torch
from torch import Tensor

from common.chunks import length_chunks
from rlhf.ppo.answers import Answers

CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Numbers in one forward's logits at most: answer tokens x V (256 MiB and 2 GiB in float32)."""


def chunks(rows: Tensor, answers: Answers, vocab: int, *, packed: bool = False) -> list[Tensor]:
    """The rows (numbers in `answers`) in forwards of like length, bounded by tokens and by logits, at least one row each.

    `packed`: the model reads them without padding, so that their lengths need not be alike.
    """
    most_logits = CHUNK_LOGITS.get(rows.device.type, CHUNK_LOGITS["cpu"])
    widths = [answers.lengths[rows]]
    if answers.encoder_mask is not None:
        widths.append(answers.encoder_mask[rows].sum(1))
    answered = answers.present[rows].sum(1)
    groups = length_chunks(torch.stack(widths, 1), weights=answered, most_weight=most_logits // vocab, padded=not packed)
    return [rows[group] for group in groups]
