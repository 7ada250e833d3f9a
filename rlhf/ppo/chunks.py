"""Which rows share a forward: bounds memory, and lets rows of like length pad each other least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.ppo.answers import Answers

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of one forward at most, an encoder's included."""
CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Numbers in one forward's logits at most: answer tokens x V (256 MiB and 2 GiB in float32)."""


def chunks(rows: Tensor, answers: Answers, vocab: int) -> Iterator[Tensor]:
    """The rows (numbers in `answers`) in forwards within both bounds, at least one row each; one forward where all fit."""
    device = rows.device.type
    tokens = CHUNK_TOKENS.get(device, CHUNK_TOKENS["cpu"])
    most_answer_tokens = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // vocab
    written, read = answers.lengths[rows], torch.zeros_like(rows)
    if answers.encoder_mask is not None:
        read = answers.encoder_mask[rows].sum(1)
    answered = answers.present[rows].sum(1)
    if len(rows) * int(written.max() + read.max()) <= tokens and int(answered.sum()) <= most_answer_tokens:
        yield rows
        return
    order = (written + read).argsort(stable=True)
    sizes = torch.stack([written[order], read[order], answered[order]], 1).tolist()
    begin = widest = deepest = total = 0
    for end, (width, depth, answer) in enumerate(sizes):
        widest, deepest, total = max(widest, width), max(deepest, depth), total + answer
        if end > begin and ((end + 1 - begin) * (widest + deepest) > tokens or total > most_answer_tokens):
            yield rows[order[begin:end]]
            begin, widest, deepest, total = end, width, depth, answer
    yield rows[order[begin:]]
