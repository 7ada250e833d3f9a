"""The states that a readout reads of a transformer that does not train, computed once and read from disk from then on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.cached_rows import CachedRows
from common.checkpoint import tokenizer_fingerprint
from common.chunks import CHUNK_TOKENS
from common.disk import amount
from common.models.answers import CachedAnswer, CachedStates
from common.models.backbone import RewardBatch, RewardInput, collate_rewards, hidden_size
from common.models.modes import evaluating
from common.models.prepacked import prepacked
from common.models.reward import RewardModel
from common.notes import say
from common.progress import Progress
from common.readout_settings import Token
from common.state_cache import StateCache, wider
from common.state_facts import TORCH_DTYPES, StateDtype, StateFacts, code_digest, row_digests
from common.training_state import weights_digest

FORWARD_CHUNKS = 2
"""Tokens of one forward, in chunks of that size; a line or the parts of like length are cut from it."""

_OF_NO_STATE = {"_name_or_path", "transformers_version", "architectures", "id2label", "label2id"}  # of a configuration


def state_facts(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, dtype: StateDtype, autocast: torch.dtype | None = None
) -> StateFacts:
    """What the states that a model's readout reads depend on."""
    return transformer_facts(
        model.backbone,
        tokenizer,
        dtype,
        autocast,
        part=model.needs.part,
        token=model.needs.token,
        layers=model.needs.layers,
        hidden_size=hidden_size(model.config),
    )


def transformer_facts(
    transformer: Any,
    tokenizer: PreTrainedTokenizerBase,
    dtype: StateDtype,
    autocast: torch.dtype | None,
    *,
    part: str,
    token: Token,
    layers: int,
    hidden_size: int,
    without: tuple[str, ...] = (),
) -> StateFacts:
    """What states of a transformer depend on. `without`: prefixes of the names of weights that they do not depend on."""
    config = {key: value for key, value in transformer.config.to_dict().items() if key not in _OF_NO_STATE}
    return StateFacts(
        weights=weights_digest({name: tensor for name, tensor in transformer.state_dict().items() if not name.startswith(without)}),
        config=json.dumps(config, sort_keys=True, default=str),
        code=code_digest(transformer),
        tokenizer=tokenizer_fingerprint(tokenizer),
        part=part,
        token=token,
        layers=layers,
        hidden_size=hidden_size,
        computed_in=str(autocast or next(transformer.parameters()).dtype).removeprefix("torch."),
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
    """Answers with the states that their readout reads, from the cache below `root`, as `cached_rows` gives them."""
    rows = cached_rows(
        model,
        model.state_rows,
        answers,
        root,
        facts,
        pad_id=pad_id,
        in_order=model.padding_free,
        reads="this readout reads every token",
        remedy="readout.n_layers, cache_states: bfloat16 or a readout of one token take less",
        device=device,
        autocast=autocast,
        show_progress=show_progress,
    )
    states = CachedStates(rows, facts.layers)
    return [CachedAnswer(states, number, answer.length) for number, answer in enumerate(answers)]


def cached_rows(
    model: nn.Module,
    compute: Callable[[RewardBatch], list[Tensor]],
    answers: Sequence[RewardInput],
    root: Path,
    facts: StateFacts,
    *,
    pad_id: int,
    in_order: bool,
    reads: str,
    remedy: str,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    show_progress: bool = True,
) -> CachedRows:
    """States of these answers from the cache below `root`, once those that it lacks are computed and written.

    compute        batch -> states (tokens, layers, D) of each of its rows, with `model` in eval mode
    in_order       as in `fill`
    reads, remedy  why every token is kept, where it is, and what would take less
    Their size is said before. Raises UserError where they do not fit onto the disk.
    """
    digests = row_digests(answers)
    cache = wider(root, facts, digests)
    tokens = np.array([1 if facts.token != "all" else len(answer.input_ids) for answer in answers], dtype=np.int64)

    def compute_rows(places: Sequence[int]) -> list[Tensor]:
        return compute(collate_rewards([answers[place] for place in places], pad_id).to(device))

    missing, rows = cache.missing(digests), len(np.unique(digests))
    if len(missing) < rows:
        say(f"states of {rows - len(missing):,} answers are there already: {cache.folder}")
    if len(missing):
        size = cache.needed_bytes(int(tokens[missing].sum()))
        cache.check_room(size)
        again = len(answers) - rows
        once = f"; equal texts are computed once ({again:,} of {len(answers):,} answers repeat another one)" if again else ""
        say(f"states of {len(missing):,} answers take {amount(size)} in {cache.folder}, which may be deleted at any time{once}")
        if facts.token == "all":
            say(f"{reads}: {amount(size // len(missing))} of an answer's {tokens[missing].mean():.0f} tokens are kept; {remedy}")
        model.to(device)
        lengths = np.array([answer.length for answer in answers])
        with evaluating(model), torch.inference_mode(), prepacked(model), _autocast(device, autocast):
            try:
                fill(cache, digests, lengths, compute_rows, in_order=in_order, device=device, show_progress=show_progress)
            except KeyboardInterrupt:
                kept = f"the states computed so far are kept in {cache.folder}"
                raise KeyboardInterrupt(f"{kept}; the same command (with --resume only if it had it) goes on from them") from None
    return cache.rows(digests)


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
        progress = Progress(len(order), enabled=show_progress, label="caching", unit="answer")
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
