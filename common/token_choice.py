"""Which token comes next: what may be written, and the choice. Every method sees a batch of rows at one token position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from common.sampling import apply_repetition_penalty, filter_logits, gumbel_noise
from common.sampling_options import SAMPLING_OPTIONS
from common.schema import GenerateParams

# They act on logits after temperature, top_k and top_p.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "top_h": TopHLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
assert tuple(_WARPERS) == SAMPLING_OPTIONS


class TokenChooser:
    """Samples (or takes the likeliest of) the next token of each row, by the options of generation.

    The noise of a row's token is a function of (seed, step, the row's number, token position, token): batch, order and padding never
    change an answer.
    """

    def __init__(self, params: GenerateParams, end_ids: Sequence[int], *, seed: int, step: int) -> None:
        self.params = params
        self.end_ids = list(end_ids)
        self.seed, self.step = seed, step
        extra = params.model_extra or {}
        self.warpers = [make(extra[name]) for name, make in _WARPERS.items() if extra.get(name) is not None]

    def choose(self, logits: Tensor, rows: Tensor, position: int, text: Tensor, real: Tensor) -> Tensor:
        """Tokens (B,); the arguments are those of `scores`."""
        return self.scores(logits, rows, position, text, real).argmax(-1)

    def scores(self, logits: Tensor, rows: Tensor | None, position: int, text: Tensor, real: Tensor) -> Tensor:
        """Scores (B, V) whose largest is the choice, after logits (B, V) at answer position `position`.

        `rows` (B,): the rows' numbers, None where nothing is sampled. `text` (B, S), `real` (B, S): tokens so far, and where they are
        no padding.
        """
        params = self.params
        logits = apply_repetition_penalty(logits.float(), text, real, params.repetition_penalty)
        if params.no_repeat_ngram_size:
            block = NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size)
            logits = torch.cat([block(text[row, real[row]][None], logits[row][None]) for row in range(len(text))])
        if position < params.min_length:
            logits = logits.clone()
            # An id that no token has (-1: nothing ends an answer) would count from the vocabulary's end.
            logits[:, [token for token in self.end_ids if 0 <= token < logits.shape[1]]] = float("-inf")
        if not params.do_sample:
            return logits
        assert rows is not None
        logits = filter_logits(logits, params.temperature, params.top_k, params.top_p)
        for warper in self.warpers:
            logits = warper(text, logits)
        return logits + gumbel_noise(self.seed, self.step, rows, position, logits.shape[1], logits.device)
