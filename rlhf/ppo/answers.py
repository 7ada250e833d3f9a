"""Prompts and answers as tensors, and one forward that looks at answer positions only.

Rows are padded on the right, so that causality alone hides padding; masks come from lengths, never from comparing ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.collate import right_pad
from common.models.backbone import decoder_start
from common.models.last_layer import LastFeedForward
from common.models.lower_layers import LowerLayers
from common.models.packed import Line, as_line, can_pack, packed_line
from common.models.parts import take_apart, without_adapters

if TYPE_CHECKING:
    from rlhf.ppo.static_decoding import StaticDecoding

PADDING_ID = 0
"""What fills padding; any id would do, since nothing reads it."""


@dataclass(frozen=True)
class Answers:
    """A batch of prompts and answers. Shapes: B rows, T answer tokens of the longest answer, S prompt + answer tokens."""

    targets: Tensor
    """Answer tokens (B, T)."""
    present: Tensor
    """(B, T) True on answer tokens, EOS included."""
    mask: Tensor
    """(B, T) True on answer tokens that count; all that are present, unless the caller masks some."""
    starts: Tensor
    """(B,) column of the input whose output predicts the first answer token."""
    ids: Tensor
    """Input of the part that writes: prompt + answer (B, S), or start token + answer for encoder-decoders."""
    lengths: Tensor
    """(B,) real columns of `ids`."""
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None
    """Prompts (B, S) and where they are real; encoder-decoders only."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sizes(self) -> Tensor:
        """(B,) tokens of prompt and answer."""
        return self.lengths if self.encoder_mask is None else self.lengths + self.encoder_mask.sum(1)

    def select(self, rows: Tensor) -> Answers:
        """Some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max())
        encoder_ids, encoder_mask = self.encoder_ids, self.encoder_mask
        if encoder_ids is not None and encoder_mask is not None:
            encoder_width = int(encoder_mask[rows].sum(1).max())
            encoder_ids, encoder_mask = encoder_ids[rows, :encoder_width], encoder_mask[rows, :encoder_width]
        columns = max(1, int(self.present[rows].sum(1).max()))
        return Answers(
            self.targets[rows, :columns],
            self.present[rows, :columns],
            self.mask[rows, :columns],
            self.starts[rows],
            self.ids[rows, :width],
            self.lengths[rows],
            encoder_ids,
            encoder_mask,
        )

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        if self.encoder_ids is None or self.encoder_mask is None:
            return {"input_ids": self.ids}
        return {"input_ids": self.encoder_ids, "attention_mask": self.encoder_mask.long(), "decoder_input_ids": self.ids}

    def places(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every output that predicts an answer token, row by row, each (M,)."""
        rows, tokens = self.present.nonzero(as_tuple=True)
        return rows, self.starts[rows] + tokens

    def real(self) -> Tensor:
        """(B, S) True where `ids` are no padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @cached_property
    def line(self) -> Line:
        """The rows of a causal model without their padding; what rows begin with alike, a prompt say, stands there once."""
        return as_line(self.ids, self.real(), share=True)


def gather_answers(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    config: Any,
    *,
    response_masks: Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> Answers:
    """Pad prompts and answers into `Answers`; `config` is the model's. Raises ValueError for an empty prompt."""
    empty = [row for row, query in enumerate(queries) if not query]
    if empty:
        raise ValueError(f"queries {empty} are empty; the first answer token needs a token before it")
    targets, present = right_pad(responses, PADDING_ID, max(1, max(map(len, responses))))
    mask = present
    if response_masks is not None:
        wrong = [row for row, (response, flags) in enumerate(zip(responses, response_masks, strict=True)) if len(response) != len(flags)]
        if wrong:
            raise ValueError(f"response_masks of rows {wrong} differ in length from their responses")
        mask = present & right_pad(response_masks, 0, targets.shape[1])[0].bool()
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None
    if config.is_encoder_decoder:
        start = decoder_start(config)
        ids, real = right_pad([[start, *response] for response in responses], PADDING_ID)
        encoder_ids, encoder_mask = (part.to(device) for part in right_pad(queries, PADDING_ID))
        starts = torch.zeros(len(ids), dtype=torch.long)
    else:
        ids, real = right_pad([[*query, *response] for query, response in zip(queries, responses, strict=True)], PADDING_ID)
        starts = torch.tensor([len(query) - 1 for query in queries])
    return Answers(
        targets=targets.to(device),
        present=present.to(device),
        mask=mask.to(device),
        starts=starts.to(device),
        ids=ids.to(device),
        lengths=real.sum(1).to(device),
        encoder_ids=encoder_ids,
        encoder_mask=encoder_mask,
    )


class Output(NamedTuple):
    """At chosen places: hidden states (N, D) and logits (N, V); and the cache where one was asked for."""

    states: Tensor
    logits: Tensor
    cache: Any = None


class Trunk:
    """A causal transformer without output layer over a batch of answers: without padding where it can read a line of texts."""

    def __init__(self, module: nn.Module, *, pack: bool = True) -> None:
        self.module = module
        self.packs = pack and can_pack(module)
        self.last = LastFeedForward.find(module) if self.packs else None

    def at_answers(self, answers: Answers, lower: LowerLayers | None = None, entering: Tensor | None = None) -> Tensor:
        """Last hidden states (M, D) where an answer token is predicted; they start above `lower` from `entering` (real tokens, D)."""
        real, places = answers.real(), answers.places()
        if self.packs:
            line = answers.line
            wanted = line.places[places]
            with nullcontext() if self.last is None else self.last.at(wanted):
                states = self._read(answers, line, lower, None if entering is None else entering[line.kept[real]][None])
            return states[0].index_select(0, wanted)
        padded = None
        if entering is not None:
            padded = entering.new_zeros((*answers.ids.shape, entering.shape[-1]))
            padded[real] = entering
        return self._read(answers, None, lower, padded)[places]

    def below(self, answers: Answers, lower: LowerLayers) -> Tensor:
        """What `lower` hands on for every real token (N, D), row after row."""
        if not self.packs:
            return lower.states(**answers.inputs())[answers.real()]
        line = answers.line
        with packed_line(self.module, line.lengths, line.shared):
            states = lower.states(input_ids=line.ids, position_ids=line.positions())[0]
        return states.index_select(0, line.places[answers.real()])

    def _read(self, answers: Answers, line: Line | None, lower: LowerLayers | None, entering: Tensor | None) -> Tensor:
        with nullcontext() if lower is None or entering is None else lower.replaced(entering):
            if line is not None:
                return line.states(self.module)[None]
            states: Tensor = self.module(**answers.inputs(), use_cache=False).last_hidden_state
            return states


class Forward:
    """Runs a text generator and applies its output layer at chosen places only, where the model allows it."""

    def __init__(self, model: Any, *, pack: bool = True) -> None:
        """`model`: a transformers model, perhaps wrapped by peft. `pack`: read batches without padding, where the model can."""
        self.model = without_adapters(model)
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)
        parts = take_apart(self.model)
        self.head = parts.head if parts is not None else None
        self.trunk = Trunk(parts.trunk, pack=pack) if parts is not None else None
        self.static: StaticDecoding | None = None
        """How sampling runs its steps, where not as plain forwards."""

    def __call__(self, **inputs: Any) -> Output:
        """Output at every row's last column. Inputs are those of the model's forward."""
        inputs.setdefault("use_cache", False)
        if self.trunk is not None and self.head is not None:
            result = self.trunk.module(**inputs)
            states = result.last_hidden_state[:, -1]
            return Output(states, self.head(states), result.past_key_values)
        result = self.model(**inputs, output_hidden_states=True)
        return Output(self._last_states(result)[:, -1], result.logits[:, -1], result.past_key_values)

    def at_answers(self, answers: Answers, lower: LowerLayers | None = None, entering: Tensor | None = None) -> Output:
        """Output where an answer token is predicted; above `lower` from `entering`, as in `Trunk.at_answers`."""
        if self.trunk is not None and self.head is not None:
            states = self.trunk.at_answers(answers, lower, entering)
            return Output(states, self.head(states))
        result = self.model(**answers.inputs(), use_cache=False, output_hidden_states=True)
        places = answers.places()
        return Output(self._last_states(result)[places], result.logits[places])

    def _last_states(self, result: Any) -> Tensor:
        states: Tensor = (result.decoder_hidden_states if self.encoder_decoder else result.hidden_states)[-1]
        return states
