"""What predicts the answer tokens of a batch, computed with as little beside it as the model allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.chunks import length_chunks
from common.collate import IGNORED
from common.models.lower_layers import LowerLayers, starting_above
from common.models.packed import as_line, can_pack
from common.models.parts import take_apart, without_adapters


class Predictions(NamedTuple):
    """Of M answer tokens."""

    states: Tensor
    """(M, D) hidden states that predict them, for the reader's `head`."""
    targets: Tensor
    """(M,) the tokens."""


class AnswerReader:
    """Runs a model on batches of prompts and answers: without padding, and with no more of the output layer than answers need.

    padding-free    a causal model that can read rows one behind the other does
    otherwise       rows of like length share a forward, so that little of it is padding

    Both change results by no more than rounding. `padding_free`: False runs each batch as it is.
    """

    def __init__(self, model: nn.Module | Any, *, padding_free: bool = True) -> None:
        self.model = model
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.vocab = int(model.config.get_text_config().vocab_size)
        self.padding_free = padding_free
        self.parts = take_apart(model)
        self.packs = padding_free and self.parts is not None and can_pack(self.parts.trunk)
        self.lower: LowerLayers | None = None
        """Layers that do not train, above which batches start that have the states `entering` there."""

    @property
    def trunk(self) -> nn.Module | Any:
        """The transformer without its output layer."""
        return self.parts.trunk if self.parts is not None else without_adapters(self.model).base_model

    def head(self, states: Tensor) -> Tensor:
        """Logits (M, V) of what a prediction holds."""
        return states if self.parts is None else self.parts.head(states)

    def __call__(self, batch: dict[str, Any]) -> Iterator[Predictions]:
        """What predicts the labels (B, S) of a batch, forward by forward."""
        if self.packs:
            yield self._in_line(batch)
        elif self.padding_free and "attention_mask" in batch:
            yield from map(self._in_rows, rows_of_like_length(batch, self.is_encoder_decoder))
        else:
            yield self._in_rows(batch)

    def _in_line(self, batch: dict[str, Any]) -> Predictions:
        assert self.parts is not None
        line = as_line(batch["input_ids"], batch["attention_mask"].bool())
        predicts, targets = self._targets(batch["labels"])
        with starting_above(self.lower, batch["entering"][line.kept][None] if "entering" in batch else None):
            states = line.states(self.parts.trunk)
        return Predictions(states.index_select(0, line.places[predicts]), targets)

    def _in_rows(self, batch: dict[str, Any]) -> Predictions:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        predicts, targets = self._targets(batch["labels"])
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        with starting_above(self.lower, batch.get("entering")):
            if self.parts is not None:
                return Predictions(self.parts.trunk(**inputs, use_cache=False).last_hidden_state[predicts], targets)
            return Predictions(self.model(**inputs, use_cache=False).logits[predicts], targets)

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Places (B, S) whose output predicts a label, and these labels (M,).

        A causal model's output at t predicts token t + 1; a decoder's predicts token t, since its input was shifted already.
        """
        expected = labels if self.is_encoder_decoder else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        predicts = expected != IGNORED
        return predicts, expected[predicts]


def rows_of_like_length(batch: dict[str, Any], is_encoder_decoder: bool = False) -> list[dict[str, Any]]:
    """A right-padded batch in parts of which each is cut to its own longest row."""
    reads = batch["attention_mask"].sum(1)
    writes = (batch["labels"] != IGNORED).sum(1) if is_encoder_decoder else torch.zeros_like(reads)
    parts = []
    for rows in length_chunks(torch.stack([reads, writes], 1)):
        width = int(reads[rows].max())
        part = {name: batch[name][rows, :width] for name in ("input_ids", "attention_mask", "entering") if name in batch}
        part["labels"] = batch["labels"][rows, : max(1, int(writes[rows].max())) if is_encoder_decoder else width]
        parts.append(part)
    return parts
