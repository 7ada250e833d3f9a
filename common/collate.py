"""Token ids of several rows -> tensors: padding, masks and labels, made together and never guessed from ids afterwards.

Shapes: B rows, S tokens of the longest row. Masks are True (1) on real tokens; labels are -100 on prompts and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.tokenization import Encoded

IGNORED = -100
"""The label of positions without a loss, as transformers and torch have it."""


def right_pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (B, S) padded at the end to the longest row, or to `length`, and their mask (B, S), True on real tokens."""
    return _pad(rows, pad_id, length, left=False)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (B, S) padded at the start, for generation, and their mask (B, S), True on real tokens."""
    return _pad(rows, pad_id, length, left=True)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None, *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=0)
    size = longest if length is None else length
    assert longest <= size, f"a row of {longest} tokens does not fit into {size}"
    ids = torch.full((len(rows), size), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), size), dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(size - len(row), size) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = True
    return ids, mask


def sft_batch(rows: Sequence[Encoded], pad_id: int, pad_to: int | None = None, is_encoder_decoder: bool = False) -> dict[str, Tensor]:
    """A batch for a language model: `input_ids`, `attention_mask` and `labels` (B, S).

    Labels are the answer's tokens, EOS among them. For encoder-decoders the prompt is the encoder's input and `labels` are the answer
    alone (B, T), from which the model makes the decoder's input. `pad_to`: pad every row to this length.
    """
    if is_encoder_decoder:
        ids, mask = right_pad([row.prompt_ids for row in rows], pad_id, pad_to)
        labels, _ = right_pad([row.answer_ids for row in rows], IGNORED, pad_to)
    else:
        ids, mask = right_pad([row.input_ids for row in rows], pad_id, pad_to)
        labels, _ = right_pad([_labels(row) for row in rows], IGNORED, pad_to)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def packed_batch(rows: Sequence[Encoded], pad_id: int, capacity: int, pad_to: int | None = None) -> dict[str, Tensor]:
    """Rows one after another in as few lines of at most `capacity` tokens as their order allows: `input_ids`, `position_ids`, `labels`.

    Positions start again at 0 with every row and with the padding at a line's end. Without an attention mask transformers reads
    these starts as the borders of rows that must not see each other (`masking_utils.find_packed_sequence_indices`), for every causal
    model that passes positions on to its mask, local and sliding attention included. The first label of a row is never a target:
    a row begins with its prompt, whose labels are -100, so that the last token of the row before predicts nothing.
    """
    lines = in_lines(rows, capacity)
    ids, mask = right_pad([[token for row in line for token in row.input_ids] for line in lines], pad_id, pad_to)
    labels, _ = right_pad([[label for row in line for label in _labels(row)] for line in lines], IGNORED, pad_to)
    positions = torch.zeros_like(ids)
    for number, line in enumerate(lines):
        parts = [*(row.length for row in line), int((~mask[number]).sum())]
        positions[number] = torch.cat([torch.arange(part) for part in parts])
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def in_lines(rows: Sequence[Encoded], capacity: int) -> list[list[Encoded]]:
    """Rows, in their order, in as few lines of at most `capacity` tokens as that allows."""
    lines: list[list[Encoded]] = []
    room = 0
    for row in rows:
        if not lines or row.length > room:
            assert row.length <= capacity, f"a row of {row.length} tokens does not fit into {capacity}"
            lines.append([])
            room = capacity
        lines[-1].append(row)
        room -= row.length
    return lines


@torch.no_grad()
def supports_packing(model: Any) -> bool:
    """Whether a causal model keeps packed rows apart, found out by packing two short rows and looking at the second one's logits.

    A model that takes no positions, or does not use them for its mask, would let rows see each other without a word.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    first, second = ([number % vocab_size for number in numbers] for numbers in ((5, 3, 2), (4, 1, 6, 3)))
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        packed = packed_batch([Encoded(first[:1], first[1:]), Encoded(second[:1], second[1:])], pad_id=0, capacity=7)
        together = model(input_ids=packed["input_ids"].to(device), position_ids=packed["position_ids"].to(device), use_cache=False).logits
        alone = model(input_ids=torch.tensor([second], device=device), use_cache=False).logits
    except TypeError:  # no position_ids among its arguments
        return False
    finally:
        model.train(was_training)
    return torch.allclose(together[0, len(first) :].float(), alone[0].float(), rtol=1e-2, atol=1e-3 * float(alone.abs().max()))


def _labels(row: Encoded) -> list[int]:
    return [IGNORED] * len(row.prompt_ids) + row.answer_ids
