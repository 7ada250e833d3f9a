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
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from common.collate import left_pad, right_pad
from common.errors import UserError
from common.evaluation.generation_options import generation_options
from common.models.modes import evaluating
from common.prompts import clean_answer
from common.sampling import apply_repetition_penalty, filter_logits, gumbel_noise
from common.schema import GenerateParams

# transformers samples with its own generator, so what it would apply when sampling is applied here, in its order.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "top_h": TopHLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


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
    device = torch.device(device) if device is not None else model.device
    generator: Any = model  # the types of torch and transformers do not meet
    generator.to(device)
    rows = range(len(prompt_ids)) if rows is None else rows
    if len(rows) != len(prompt_ids):
        raise ValueError(f"{len(rows)} row numbers for {len(prompt_ids)} prompts")
    config = _generation_config(model, tokenizer, params, use_cache)
    eos_ids = frozenset(config.eos_token_id)
    _check_positions(model, max((len(ids) for ids in prompt_ids), default=0), params.max_new_tokens)

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
                params,
                config,
                seed,
                step,
            )
            for index, row in zip(chunk, written.tolist(), strict=True):
                answers[index] = read_answer(tokenizer, row, eos_ids, params.stop_strings)
            if on_batch is not None:
                on_batch(len(chunk))
    return [answers[index] for index in range(len(prompt_ids))]


def read_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_ids: frozenset[int], stop_strings: Sequence[str]) -> Answer:
    """The answer in a row of generated tokens: up to EOS (what follows is padding) or the first stop string."""
    end = next((place for place, token in enumerate(ids) if token in eos_ids), None)
    ids = ids if end is None else ids[: end + 1]
    text = _decode(tokenizer, ids)
    stops = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    if stops:
        text = text[: min(stops)]
    return Answer(text=clean_answer(text), ids=tuple(ids), ended=end is not None or bool(stops))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    params: GenerateParams,
    config: GenerationConfig,
    seed: int,
    step: int,
) -> Tensor:
    """Generated tokens (B, T) of prompts (B, S) and their mask; after a row's EOS comes padding."""
    # tokens that were there before the answer: the prompt, or an encoder-decoder's start token
    before = mask[:, :0] if model.config.is_encoder_decoder else mask
    skip = 1 if model.config.is_encoder_decoder else ids.shape[1]
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(_RepetitionPenalty(params.repetition_penalty, before, skip))
    if params.no_repeat_ngram_size:
        processors.append(_NoRepeatedNgram(params.no_repeat_ngram_size, before, skip))
    if params.do_sample:
        options = params.model_extra or {}
        warpers = [_WARPERS[name](options[name]) for name in _WARPERS if options.get(name) is not None]
        processors.append(_Sampling(params, warpers, seed, step, rows, skip))
    stopping = StoppingCriteriaList([_StopTexts(tokenizer, params.stop_strings, skip)] if params.stop_strings else [])
    generator: Any = model
    sequences: Tensor = generator.generate(
        input_ids=ids, attention_mask=mask.long(), generation_config=config, logits_processor=processors, stopping_criteria=stopping
    )
    return sequences[:, skip:]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: GenerateParams, use_cache: bool
) -> GenerationConfig:
    """Settings for `generate`, which always takes the likeliest token here: sampling adds its noise to the logits beforehand."""
    options = {name: value for name, value in generation_options(params).items() if name not in _WARPERS}
    eos = options.pop("eos_token_id", None)
    if eos is None:
        eos = [tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)]
    eos = sorted({token for token in _as_list(eos) if token is not None})
    if not eos:
        raise UserError("no token ends an answer: neither tokenizer nor model name an EOS token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    minimum = max(params.min_length, 0) or None
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=minimum,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=use_cache,
        **options,
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


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_positions(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return  # relative positions, as T5 has: no limit
    needed = {"prompt and answer": prompt_length + max_new_tokens}
    if model.config.is_encoder_decoder:
        needed = {"a prompt": prompt_length, "an answer": max_new_tokens}
    for what, tokens in needed.items():
        if tokens > positions:
            raise UserError(f"{what} of {tokens} tokens, the model has {positions} positions; lower max_prompt_length or max_new_tokens")


class _Sampling(LogitsProcessor):
    """Filtered logits plus Gumbel noise: the largest is a sample."""

    def __init__(self, params: GenerateParams, warpers: Sequence[LogitsProcessor], seed: int, step: int, rows: Tensor, skip: int) -> None:
        self.params, self.warpers, self.seed, self.step, self.rows, self.skip = params, warpers, seed, step, rows, skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = filter_logits(scores, self.params.temperature, self.params.top_k, self.params.top_p)
        for warper in self.warpers:
            logits = warper(input_ids, logits)
        position = input_ids.shape[1] - self.skip
        return logits + gumbel_noise(self.seed, self.step, self.rows, position, logits.shape[1], logits.device)


class _PaddingBlind(LogitsProcessor):
    """Base of processors that look at the text so far: `mask` tells its tokens from padding."""

    def __init__(self, setting: float, before: Tensor, skip: int) -> None:
        self.setting, self.before, self.skip = setting, before, skip

    def mask(self, input_ids: Tensor) -> Tensor:
        """(B, S) True on prompt and answer tokens; rows that ended have padding after EOS, where it no longer matters."""
        written = torch.ones_like(input_ids[:, self.skip :], dtype=torch.bool)
        unseen = torch.zeros_like(input_ids[:, : self.skip - self.before.shape[1]], dtype=torch.bool)
        return torch.cat([unseen, self.before, written], dim=1)


class _RepetitionPenalty(_PaddingBlind):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return apply_repetition_penalty(scores, input_ids, self.mask(input_ids), self.setting)


class _NoRepeatedNgram(_PaddingBlind):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processor = NoRepeatNGramLogitsProcessor(int(self.setting))
        mask = self.mask(input_ids)
        return torch.cat([processor(input_ids[row, mask[row]][None], scores[row][None]) for row in range(len(input_ids))])


class _StopTexts(StoppingCriteria):
    """A row is done when its answer's text holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], skip: int) -> None:
        self.tokenizer, self.stop_strings, self.skip = tokenizer, stop_strings, skip
        self.done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.done = self.done or [False] * len(input_ids)
        for row, ids in enumerate(input_ids[:, self.skip :].tolist()):
            if not self.done[row]:
                text = _decode(self.tokenizer, ids)
                self.done[row] = any(stop in text for stop in self.stop_strings)
        return torch.tensor(self.done, device=input_ids.device)
