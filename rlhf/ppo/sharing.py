"""How the processes of a training divide a batch that all of them know: each its share of the work, and every result known to all again.

A row keeps its number in the whole batch, and with it its noise, whichever process answers it; so the numbers are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.batching import shares
from common.errors import UserError
from common.launch.runtime import Runtime
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rollout import Rollout, joined
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.function import AnswerError
from rlhf.reward_pipelines.part import RewardResult


def share(weights: Tensor, runtime: Runtime) -> Tensor:
    """The numbers of this process among those of `weights` (N,), a tensor on their device; alone, all of them."""
    if runtime.world_size == 1:
        return torch.arange(len(weights), device=weights.device)
    return torch.tensor(shares(weights.tolist(), runtime.world_size)[runtime.rank], dtype=torch.long, device=weights.device)


def shared_rows(lengths: Sequence[int], group: int, runtime: Runtime) -> list[int]:
    """The rows of this process, whose texts have these lengths; `group` rows that follow each other stay together."""
    groups = [sum(lengths[begin : begin + group]) for begin in range(0, len(lengths), group)]
    rows = (range(number * group, (number + 1) * group) for number in shares(groups, runtime.world_size)[runtime.rank])
    return [row for own in rows for row in own]


def roll_out(
    runtime: Runtime, queries: Sequence[Sequence[int]], collect: Callable[[list[Sequence[int]], list[int]], Rollout], group: int = 1
) -> Rollout:
    """Answers to all queries, the same in every process: each answers prompts of like length in all.

    `collect(queries, rows)` answers some of them, whose numbers are `rows`; the `group` answers to a prompt stay in one process.
    """
    if runtime.world_size == 1:
        return collect(list(queries), list(range(len(queries))))
    own = shared_rows([len(query) for query in queries], group, runtime)
    parts = runtime.gather([(own, collect([queries[row] for row in own], own))])
    rows = [row for numbers, _ in parts for row in numbers]
    return joined([part for _, part in parts]).select(sorted(range(len(rows)), key=lambda place: rows[place]))


def score_rollout(
    runtime: Runtime, pipeline: RewardPipeline, prompts: Sequence[EncodedPrompt], rollout: Rollout, group: int = 1
) -> tuple[RewardResult, int]:
    """What the reward pipeline says about a rollout's texts, and how many texts its models could not read whole.

    Each process scores a share, the `group` answers to a prompt in one. Raises UserError in all processes where it fails in one.
    """
    if runtime.world_size == 1:
        cut = pipeline.texts_cut
        return _scored(pipeline, prompts, rollout), pipeline.texts_cut - cut
    lengths = [len(query) + len(response) for query, response in zip(rollout.queries, rollout.responses, strict=True)]
    own = shared_rows(lengths, group, runtime)
    result, problems, place, cut = RewardResult([], {}), tuple[str, ...](), None, pipeline.texts_cut
    try:
        if own:
            result = _scored(pipeline, [prompts[row] for row in own], rollout.select(own))
    except UserError as error:
        problems, place = error.problems, getattr(error, "row", None)
    said = runtime.gather([(own, result, problems, place, pipeline.texts_cut - cut)])
    for rows, _, failure, at, _ in said:
        if failure and at is not None:
            raise AnswerError(failure[0], rows[at])
        if failure:
            raise UserError(*failure)
    places = sorted((row, part, place) for part, (rows, *_) in enumerate(said) for place, row in enumerate(rows))
    names = dict.fromkeys(name for _, part, *_ in said for name in part.components)
    return RewardResult(
        [said[part][1].scores[place] for _, part, place in places],
        {name: [said[part][1].components[name][place] for _, part, place in places] for name in names},
    ), sum(part[-1] for part in said)


def _scored(pipeline: RewardPipeline, prompts: Sequence[EncodedPrompt], rollout: Rollout) -> RewardResult:
    records = [prompt.record for prompt in prompts]
    return pipeline.score([record.prompt for record in records], rollout.texts, [record.columns for record in records], rollout.ended)
