"""What `--dry_run` says: what a run would read, train, take and write, from figures that were measured in memory. Nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from common.config import resolved_dict
from common.disk import amount, nearest
from common.errors import UserError
from common.model_source import ModelSource, positions_in
from common.progress import duration
from common.scratch import copied

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn

    from common.tokenization import Encoder, TextLengths


class Cost(NamedTuple):
    """Seconds of something that is made of `tokens` tokens."""

    tokens: int
    seconds: float


def seconds_of(tokens: Iterable[int], longest: Cost, typical: Cost) -> float:
    """Seconds of several batches of so many tokens each: on the line through two that were measured, neither falling nor below 0."""
    per_token = (longest.seconds - typical.seconds) / (longest.tokens - typical.tokens) if longest.tokens > typical.tokens else 0.0
    per_token = min(max(0.0, per_token), typical.seconds / max(1, typical.tokens))
    base = typical.seconds - per_token * typical.tokens
    return sum(base + per_token * count for count in tokens)


@dataclass(frozen=True)
class Forecast:
    """What a run would take, measured or counted.

    measured: what was, in words. steps_seconds, validations_seconds: of all of them. memory_gib: at the peak. checkpoint_bytes: of one.
    """

    device: str
    measured: str
    steps: str
    steps_seconds: float
    validations: int
    validations_seconds: float
    memory_gib: float
    checkpoint_bytes: int


def report(
    config: BaseModel,
    *,
    encoder: Encoder,
    rows: Mapping[str, int],
    fits: Sequence[str],
    parameters: Iterable[nn.Parameter],
    forecast: Forecast,
    root: Path,
    keep_last: int,
    keep_best: int,
    notes: Sequence[str] = (),
) -> None:
    """Print all of it. Raises UserError where the run could not keep its checkpoints in `root`, the folder of runs.

    rows: per split, those that can be used. fits: what was checked of the models. notes: what else the figures depend on.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    at_once = keep_last + keep_best + 1
    needed = at_once * forecast.checkpoint_bytes
    folder = nearest(root)
    free = shutil.disk_usage(folder).free
    lines = [
        "config:",
        *(f"  {line}" for line in yaml.safe_dump(resolved_dict(config), sort_keys=False, allow_unicode=True, width=130).splitlines()),
        f"data: {', '.join(f'{count:,} {split}' for split, count in rows.items())} rows",
        *(f"  {line}" for split, lengths in encoder.lengths.items() for line in length_lines(split, lengths)),
        f"parameters: {total:,}, of which {trained:,} train and {total - trained:,} are frozen; on {forecast.device}",
        *(f"models: {line}" for line in fits),
        f"steps: {forecast.steps}, {counted(forecast.validations, 'validation')}",
        f"measured: {forecast.measured}",
        f"time: about {duration(forecast.steps_seconds + forecast.validations_seconds)}, steps {duration(forecast.steps_seconds)} and "
        f"validations {duration(forecast.validations_seconds)}; loading and saving not counted",
        f"memory: {forecast.memory_gib:.2f} GiB at the peak",
        f"disk: {amount(forecast.checkpoint_bytes)} a checkpoint, {amount(needed)} for {at_once} at once (keep_last {keep_last} + "
        f"keep_best {keep_best} + the one being written); {amount(free)} free in {folder}",
        *notes,
    ]
    print("\n".join(lines), flush=True)
    if problems := disk_problems(folder, root, needed, free):
        raise UserError(*problems)
    print("nothing was written; the run can start")


def length_lines(split: str, lengths: Mapping[str, TextLengths]) -> list[str]:
    """How long the texts of a split are before anything is cut, and how much is."""
    lines = []
    for name, found in lengths.items():
        if len(found.tokens):
            ordered = copied(found.tokens, np.int32)
            ordered.sort()
            marks = [ordered[0], ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]]
            cut = f"{found.cut:,} of {len(ordered):,} cut ({found.cut_tokens:,} tokens)" if found.cut else "none cut"
            lines.append(f"{split} {name}s: {' / '.join(f'{mark:,}' for mark in marks)} tokens (min / median / 95 % / max), {cut}")
    return lines


def disk_problems(folder: Path, root: Path, needed: int, free: int) -> list[str]:
    """What is wrong with the place of the runs; `folder`: the part of `root` that is there."""
    problems = []
    if not os.access(folder, os.W_OK):
        problems.append(f"{root}: {folder} cannot be written")
    if needed > free:
        problems.append(f"{root}: checkpoints need {amount(needed)}, {amount(free)} are free; make room, or lower keep_last or keep_best")
    return problems


def model_bytes(model: nn.Module, tokenizer: Any) -> int:
    """Bytes of the files of a model directory: weights once each, however many names they have, and the tokenizer."""
    weights: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sum(weights.values()) + (len(backend.to_str(pretty=True).encode()) if backend is not None else 0)


def counted(count: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def start_line(name: str | None, config: Any, tokenizer: Any, max_length: int, prompt_format: str) -> str:
    """That the model to start from (None: a fresh one) fits its tokenizer and the settings; it was checked when it was loaded."""
    positions = positions_in(config.to_dict())
    return (
        f"{name or f'a fresh {config.model_type}'} fits: tokenizer of {len(tokenizer):,} entries, embeddings for "
        f"{config.get_text_config().vocab_size:,}; max_length {max_length:,}, {f'{positions:,}' if positions else 'unlimited'} positions; "
        f"prompt format {prompt_format}"
    )


def judge_line(policy: ModelSource, judge: ModelSource, prompt_format: str) -> str:
    """That a reward model fits the policy, as `check_joinable` found."""
    known = policy.manifest is not None and judge.manifest is not None
    same = known and policy.manifest.vocabulary_fingerprint == judge.manifest.vocabulary_fingerprint  # type: ignore[union-attr]
    reads = "the policy's vocabulary" if same else "a vocabulary of its own, so it reads answers as text"
    trained = (
        f"prompt format {judge.prompt_format}, as the policy" if judge.prompt_format else f"an unknown prompt format ({prompt_format})"
    )
    return f"{judge.name} fits as reward model: {trained}; {reads}"
