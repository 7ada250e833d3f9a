"""`--dry_run` of PPO: real steps (sample, score, update) and evaluations in memory, and what they say of the whole run."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.dry_run import Forecast, counted, judge_line, model_bytes, report, start_line
from common.errors import UserError
from common.launch.runtime import peak_memory_gib
from common.lazy import Lazy
from common.token_rows import StoredRows
from common.tokenization import Encoder
from common.training_state import state_size, trained_weights
from rlhf.config import PPORunConfig
from rlhf.inputs import Sources
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.trainer import PPOTrainer
from rlhf.prompt_order import PromptOrder

PHASES = ("perf/rollout_seconds", "perf/reward_seconds", "perf/update_seconds")
TYPICAL_STEPS = 2


def report_ppo(
    config: PPORunConfig,
    trainer: PPOTrainer,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    eval_prompts: Sequence[EncodedPrompt],
    arguments: Mapping[str, Any],
    *,
    steps: int,
    sources: Sources,
    root: Path,
) -> None:
    """Print what a run would take. Raises UserError where it could not run or could not keep its checkpoints in `root`.

    arguments: what `PPOTrainer.train` is given beside prompts and steps. The trainer has made steps afterwards.
    """
    forecast, processes = rehearse(config, trainer, prompts, eval_prompts, arguments, steps), trainer.runtime.world_size
    policy = sources.policy
    positions = encoder.max_length + config.generation_config.max_new_tokens
    with trainer.sharding.gathered(*trainer.networks.trained):
        report(
            config,
            encoder=encoder,
            rows={"train": len(prompts), "evaluation": len(eval_prompts)},
            fits=[
                start_line(policy.name, trainer.model.config, encoder.tokenizer, positions, sources.prompt_format),
                *(judge_line(policy, judge, sources.prompt_format) for judge in sources.judges),
            ],
            parameters=[parameter for network in trainer.networks.trained for parameter in network.parameters()],
            forecast=forecast,
            root=root,
            keep_last=config.save_config.keep_last,
            keep_best=config.save_config.keep_best,
            notes=[f"processes: {processes}; the memory is that of the one with the most"] if processes > 1 else [],
        )


def rehearse(
    config: PPORunConfig,
    trainer: PPOTrainer,
    prompts: Sequence[EncodedPrompt],
    eval_prompts: Sequence[EncodedPrompt],
    arguments: Mapping[str, Any],
    steps: int,
) -> Forecast:
    """A step on the longest prompts of the first pass, its answers as long as they may get, and steps on typical ones, with evaluations."""
    batches = _batches(trainer, prompts, steps)
    longest = [prompts[row] for row in batches[-1]]
    typical = [prompts[row] for batch in _middle(batches, TYPICAL_STEPS) for row in batch]
    generation = arguments["generation"]
    full = generation.model_copy(update={"min_length": generation.max_new_tokens, "stop_strings": []})
    trainer.tracker = None  # it would make a run directory of its own
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            [first] = trainer.train(longest, steps=1, **{**arguments, "generation": full})
            began = time.perf_counter()
            lines = trainer.train(typical, steps=TYPICAL_STEPS, eval_prompts=eval_prompts, eval_every=TYPICAL_STEPS, **arguments)
            seconds = time.perf_counter() - began
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"memory does not suffice for a step: {' '.join(str(error).split())[:200]}; lower ppo_config.batch_size, "
                "ppo_config.mini_batch_size or generation_config.max_new_tokens"
            ) from None
    measured = [sum(line[phase] for phase in PHASES) for line in lines if PHASES[0] in line]
    each = statistics.fmean(measured)
    evaluation = max(0.0, seconds - sum(measured)) / 2 if eval_prompts else 0.0  # before the first step and after the last
    every = config.evaluation.every_n_steps
    evaluations = (1 + -(-steps // every)) if eval_prompts else 0
    trainer_state, rewards = trainer.state_dict(), trainer.reward.state_dict()
    with trainer.sharding.whole(trainer.model) as model:
        state = {"weights": trained_weights(model.pretrained_model), "trainer": trainer_state, "reward": rewards}
        checkpoint = model_bytes(model.pretrained_model, trainer.tokenizer) + state_size(state)
    words = [f"{name} {statistics.fmean(line[phase] for line in lines if phase in line):.3g} s" for name, phase in _named(PHASES)]
    return Forecast(
        device=str(trainer.runtime.device),
        measured=f"a step on the longest prompts ({sum(len(prompt.ids) for prompt in longest):,} tokens), every answer of "
        f"{counted(generation.max_new_tokens, 'token')}, {sum(first[phase] for phase in PHASES):.3g} s; {TYPICAL_STEPS} typical ones "
        f"{each:.3g} s each ({', '.join(words)}); an evaluation {evaluation:.3g} s",
        steps=f"{steps:,} PPO steps of {config.ppo_config.batch_size * trainer.runtime.world_size} answers",
        steps_seconds=steps * each,
        validations=evaluations,
        validations_seconds=evaluations * evaluation,
        memory_gib=max(trainer.runtime.gather([peak_memory_gib(trainer.runtime.device)])),  # that of saving, too, by now
        checkpoint_bytes=checkpoint,
    )


def _named(phases: Sequence[str]) -> list[tuple[str, str]]:
    return [(phase.removeprefix("perf/").removesuffix("_seconds"), phase) for phase in phases]


def _batches(trainer: PPOTrainer, prompts: Sequence[EncodedPrompt], steps: int) -> Sequence[list[int]]:
    """Which prompts each step of the first pass has, those with the fewest tokens first."""
    each = trainer.config.samples_per_prompt
    rows = trainer.config.batch_size * trainer.runtime.world_size
    order = PromptOrder(len(prompts), rows, seed=trainer.config.seed, samples=each)
    first_pass = min(steps, -(-len(prompts) * each // rows))

    def batch(step: int) -> list[int]:
        return order.batch(step)[::each]

    lengths = prompts.lengths if isinstance(prompts, StoredRows) else [len(prompt.ids) for prompt in prompts]
    tokens = np.fromiter((sum(lengths[row] for row in batch(step)) for step in range(first_pass)), np.int64, first_pass)
    return Lazy(batch, np.argsort(tokens, kind="stable"))


def _middle(batches: Sequence[list[int]], count: int) -> list[list[int]]:
    """So many batches around the median; the only one again where there are fewer."""
    start = max(0, (len(batches) - count) // 2)
    return [batches[min(start + number, len(batches) - 1)] for number in range(count)]
