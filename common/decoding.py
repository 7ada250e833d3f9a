"""What every decode loop needs beside the choice of tokens: where answers end, whether they fit, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.models.kinds import positions_of
from common.prompts import clean_answer
from common.schema import GenerateParams

_MARGIN = 8
"""Tokens decoded beyond the longest stop string, so that what a tokenizer does at a text's beginning stays out of it."""


def eos_ids(params: GenerateParams, tokenizer: Any, model: Any) -> list[int]:
    """Ids that end an answer: `eos_token_id` of the options, else the tokenizer's and the model's own. Raises UserError for none."""
    found = _as_list((params.model_extra or {}).get("eos_token_id"))
    if found == [None]:
        defaults = getattr(model, "generation_config", None)
        found = [tokenizer.eos_token_id, *_as_list(getattr(defaults, "eos_token_id", None))]
    ids = sorted({int(token) for token in found if token is not None})
    if not ids:
        raise UserError("no token ends an answer: neither tokenizer nor model name an EOS token; set eos_token_id")
    return ids


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def check_positions(config: Any, prompt_length: int, max_new_tokens: int) -> None:
    """Raise UserError where the longest prompt and its answer may exceed the model's positions."""
    positions = positions_of(config)
    if positions is None:
        return
    needed = {"prompt and answer": prompt_length + max_new_tokens}
    if config.is_encoder_decoder:
        needed = {"a prompt": prompt_length, "an answer": max_new_tokens}
    for what, tokens in needed.items():
        if tokens > positions:
            raise UserError(f"{what} of {tokens} tokens, the model has {positions} positions; lower max_prompt_length or max_new_tokens")


def holds_stop(tokenizer: Any, ids: Tensor, stop_strings: Sequence[str]) -> list[bool]:
    """For each answer so far, ids (B, T): whether a stop string stands at its end; decodes a bounded number of tokens.

    A token that is no special one adds a byte at least, so a stop string that the last token completes lies in as many tokens as it
    has bytes.
    """
    window = max(len(stop.encode()) for stop in stop_strings) + _MARGIN
    special = set(tokenizer.all_special_ids)
    tails = [[token for token in row if token not in special][-window:] for row in ids[:, -4 * window :].tolist()]
    return [_stop_place(text, stop_strings) is not None for text in _decode(tokenizer, tails)]


def read_answers(tokenizer: Any, answers: Sequence[Sequence[int]], stop_strings: Sequence[str]) -> list[tuple[str, bool]]:
    """Each answer as text, up to the first stop string, without special tokens and leading space; and whether it held one."""
    read = []
    for text in _decode(tokenizer, answers):
        place = _stop_place(text, stop_strings)
        read.append((clean_answer(text[:place]), place is not None))
    return read


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _stop_place(text: str, stop_strings: Sequence[str]) -> int | None:
    return min((place for stop in stop_strings if (place := text.find(stop)) >= 0), default=None)
