"""The transformer under a reward model: which text enters which part of it, and which hidden states come out.

Everything that differs between causal models, encoders and encoder-decoders is decided here; readouts see states and masks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from common.chunks import length_chunks
from common.collate import right_pad
from common.errors import UserError
from common.freezing import find_blocks
from common.model_source import layers_in
from common.models.kinds import backbone_kind
from common.models.last_layer import LastFeedForward
from common.models.lower_layers import LowerLayers, starting_above
from common.models.modes import draws_dropout
from common.models.packed import as_line
from common.models.parts import without_adapters
from common.readout_settings import PARTS, READS, Needs, Part, ReadoutSettings, Token, readout_problems

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
    """Right-padded inputs: ids (B, S) and masks (B, S), True on real tokens; the decoder's are None where none is read."""

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None
    entering: Tensor | None = None
    """States (B, S, D) that enter the lowest layer that trains, where they were computed before."""

    def to(self, device: Any) -> RewardBatch:
        """The same batch on another device."""
        return RewardBatch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Entry(NamedTuple):
    """Which text enters which part of a transformer.

    causal, encoder     prompt + answer (+ EOS) in one row
    encoder_decoder     the same into the encoder; the decoder reads `start` alone, where it is read at all.
                        `splits`: the prompt enters the encoder; the decoder reads `start` + answer (+ EOS)
    """

    splits: bool = False
    start: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, needs: Needs) -> Entry:
        """How texts enter the transformer of this configuration, so that it has the states that a readout needs."""
        return cls(needs.splits_text, decoder_start(config) if needs.part == "decoder" else None)


def readout_needs(settings: ReadoutSettings, config: PreTrainedConfig) -> Needs:
    """What a readout reads of a transformer. Raises UserError where the two make no sense together."""
    kind = backbone_kind(config)
    layers: dict[Part, int] = {part: layer_count(config, part) for part in PARTS[kind]}
    if problems := readout_problems(settings, kind, layers):
        raise UserError(*(f"model_params.readout.{name}: {problem}" for name, problem in problems.items()))
    place = READS[settings.name][kind]
    count = (settings.n_layers or layers[place.part]) if settings.reads_layers else 1
    if count > 1 and hidden_size(config) != config.hidden_size:
        wide, final = config.hidden_size, hidden_size(config)
        raise UserError(f"model_params.readout.name: got {settings.name}, but the layers have {wide} features and the final states {final}")
    return Needs(*place, layers=count)


def hidden_size(config: PreTrainedConfig) -> int:
    """Width D of the final hidden states (some OPT models project theirs)."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def layer_count(config: PreTrainedConfig, part: Part) -> int:
    """Layers of a transformer, or of an encoder-decoder's encoder or decoder."""
    told = layers_in(config.to_dict(), part)
    return int(config.num_hidden_layers) if told is None else told


def reward_inputs(encoder: Encoder, entry: Entry, prompt: Prompt, answer: str, *, ended: bool = True, where: str = "") -> RewardInput:
    """Tokenize one prompt and answer for a reward model. Raises UnusableRow where the answer has no token."""
    return as_reward_input(encoder.pair(prompt, answer, where), entry, ended=ended)


def as_reward_input(encoded: Encoded, entry: Entry, *, ended: bool = True) -> RewardInput:
    """What of a tokenized prompt and answer enters which part of the backbone.

    `ended`: the answer ends where it ends, so EOS follows it as in training; False for one that was cut off while being written.
    """
    # The tokenizing code puts EOS after every answer that it did not have to cut.
    answer_ids = encoded.answer_ids if ended or encoded.cut_answer else encoded.answer_ids[:-1]
    start = [] if entry.start is None else [entry.start]
    if entry.splits:
        return RewardInput(list(encoded.prompt_ids), [*start, *answer_ids])
    return RewardInput([*encoded.prompt_ids, *answer_ids], start or None)


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
    """What a readout reads of B rows: the states of L layers, lowest first, at the tokens that it reads, without padding."""

    values: Tensor
    """(N, L, D): N tokens, row after row."""
    lengths: list[int]
    """Tokens of each row; 1 where a readout reads one token."""

    def to(self, device: Any) -> States:
        """The same states on another device."""
        return States(self.values.to(device), self.lengths)

    def rows(self) -> tuple[Tensor, ...]:
        """The states of each row: (T of the row, L, D)."""
        rows: tuple[Tensor, ...] = self.values.split(self.lengths)
        return rows


def collate_states(rows: Sequence[Tensor]) -> States:
    """Rows (T of the row, L, D) as a batch again."""
    return States(torch.cat(list(rows)), [len(row) for row in rows])


def backbone_states(backbone: nn.Module, batch: RewardBatch, needs: Needs, lower: LowerLayers | None = None) -> States:
    """Run the transformer, or its encoder alone where no more is read, and keep the states that are needed.

    It starts above `lower` where the batch has the states that enter there.
    """
    plain = without_adapters(backbone)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    model, stack, mask = plain, plain, batch.attention_mask
    if needs.part == "encoder":
        model = stack = plain.get_encoder()
    else:
        arguments["use_cache"] = False
    if needs.part == "decoder":
        assert batch.decoder_input_ids is not None and batch.decoder_attention_mask is not None
        stack, mask = plain.get_decoder(), batch.decoder_attention_mask
        arguments |= {"decoder_input_ids": batch.decoder_input_ids, "decoder_attention_mask": mask.long()}
    mask = mask.bool()
    run = partial(_final_states, model, arguments)
    with starting_above(lower, batch.entering):
        if needs.token == "all":
            return States(torch.stack(_upper_layers(stack, run, needs.layers, lambda states: states[mask]), 1), mask.sum(1).tolist())
        rows, read = torch.arange(len(mask), device=mask.device), token_position(mask, needs.token)
        return _of_one_token(_upper_layers(stack, run, needs.layers, lambda states: states[rows, read]))


def line_states(
    backbone: nn.Module, batch: RewardBatch, needs: Needs, last: LastFeedForward | None = None, lower: LowerLayers | None = None
) -> States:
    """As `backbone_states` for causal models that can read a line: without padding, and a beginning that rows share read once.

    Where dropout is on, rows share nothing: each draws noise of its own. `last`: runs for the tokens that are read alone.
    """
    plain = without_adapters(backbone)
    mask = batch.attention_mask.bool()
    line = as_line(batch.input_ids, mask, share=not draws_dropout(plain))
    entering = None if batch.entering is None else batch.entering[line.kept][None]

    def run() -> Tensor:
        with starting_above(lower, entering):
            return line.states(plain)

    if needs.token == "all":
        every = line.places[mask]  # a shared beginning is read in each of its rows
        layers = _upper_layers(plain, run, needs.layers, lambda states: states.view(-1, states.shape[-1])[every])  # (N, D) each
        return States(torch.stack(layers, 1), mask.sum(1).tolist())
    places = line.places.gather(1, token_position(mask, needs.token)[:, None])[:, 0]  # (B,)
    with nullcontext() if last is None else last.at(places):
        return _of_one_token(_upper_layers(plain, run, needs.layers, lambda states: states.view(-1, states.shape[-1])[places]))


def token_position(mask: Tensor, token: Token) -> Tensor:
    """Index of the first or last True of each row of a (B, S) mask: (B,). Works for padding on either side."""
    if token == "first":
        return mask.byte().argmax(dim=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * positions).argmax(dim=1)


def _final_states(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    states: Tensor = model(**arguments).last_hidden_state
    return states


def _of_one_token(layers: list[Tensor]) -> States:
    """L layers' states (B, D) of one token."""
    return States(torch.stack(layers, 1), [1] * len(layers[0]))


def _upper_layers(stack: nn.Module, run: Callable[[], Tensor], count: int, pick: Callable[[Tensor], Tensor] = lambda s: s) -> list[Tensor]:
    """What `pick` takes of the states of the `count` upper layers while `run` runs them, lowest first.

    The last are what `run` returns, behind the final norm if there is one; those below are as one layer hands them to the next.
    Raises UserError where a model's layers cannot be told apart.
    """
    if count == 1:
        return [pick(run())]
    kept: deque[tuple[Tensor, bool]] = deque(maxlen=count)

    def keep(block: nn.Module, arguments: Any, result: Any) -> None:
        states = result[0] if isinstance(result, tuple) else result
        # Without gradients only what is picked stays in memory. With them everything does anyway, and older versions of transformers
        # call this inside of what recomputation runs again, where an operation of ours would be one too many.
        kept.append((states, False) if states.requires_grad else (pick(states), True))

    blocks = [stack.get_submodule(block.prefix.rstrip(".")) for block in find_blocks(stack)]
    hooks = [block.register_forward_hook(keep) for block in blocks[-count:]]
    try:
        final = pick(run())
    finally:
        for hook in hooks:
            hook.remove()
    layers = [states if picked else pick(states) for states, picked in list(kept)[:-1]] + [final]
    if len(layers) != count or layers[0].shape != final.shape:
        raise UserError(f"model_params.readout: {type(stack).__name__} does not show its layers; a readout of the last alone can read it")
    return layers


def rows_of_like_length(batch: RewardBatch) -> list[tuple[Tensor, RewardBatch]]:
    """A right-padded batch in parts of which each is cut to its own longest row, with the rows that each has."""
    masks = [mask for mask in (batch.attention_mask, batch.decoder_attention_mask) if mask is not None]
    widths = torch.stack([mask.sum(1) for mask in masks], 1)  # (B, 1 or 2)

    def part(rows: Tensor) -> RewardBatch:
        width, *decoder_width = widths[rows].amax(0).tolist()
        cuts = (width, width, *(decoder_width or [None]) * 2, width)
        return RewardBatch(*(None if tensor is None else tensor[rows, :cut] for tensor, cut in zip(batch, cuts, strict=True)))  # type: ignore[arg-type]

    return [(rows, part(rows)) for rows in length_chunks(widths)]
