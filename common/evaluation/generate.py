"""Answers of a model, in batches; no answer depends on its batch.

Prompts are padded on the left (encoders: on the right), prompts of like length share a batch, and sampling noise is a function of
(seed, row, token position): batch size and order change an answer only where two tokens are equally likely to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from common.collate import left_pad, right_pad
from common.decoding import check_positions, eos_ids, holds_stop, read_answers
from common.evaluation.generation_options import generation_options
from common.models.modes import evaluating
from common.sampling_options import SAMPLING_OPTIONS
from common.schema import GenerateParams
from common.token_choice import TokenChooser


@dataclass(frozen=True)
class Answer:
    """What a model wrote to one prompt."""

    text: str
    """Without the leading space, EOS and stop string."""
    ids: tuple[int, ...]
    """Tokens as written, EOS included."""
    ended: bool
    """By EOS or a stop string; False for an answer cut at `max_new_tokens`."""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    params: GenerateParams,
    *,
    seed: int,
    batch_size: int,
    device: torch.device | str | None = None,
    use_cache: bool = True,
    rows: Sequence[int] | None = None,
    step: int = 0,
    pad_to: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer tokenized prompts, in their order; for causal and encoder-decoder models.

    `rows`: numbers that make each prompt's noise its own, default 0, 1, …; `step` separates repeated sampling of the same rows.
    `pad_to`: pad every batch to this many prompt tokens instead of its longest. `on_batch` hears how many answers a batch gave.
    The model is used where it is unless `device` is given. Raises UserError for unknown options and prompts too long for the model.
    """
    generator: Any = model  # the types of torch and transformers do not meet
    if device is not None:
        generator.to(device)
    device = model.device
    rows = range(len(prompt_ids)) if rows is None else rows
    if len(rows) != len(prompt_ids):
        raise ValueError(f"{len(rows)} row numbers for {len(prompt_ids)} prompts")
    config = _generation_config(model, tokenizer, params, use_cache)
    chooser = TokenChooser(params, config.eos_token_id, seed=seed, step=step)
    ends = frozenset(config.eos_token_id)
    check_positions(model.config, max((len(ids) for ids in prompt_ids), default=0), params.max_new_tokens)

    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
    with evaluating(model), _only_token_ids(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            pad = right_pad if model.config.is_encoder_decoder else left_pad
            ids, mask = pad([prompt_ids[index] for index in chunk], config.pad_token_id, pad_to)
            written = _generate_batch(
                model,
                tokenizer,
                ids.to(device),
                mask.to(device),
                torch.tensor([rows[i] for i in chunk], device=device),
                chooser,
                config,
            )
            for index, row in zip(chunk, written.tolist(), strict=True):
                answers[index] = read_answer(tokenizer, row, ends, params.stop_strings)
            if on_batch is not None:
                on_batch(len(chunk))
    return [answers[index] for index in range(len(prompt_ids))]


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: frozenset[int], stop_strings: Sequence[str]) -> Answer:
    """The answer in a row of generated tokens: up to EOS or the first stop string; what follows is padding."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    ids = ids if end is None else ids[: end + 1]
    [(text, stopped)] = read_answers(tokenizer, [ids], stop_strings)
    if stopped:
        written = torch.tensor([ids])
        lengths = (length for length in range(1, len(ids)) if holds_stop(tokenizer, written[:, :length], stop_strings)[0])
        ids = ids[: next(lengths, len(ids))]
    return Answer(text=text, ids=tuple(ids), ended=end is not None or stopped)


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    chooser: TokenChooser,
    config: GenerationConfig,
) -> Tensor:
    """Generated tokens (B, T) of prompts (B, S) and their mask; after a row's EOS comes padding."""
    # tokens that were there before the answer: the prompt, or an encoder-decoder's start token
    before = mask[:, :0] if model.config.is_encoder_decoder else mask
    skip = 1 if model.config.is_encoder_decoder else ids.shape[1]
    stops = chooser.params.stop_strings
    generator: Any = model
    sequences: Tensor = generator.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        generation_config=config,
        synced_gpus=False,  # each process answers as many as it has, with a model that is whole for so long
        logits_processor=LogitsProcessorList([_Choice(chooser, rows, before, skip)]),
        stopping_criteria=StoppingCriteriaList([_StopTexts(tokenizer, stops, skip)] if stops else []),
    )
    return sequences[:, skip:]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: GenerateParams, use_cache: bool
) -> GenerationConfig:
    """Settings for `generate`, which always takes the likeliest token: `TokenChooser` decides in the scores what that is."""
    own = {*SAMPLING_OPTIONS, "eos_token_id"}
    options = {name: value for name, value in generation_options(params).items() if name not in own}
    eos = eos_ids(params, tokenizer, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return GenerationConfig(
        do_sample=False, max_new_tokens=params.max_new_tokens, eos_token_id=eos, pad_token_id=pad, use_cache=use_cache, **options
    )


@contextmanager
def _only_token_ids(model: PreTrainedModel) -> Iterator[None]:
    """Sampling defaults that came with the model have no say: what a config does not ask for is not done."""
    stored = model.generation_config
    ids = {name: getattr(stored, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = stored


class _Choice(LogitsProcessor):
    """`TokenChooser` in transformers' loop, whose own generator and view of padding have no part in it."""

    def __init__(self, chooser: TokenChooser, rows: Tensor, before: Tensor, skip: int) -> None:
        self.chooser, self.rows, self.before, self.skip = chooser, rows, before, skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.chooser.scores(scores, self.rows, input_ids.shape[1] - self.skip, input_ids, self._mask(input_ids))

    def _mask(self, input_ids: Tensor) -> Tensor:
        """(B, S) True on prompt and answer tokens; rows that ended have padding after EOS, where it no longer matters."""
        before = self.before.repeat_interleave(len(input_ids) // len(self.before), dim=0)  # a prompt's beams stand together
        written = torch.ones_like(input_ids[:, self.skip :], dtype=torch.bool)
        unseen = torch.zeros_like(input_ids[:, : self.skip - before.shape[1]], dtype=torch.bool)
        return torch.cat([unseen, before, written], dim=1)


class _StopTexts(StoppingCriteria):
    """A row is done when its answer's text holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], skip: int) -> None:
        self.tokenizer, self.stop_strings, self.skip = tokenizer, stop_strings, skip

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(holds_stop(self.tokenizer, input_ids[:, self.skip :], self.stop_strings), device=input_ids.device)
