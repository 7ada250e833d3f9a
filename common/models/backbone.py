"""The transformer under a reward model: which text enters which part of it, and which hidden states come out.

Everything that differs between causal models, encoders and encoder-decoders is decided here; readouts see states and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from common.chunks import length_chunks
from common.collate import right_pad
from common.models.modes import draws_dropout
from common.models.packed import as_line

if TYPE_CHECKING:
    from common.records import Prompt
    from common.tokenization import Encoded, Encoder


@dataclass(frozen=True)
class RewardInput:
    """Token ids of one prompt and answer, as the backbone takes them."""

    input_ids: list[int]
    decoder_input_ids: list[int] | None = None

    @property
    def length(self) -> int:
        return len(self.input_ids) + len(self.decoder_input_ids or ())


class RewardBatch(NamedTuple):
    """Right-padded inputs: ids (B, S) and masks (B, S), True on real tokens; the decoder's are None but for encoder-decoders."""

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None

    def to(self, device: Any) -> RewardBatch:
        """The same batch on another device."""
        ids, mask, decoder_ids, decoder_mask = self
        return RewardBatch(
            ids.to(device),
            mask.to(device),
            None if decoder_ids is None else decoder_ids.to(device),
            None if decoder_mask is None else decoder_mask.to(device),
        )


def reward_inputs(
    encoder: Encoder, config: PreTrainedConfig, prompt: Prompt, answer: str, *, ended: bool = True, where: str = ""
) -> RewardInput:
    """Tokenize one prompt and answer for a reward model. Raises UnusableRow where the answer has no token."""
    return as_reward_input(encoder.pair(prompt, answer, where), config, ended=ended)


def as_reward_input(encoded: Encoded, config: PreTrainedConfig, *, ended: bool = True) -> RewardInput:
    """What of a tokenized prompt and answer enters which part of the backbone.

    causal, encoder     prompt + answer (+ EOS) in one row
    encoder_decoder     the prompt enters the encoder; the decoder reads its start token + answer (+ EOS)

    `ended`: the answer ends where it ends, so EOS follows it as in training; False for one that was cut off while being written.
    """
    # The tokenizing code puts EOS after every answer that it did not have to cut.
    answer_ids = encoded.answer_ids if ended or encoded.cut_answer else encoded.answer_ids[:-1]
    if config.is_encoder_decoder:
        return RewardInput(list(encoded.prompt_ids), [decoder_start(config), *answer_ids])
    return RewardInput([*encoded.prompt_ids, *answer_ids])


def decoder_start(config: PreTrainedConfig) -> int:
    """The token that opens a decoder's input."""
    start = config.decoder_start_token_id if getattr(config, "decoder_start_token_id", None) is not None else config.pad_token_id
    assert start is not None, "an encoder-decoder has a start token"
    return int(start)


def collate_rewards(rows: Sequence[RewardInput], pad_id: int, pad_to: int | None = None) -> RewardBatch:
    """Right-pad rows to the longest of them, or to `pad_to`."""
    ids, mask = right_pad([row.input_ids for row in rows], pad_id, pad_to)
    if rows[0].decoder_input_ids is None:
        return RewardBatch(ids, mask)
    decoder_ids, decoder_mask = right_pad([row.decoder_input_ids or [] for row in rows], pad_id, pad_to)
    return RewardBatch(ids, mask, decoder_ids, decoder_mask)


class States(NamedTuple):
    """What a readout may read. `last` (B, S, D): final hidden states of the part that is read; `mask` (B, S): its real tokens."""

    last: Tensor
    mask: Tensor


def backbone_states(backbone: nn.Module, batch: RewardBatch) -> States:
    """Run the transformer; for encoder-decoders the states are the decoder's."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    mask = batch.attention_mask
    if batch.decoder_input_ids is not None:
        assert batch.decoder_attention_mask is not None
        mask = batch.decoder_attention_mask
        arguments |= {"decoder_input_ids": batch.decoder_input_ids, "decoder_attention_mask": mask.long()}
    output = backbone(**arguments, use_cache=False)
    return States(output.last_hidden_state, mask.bool())


def line_states(backbone: nn.Module, batch: RewardBatch) -> States:
    """As `backbone_states` for causal models that can read a line: without padding, and a beginning that rows share read once.

    Where dropout is on, rows share nothing: each draws noise of its own.
    """
    mask = batch.attention_mask.bool()
    line = as_line(batch.input_ids, mask, share=not draws_dropout(backbone))
    return States(F.embedding(line.places, line.states(backbone)), mask)


def rows_of_like_length(batch: RewardBatch) -> list[tuple[Tensor, RewardBatch]]:
    """A right-padded batch in parts of which each is cut to its own longest row, with the rows that each has."""
    masks = [mask for mask in (batch.attention_mask, batch.decoder_attention_mask) if mask is not None]
    widths = torch.stack([mask.sum(1) for mask in masks], 1)  # (B, 1 or 2)

    def part(rows: Tensor) -> RewardBatch:
        width, *decoder_width = widths[rows].amax(0).tolist()
        cuts = (width, width, *decoder_width * 2)
        return RewardBatch(*(tensor[rows, :cut] for tensor, cut in zip(batch, cuts, strict=False) if tensor is not None))

    return [(rows, part(rows)) for rows in length_chunks(widths)]
