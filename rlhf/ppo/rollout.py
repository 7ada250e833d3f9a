"""Answers sampled from the policy, with the log-probabilities and values met on the way.

Prompts are padded on the left (an encoder's on the right), keys and values are cached, and rows whose answer ended leave the batch.
Log-probabilities are those of the unfiltered distribution at the sampling temperature, so that they equal what a full forward
recomputes: to 1e-5 in float32. In bfloat16 and float16 cached and full passes differ by more (1e-2), so there the trainer recomputes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.collate import left_pad, right_pad
from common.decoding import check_positions, eos_ids, holds_stop, read_answers
from common.models.backbone import decoder_start
from common.models.kv_cache import make_room
from common.models.modes import evaluating
from common.models.prepacked import prepacked
from common.schema import GenerateParams
from common.token_choice import TokenChooser
from rlhf.ppo.answers import PADDING_ID, Forward, Output
from rlhf.ppo.losses import token_stats
from rlhf.ppo.models import ModelWithValueHead
from rlhf.ppo.static_decoding import StaticStep

COMPACT_BELOW = 0.8
"""Rows that ended are dropped once so few are left; each drop copies the cache."""


@dataclass(frozen=True)
class Rollout:
    """What the policy answered. B rows, T tokens of the longest answer."""

    queries: list[list[int]]
    responses: list[list[int]]
    """Tokens as sampled, EOS included, nothing after it."""
    texts: list[str]
    """Answers as a reward model sees them: without EOS, stop string and leading space."""
    ended: list[bool]
    """By EOS or a stop string; False for an answer cut at `max_new_tokens`."""
    logprobs: Tensor
    """(B, T) of the sampled tokens, 0 after the end."""
    values: Tensor | None
    """(B, T) of the value head, 0 after the end; None where the model has none."""
    temperature: float = 1.0
    """What the logits were divided by."""

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, rows: Sequence[int]) -> Rollout:
        """Some rows, in this order."""
        return Rollout(
            queries=[self.queries[row] for row in rows],
            responses=[self.responses[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            ended=[self.ended[row] for row in rows],
            logprobs=self.logprobs[list(rows)],
            values=None if self.values is None else self.values[list(rows)],
            temperature=self.temperature,
        )


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """The rows of several rollouts of one model, one behind the other."""
    width = max(rollout.logprobs.shape[1] for rollout in rollouts)

    def wide(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return Rollout(
        queries=[query for rollout in rollouts for query in rollout.queries],
        responses=[response for rollout in rollouts for response in rollout.responses],
        texts=[text for rollout in rollouts for text in rollout.texts],
        ended=[ended for rollout in rollouts for ended in rollout.ended],
        logprobs=wide(rollout.logprobs for rollout in rollouts),
        values=None if any(r.values is None for r in rollouts) else wide(r.values for r in rollouts if r.values is not None),
        temperature=rollouts[0].temperature,
    )


def collect_rollout(
    model: ModelWithValueHead | Any,
    tokenizer: Any,
    queries: Sequence[Sequence[int]],
    params: GenerateParams,
    *,
    seed: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    pad_to: int | None = None,
    batch_size: int | None = None,
    use_cache: bool = True,
    forward: Forward | None = None,
) -> Rollout:
    """Answer tokenized prompts.

    `rows`: numbers that make each prompt's noise its own (default 0, 1, …); `step` separates repeated sampling of the same rows.
    `pad_to`: pad prompts to this many tokens; `batch_size`: prompts decoded together (default: all). `forward`: one made before.
    Raises UserError, before anything is decoded, where prompt and answer may exceed the model's positions.
    """
    policy = model.pretrained_model if isinstance(model, ModelWithValueHead) else model
    head = model.v_head if isinstance(model, ModelWithValueHead) else None
    prompts = [list(query) for query in queries]
    numbers = torch.tensor(list(range(len(prompts))) if rows is None else list(rows), dtype=torch.long)
    check_positions(policy.config, max(map(len, prompts), default=0), params.max_new_tokens)
    end_ids = eos_ids(params, tokenizer, policy)
    decoder = _Decoder(
        forward or Forward(policy, pack=False),
        head,
        tokenizer,
        TokenChooser(params, end_ids, seed=seed, step=step),
        params,
        end_ids,
        use_cache,
    )
    tokens = torch.full((len(prompts), params.max_new_tokens), PADDING_ID, dtype=torch.long)
    logprobs, values = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    order = list(range(len(prompts)))
    if batch_size is not None and batch_size < len(prompts):
        order.sort(key=lambda row: len(prompts[row]))  # prompts of like length together: less padding
    with evaluating(model), torch.no_grad(), prepacked(policy):
        for begin in range(0, len(order), batch_size or max(1, len(order))):
            part = torch.tensor(order[begin : begin + (batch_size or len(order))])
            written = decoder.run([prompts[row] for row in part.tolist()], numbers[part], pad_to)
            for whole, of_part in zip((tokens, logprobs, values, lengths, ended), written, strict=True):
                whole[part] = of_part.cpu()
    width = max([1, *lengths.tolist()])
    responses = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        queries=prompts,
        responses=responses,
        texts=[text for text, _ in read_answers(tokenizer, responses, params.stop_strings)],
        ended=ended.tolist(),
        logprobs=logprobs[:, :width],
        values=values[:, :width] if head is not None else None,
        temperature=params.temperature,
    )


class _Decoder:
    """The decode loop of one batch of prompts."""

    def __init__(
        self,
        forward: Forward,
        head: nn.Module | None,
        tokenizer: Any,
        chooser: TokenChooser,
        params: GenerateParams,
        end_ids: list[int],
        use_cache: bool,
    ) -> None:
        self.forward, self.head, self.tokenizer, self.chooser, self.params = forward, head, tokenizer, chooser, params
        self.use_cache = use_cache
        self.device = next(forward.model.parameters()).device
        self.end_ids = torch.tensor(end_ids, device=self.device)

    def run(self, queries: list[list[int]], rows: Tensor, pad_to: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and values (B, max_new_tokens), answer lengths (B,) and whether they ended (B,)."""
        batch, steps = len(queries), self.params.max_new_tokens
        text = _Text(self.forward, queries, pad_to, self.device, self.use_cache, steps)
        tokens = torch.full((batch, steps), PADDING_ID, dtype=torch.long, device=self.device)
        logprobs = torch.zeros((batch, steps), device=self.device)
        values = torch.zeros((batch, steps), device=self.device)
        lengths = torch.full((batch,), steps, dtype=torch.long, device=self.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=self.device)
        places = torch.arange(batch, device=self.device)  # the output row of each row still in the batch
        rows = rows.to(self.device)
        alive = torch.ones(batch, dtype=torch.bool, device=self.device)
        for position in range(steps):
            states, logits = text.next()
            chosen = self.chooser.choose(logits, rows[places], position, text.ids, text.mask)
            tokens[places, position] = torch.where(alive, chosen, PADDING_ID)
            logprobs[places, position] = torch.where(alive, token_stats(logits, chosen, self.params.temperature).logprobs, 0.0)
            if self.head is not None:
                values[places, position] = torch.where(alive, self.head(states), 0.0)
            done = alive & (torch.isin(chosen, self.end_ids) | self._stopped(tokens, places, position))
            ended[places[done]] = True
            lengths[places[done]] = position + 1
            alive &= ~done
            left = int(alive.sum())
            if left == 0 or position == steps - 1:
                break
            text.append(chosen)
            if left <= COMPACT_BELOW * len(places) and text.step is None:
                text.keep(alive)
                places, alive = places[alive], alive[alive]
        return tokens, logprobs, values, lengths, ended

    def _stopped(self, tokens: Tensor, places: Tensor, position: int) -> Tensor:
        """(B,) True where the answer so far holds a stop string."""
        if not self.params.stop_strings:
            return torch.zeros(len(places), dtype=torch.bool, device=self.device)
        stopped = holds_stop(self.tokenizer, tokens[places, : position + 1], self.params.stop_strings)
        return torch.tensor(stopped, device=self.device)


class _Text:
    """Prompts and what was written to them, with the model's cache: gives the output at the last column, takes the next tokens."""

    def __init__(
        self, forward: Forward, queries: list[list[int]], pad_to: int | None, device: torch.device, use_cache: bool, room: int
    ) -> None:
        """`room`: tokens that may be written."""
        self.forward, self.use_cache, self.room = forward, use_cache, room
        self.cache: Any = None
        self.step: StaticStep | None = None
        self.encoded: Any = None
        self.encoder_mask: Tensor | None = None
        model = forward.model
        self.distinct, self.shared = _distinct(queries, device)
        if forward.encoder_decoder:
            encoder_ids, encoder_mask = (part.to(device) for part in right_pad(queries, PADDING_ID, pad_to))
            self.encoder_mask = encoder_mask.long()
            encoded = model.get_encoder()(input_ids=encoder_ids[self.distinct], attention_mask=self.encoder_mask[self.distinct])
            self.encoded = type(encoded)(last_hidden_state=encoded.last_hidden_state[self.shared])
            queries = [[decoder_start(model.config)] for _ in queries]
            pad_to = None
        ids, mask = left_pad(queries, PADDING_ID, pad_to)
        self.ids, self.mask = ids.to(device), mask.bool().to(device)
        if self.encoded is not None:
            self.mask[:] = False  # the start token is no text
        self.positions = _takes_positions(forward)

    def next(self) -> tuple[Tensor, Tensor]:
        """Hidden states (B, D) and logits (B, V) after the text so far."""
        if self.use_cache and self.cache is None:  # the prompts: those that are alike are read once
            output = self._read(self.distinct, slice(None))
            self.cache = output.cache
            if self.forward.static is not None:
                self.step = self.forward.static.begin(self.cache, self.shared, self.mask, self.room)
                self.cache = self.step.cache
                return output.states[self.shared], output.logits[self.shared]
            if len(self.distinct) < len(self.ids):
                self.cache.batch_select_indices(self.shared)
            make_room(self.cache, self.room)
            return output.states[self.shared], output.logits[self.shared]
        if self.step is not None:
            output = self.step(self.ids[:, -1])
            return output.states, output.logits
        output = self._read(slice(None), slice(-1, None) if self.use_cache else slice(None))
        return output.states, output.logits

    def _read(self, rows: Tensor | slice, new: slice) -> Output:
        """A forward of the `new` columns of some rows."""
        inputs: dict[str, Any] = {"use_cache": self.use_cache, "past_key_values": self.cache}
        if self.encoded is not None and self.encoder_mask is not None:
            encoded = type(self.encoded)(last_hidden_state=self.encoded.last_hidden_state[rows])
            return self.forward(
                **inputs, encoder_outputs=encoded, attention_mask=self.encoder_mask[rows], decoder_input_ids=self.ids[rows, new]
            )
        mask = self.mask[rows].long()
        if self.positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, new]
        return self.forward(**inputs, input_ids=self.ids[rows, new], attention_mask=mask)

    def append(self, tokens: Tensor) -> None:
        """One more token (B,) per row."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None], dtype=torch.bool)], 1)

    def keep(self, rows: Tensor) -> None:
        """Only the rows (B,) that are True go on."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows.nonzero().squeeze(1))
        if self.encoded is not None and self.encoder_mask is not None:
            self.encoded = type(self.encoded)(last_hidden_state=self.encoded.last_hidden_state[rows])
            self.encoder_mask = self.encoder_mask[rows]


def _distinct(queries: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The first row of each different prompt (P,), and for every row which of those it is (B,)."""
    numbers: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    shared: list[int] = []
    for row, query in enumerate(queries):
        number = numbers.setdefault(tuple(query), len(numbers))
        if number == len(first):
            first.append(row)
        shared.append(number)
    return torch.tensor(first, device=device), torch.tensor(shared, device=device)


def _takes_positions(forward: Forward) -> bool:
    module = forward.trunk.module if forward.trunk is not None else forward.model
    parameters = inspect.signature(module.forward).parameters
    return "position_ids" in parameters
