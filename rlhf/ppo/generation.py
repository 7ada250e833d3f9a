"""Which token comes next: what may be sampled, and the sample. Every function sees a batch of rows at one token position."""

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
    TypicalLogitsWarper,
)

from common.errors import UserError
from common.sampling import apply_repetition_penalty, filter_logits, gumbel_noise
from common.schema import GenerateParams
from rlhf.sampling_options import WARPERS

# They act on logits after temperature, top_k and top_p.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
assert tuple(_WARPERS) == WARPERS


def eos_ids(params: GenerateParams, tokenizer: Any, model: Any) -> list[int]:
    """Ids that end an answer: `eos_token_id` of the options, else the tokenizer's and the model's own."""
    given = (params.model_extra or {}).get("eos_token_id")
    found = _as_list(given)
    if given is None:
        defaults = getattr(model, "generation_config", None)
        found = [tokenizer.eos_token_id, *_as_list(getattr(defaults, "eos_token_id", None))]
    ids = sorted({int(token) for token in found if token is not None})
    if not ids:
        raise UserError("generation_config: no token ends an answer; set eos_token_id")
    return ids


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


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
        self.warpers = [make(extra[name]) for name, make in _WARPERS.items() if extra.get(name)]

    @property
    def reads_text(self) -> bool:
        """Whether a choice depends on the tokens before it by more than the logits."""
        return self.params.repetition_penalty != 1.0 or self.params.no_repeat_ngram_size > 0

    def choose(self, logits: Tensor, rows: Tensor, position: int, text: Tensor | None, real: Tensor | None) -> Tensor:
        """Tokens (B,) after logits (B, V) of rows (B,) at answer position `position`.

        `text` (B, S) and `real` (B, S): tokens so far and where they are no padding; needed where `reads_text`.
        """
        logits = logits.float()
        if self.reads_text:
            assert text is not None and real is not None
            logits = apply_repetition_penalty(logits, text, real, self.params.repetition_penalty)
            if self.params.no_repeat_ngram_size:
                block = NoRepeatNGramLogitsProcessor(self.params.no_repeat_ngram_size)
                logits = torch.cat([block(text[row, real[row]][None], logits[row][None]) for row in range(len(text))])
        if position < self.params.min_length:
            logits = logits.clone()
            logits[:, self.end_ids] = float("-inf")
        if not self.params.do_sample:
            return logits.argmax(-1)
        logits = filter_logits(logits, self.params.temperature, self.params.top_k, self.params.top_p)
        for warper in self.warpers:
            logits = warper(None, logits)
        return (logits + gumbel_noise(self.seed, self.step, rows, position, logits.shape[1], logits.device)).argmax(-1)
