"""Prompts and answers as tensors, and one forward that looks at answer positions only.

Rows are padded on the right, so that causality alone hides padding; masks come from lengths, never from comparing ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.collate import right_pad
from common.models.backbone import decoder_start

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
        """(row, column) of every output that predicts an answer token, row by row, each (N,)."""
        rows, tokens = self.present.nonzero(as_tuple=True)
        return rows, self.starts[rows] + tokens


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


class Forward:
    """Runs a text generator and applies its output layer at chosen places only, where the model allows it."""

    def __init__(self, model: Any) -> None:
        """`model`: a transformers model, perhaps wrapped by peft."""
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)
        prefix = getattr(self.model, "base_model_prefix", "")
        self.trunk: nn.Module | None = None if self.encoder_decoder else getattr(self.model, prefix, None)
        self.head: nn.Module | None = self.model.get_output_embeddings()
        if self.trunk is not None and not self._splits():
            self.trunk = None

    def _splits(self) -> bool:
        """Whether the logits are the output layer of the last hidden states and nothing else (no cap, no scale)."""
        if self.head is None or self.trunk is None:
            return False
        weight = next(self.model.parameters())
        ids = torch.arange(1, 4, device=weight.device)[None]
        with torch.no_grad():
            whole = self.model(input_ids=ids, use_cache=False).logits
            split = self.head(self.trunk(input_ids=ids, use_cache=False).last_hidden_state)
        return torch.allclose(whole, split, rtol=1e-5, atol=1e-6)

    def __call__(self, places: tuple[Tensor, Tensor] | None = None, **inputs: Any) -> Output:
        """Output at `places` (rows, columns); None: at every row's last column. Inputs are those of the model's forward."""
        inputs.setdefault("use_cache", False)
        if self.trunk is not None and self.head is not None:
            result = self.trunk(**inputs)
            states = _pick(result.last_hidden_state, places)
            return Output(states, self.head(states), result.past_key_values)
        result = self.model(**inputs, output_hidden_states=True)
        hidden = (result.decoder_hidden_states if self.encoder_decoder else result.hidden_states)[-1]
        return Output(_pick(hidden, places), _pick(result.logits, places), result.past_key_values)


def critic_states(trunk: nn.Module, answers: Answers) -> Tensor:
    """Last hidden states (N, D) of a critic's own transformer at the answers' places."""
    return _pick(trunk(**answers.inputs(), use_cache=False).last_hidden_state, answers.places())


def _pick(tensor: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
    return tensor[:, -1] if places is None else tensor[places]
