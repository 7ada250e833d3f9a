"""Decoding steps in buffers that stay where they are, so that a GPU can replay a whole step as one CUDA graph.

A step of a small model is hundreds of kernels that each take less time to run than to launch. Here ids, positions, mask, keys and values
of a batch have fixed addresses and the place of the next token is counted on the device: a step captured once is launched as one. The
choice of the token stays outside. Rows whose answer ended stay in the batch, since a graph has one shape and a step's time hardly
depends on its rows. Elsewhere than on a GPU the same step runs without a graph, which is slower than the usual path; tests compare the two.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from common.collate import left_pad
from common.models.kinds import positions_of
from rlhf.ppo.answers import PADDING_ID, Forward, Output

COLUMNS = 64
"""Batches are as wide as a multiple of this many tokens, so that prompts of other lengths find their graph again."""
KEPT = 2
"""Steps that stay, each with keys and values of its batch: one for training, one for evaluation."""
WARM_UPS = 3
"""Runs before the capture, in which libraries set themselves up."""
TRIAL_TOKENS, TRIAL_COLUMNS = 320, 2048
"""At most; longer than GPT-Neo's local window of 256 on both sides of the text."""


class StaticStep:
    """Reads one more token of each of B rows: hidden states (B, D) and logits (B, V), which hold until the next call."""

    def __init__(self, forward: Forward, filled: Cache, batch: int, columns: int) -> None:
        """`filled`: a cache whose layers tell the shapes; `columns`: tokens of prompt and answer together."""
        embedding = forward.model.get_input_embeddings().weight
        self.forward = forward
        self.ids, self.positions = (torch.zeros((batch, 1), dtype=torch.long, device=embedding.device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.long, device=embedding.device)
        # The mask (B, 1, 1, columns) as the model's attention takes it: added to logits, or True on what is seen.
        eager = forward.model.config._attn_implementation == "eager"
        self.seen, self.hidden = (0.0, torch.finfo(embedding.dtype).min) if eager else (1.0, 0.0)
        mask_dtype = embedding.dtype if eager else torch.bool
        self.mask = torch.full((batch, 1, 1, columns), self.hidden, dtype=mask_dtype, device=embedding.device)
        self.cache = Cache(layers=[_layer(layer, batch, columns) for layer in filled.layers])
        self.output: Output | None = None
        self.graph = self._capture() if embedding.device.type == "cuda" else None

    def load(self, filled: Cache, rows: Tensor, mask: Tensor) -> None:
        """Begin after prompts, padded on the left: `filled` holds their keys and values, `rows` (B,) says in which of its rows.

        `mask` (B, S) is True on the prompts' tokens.
        """
        width = mask.shape[1]
        for own, layer in zip(self.cache.layers, filled.layers, strict=True):
            assert isinstance(own, StaticLayer) and isinstance(layer, DynamicLayer)
            for buffer, part in ((own.keys, layer.keys), (own.values, layer.values)):
                assert buffer is not None and part is not None
                buffer[:, :, :width] = part[rows]
                buffer[:, :, width:] = 0.0  # hidden, but a NaN from earlier would show
            own.cumulative_length.fill_(width)
        self.mask.fill_(self.hidden)
        self.mask[:, 0, 0, :width].masked_fill_(mask, self.seen)
        self.positions.copy_(mask.sum(1, keepdim=True))
        self.column.fill_(width)

    def __call__(self, tokens: Tensor) -> Output:
        """Output after one more token (B,) per row."""
        self.ids.copy_(tokens[:, None])
        if self.graph is None:
            return self._run()
        self.graph.replay()
        assert self.output is not None
        return self.output

    def _run(self) -> Output:
        self.mask.index_fill_(3, self.column, self.seen)
        output = self.forward(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        )
        self.positions.add_(1)
        self.column.add_(1)
        return output

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record `_run`; what the buffers hold is of no use afterwards."""
        with torch.cuda.device(self.ids.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loggers' threads may use the GPU meanwhile
                self.output = self._run()
        return graph


class StaticDecoding:
    """The steps of one causal model. A graph repeats the forward that was captured: what changes its code afterwards shows in no replay,
    but weights may change in place, and where they moved, steps are made anew."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.steps: dict[tuple[int, int], StaticStep] = {}
        """By (rows, columns), the one used longest ago first."""
        self._addresses: tuple[int, ...] = ()

    @classmethod
    @torch.no_grad()
    def find(cls, forward: Forward) -> StaticDecoding | None:
        """None where the model's usual steps give something else, or can be captured by no graph; tried on a text, not guessed."""
        if forward.encoder_decoder:
            return None
        positions = positions_of(forward.model.config) or TRIAL_COLUMNS
        weight = forward.model.get_input_embeddings().weight
        longest = min(positions, TRIAL_TOKENS) - 2  # and two tokens are written
        if longest < 2:
            return None
        text = [1 + token % (len(weight) - 1) for token in range(longest)]
        ids, mask = (part.to(weight.device) for part in left_pad([text, text[: longest // 2]], PADDING_ID))
        mask = mask.bool()
        inputs = {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0), "use_cache": True}
        try:
            output = forward(input_ids=ids, attention_mask=mask.long(), **inputs)
            if not isinstance(output.cache, Cache) or any(type(layer) is not DynamicLayer for layer in output.cache.layers):
                return None  # of a sliding window or recurrent states other things are kept
            step = StaticStep(forward, output.cache, len(ids), _columns(min(positions, TRIAL_COLUMNS)))
            step.load(output.cache, torch.arange(len(ids), device=ids.device), mask)
            for written in range(2):
                tokens, mask = ids[:, written - 2], torch.cat([mask, mask.new_ones((len(ids), 1))], 1)
                inputs = {"position_ids": mask.long().sum(1, keepdim=True) - 1, "use_cache": True, "past_key_values": output.cache}
                output = forward(input_ids=tokens[:, None], attention_mask=mask.long(), **inputs)
                if not _alike(step(tokens), output):
                    return None
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            return None
        return cls(forward)

    def begin(self, filled: Cache, rows: Tensor, mask: Tensor, room: int) -> StaticStep:
        """The step that goes on after prompts, for `room` tokens; the other arguments are those of `StaticStep.load`."""
        model = self.forward.model
        addresses = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
        if addresses != self._addresses:
            self.steps.clear()
            self._addresses = addresses
        batch, columns = len(rows), _columns(mask.shape[1] + room)
        step = self.steps.pop((batch, columns), None)
        if step is None:
            while len(self.steps) >= KEPT:
                del self.steps[next(iter(self.steps))]
            step = StaticStep(self.forward, filled, batch, columns)
        self.steps[batch, columns] = step
        step.load(filled, rows, mask)
        return step


def _columns(tokens: int) -> int:
    return -(-tokens // COLUMNS) * COLUMNS


def _layer(filled: Any, batch: int, columns: int) -> StaticLayer:
    """Room for `columns` tokens of keys and values like those of `filled`."""
    layer = StaticLayer(columns)
    layer.lazy_initialization(*(part[:1].expand(batch, -1, -1, -1) for part in (filled.keys, filled.values)))
    return layer


def _alike(first: Output, second: Output) -> bool:
    """Up to the rounding of sums in another order."""
    tolerance = 1e-4 if second.logits.dtype == torch.float32 else 2e-2
    return all(bool((one - other).norm() <= tolerance * other.norm()) for one, other in zip(first[:2], second[:2], strict=True))
