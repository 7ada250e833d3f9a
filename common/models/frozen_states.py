"""The states that a readout reads of a transformer that does not train, computed once and read from disk from then on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.checkpoint import tokenizer_fingerprint
from common.chunks import CHUNK_TOKENS
from common.models.answers import CachedAnswer, CachedStates
from common.models.backbone import RewardInput, collate_rewards, hidden_size
from common.models.modes import evaluating
from common.models.prepacked import prepacked
from common.models.reward import RewardModel
from common.notes import say
from common.progress import Progress
from common.state_cache import StateCache, gib, wider
from common.state_facts import TORCH_DTYPES, StateDtype, StateFacts, code_digest, row_digests, weights_digest

FORWARD_CHUNKS = 2
"""Tokens of one forward, in chunks of that size; a line or the parts of like length are cut from it."""


def state_facts(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, dtype: StateDtype, autocast: torch.dtype | None = None
) -> StateFacts:
    """What the states that a model's readout reads depend on."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in {"_name_or_path", "transformers_version"}}
    return StateFacts(
        weights=weights_digest(model.backbone),
        config=json.dumps(config, sort_keys=True, default=str),
        code=code_digest(model.backbone),
        tokenizer=tokenizer_fingerprint(tokenizer),
        part=model.needs.part,
        token=model.needs.token,
        layers=model.needs.layers,
        hidden_size=hidden_size(model.config),
        computed_in=str(autocast or next(model.backbone.parameters()).dtype).removeprefix("torch."),
        dtype=dtype,
    )


def cached_answers(
    model: RewardModel,
    answers: Sequence[RewardInput],
    root: Path,
    facts: StateFacts,
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    show_progress: bool = True,
) -> list[CachedAnswer]:
    """Answers with the states that the cache below `root` has, once those that it lacks are computed and written.

    Their size is said before. Raises UserError where they do not fit onto the disk.
    """
    digests = row_digests(answers)
    cache = wider(root, facts, digests)
    tokens = np.array([1 if facts.token != "all" else len(answer.input_ids) for answer in answers], dtype=np.int64)

    def compute(places: Sequence[int]) -> list[Tensor]:
        batch = collate_rewards([answers[place] for place in places], pad_id).to(device)
        return model.state_rows(batch)

    missing, rows = cache.missing(digests), len(np.unique(digests))
    if len(missing) < rows:
        say(f"states of {rows - len(missing):,} answers are there already: {cache.folder}")
    if len(missing):
        size = cache.needed_bytes(int(tokens[missing].sum()))
        cache.check_room(size)
        say(f"states of {len(missing):,} answers take {gib(size)} in {cache.folder}, which may be deleted at any time")
        if facts.token == "all":
            say(
                f"this readout reads every token: {gib(size // len(missing))} of an answer's {tokens[missing].mean():.0f} tokens are kept; "
                "readout.n_layers, cache_states: bfloat16 or a readout of one token take less"
            )
        model.to(device)
        lengths = np.array([answer.length for answer in answers])
        with evaluating(model), torch.inference_mode(), prepacked(model.backbone), _autocast(device, autocast):
            fill(cache, digests, lengths, compute, in_order=model.padding_free, device=device, show_progress=show_progress)
    states = CachedStates(cache.rows(digests), facts.layers)
    return [CachedAnswer(states, number, answer.length) for number, answer in enumerate(answers)]


def fill(
    cache: StateCache,
    digests: np.ndarray,
    lengths: np.ndarray,
    compute: Callable[[Sequence[int]], list[Tensor]],
    *,
    in_order: bool,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
) -> None:
    """Compute and write the rows that a cache lacks.

    digests, lengths    what each row goes by, and the tokens that a forward reads of it
    compute             places of rows -> their states (tokens, layers, D)
    in_order            False: rows of like length stand together, since they are padded
    """
    most = CHUNK_TOKENS["cpu" if torch.device(device).type == "cpu" else "cuda"] * FORWARD_CHUNKS
    dtype = TORCH_DTYPES[cache.facts.dtype]
    with cache.writing() as writer:
        missing = cache.missing(digests)
        order = missing if in_order else missing[np.argsort(lengths[missing], kind="stable")]
        progress = Progress(len(order), enabled=show_progress, label="states")
        done = 0
        for places in _chunks(order, lengths, most):
            rows = compute(places)
            writer.add(digests[places], [len(row) for row in rows], torch.cat(rows).to(dtype))
            done += len(places)
            progress.update(done, {})
        progress.close()


def _chunks(order: np.ndarray, lengths: np.ndarray, most: int) -> Iterator[list[int]]:
    """Consecutive rows of at most `most` padded tokens, or one row."""
    chunk: list[int] = []
    longest = 0
    for place in order.tolist():
        longest = max(longest, int(lengths[place]))
        if chunk and longest * (len(chunk) + 1) > most:
            yield chunk
            chunk, longest = [], int(lengths[place])
        chunk.append(place)
    if chunk:
        yield chunk


def _autocast(device: torch.device | str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)
