"""The whole loop, `PPOTrainer.train`, top to bottom: sample, score, update; look at fixed prompts now and then; keep the best."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.checkpoint import new_manifest, save_model_directory
from common.closing import RunResult, cost_line, finish_run, opening_lines
from common.disk import check_room, checkpoint_bytes, most_saves
from common.errors import UserError
from common.launch.checkpointing import CheckpointKeeper
from common.launch.runtime import Runtime, peak_memory_gib
from common.launch.signals import StopSignals
from common.models.kinds import positions_of
from common.progress import Progress, format_figure
from common.prompts import PromptFormat
from common.resume import ABSENT, ResumePoint, differences, holding, point_in, refuse_other_processes, remove_leftovers, say_finished
from common.runs import write_config
from common.schema import GenerateParams, WandbSettings
from common.token_rows import StoredRows
from common.tracking import TIME, Tracker, read_metrics
from common.training_state import check_finite, check_start_weights, check_trained_weights, trained_weights, weights_digest
from rlhf.config import PPOGeneration
from rlhf.inputs import UNLIMITED_PROMPT, with_columns
from rlhf.ppo.evaluation import SAMPLE_COLUMNS, Evaluator
from rlhf.ppo.logs import MONITOR, start_tracker
from rlhf.ppo.metrics import METRICS
from rlhf.ppo.prompts import EncodedPrompt, as_prompts
from rlhf.ppo.rewards import penalised_scores
from rlhf.ppo.rollout import Rollout, collect_rollout
from rlhf.ppo.sharing import roll_out, score_rollout
from rlhf.prompt_order import PromptOrder
from rlhf.reward_pipelines.build import RewardPipeline, as_pipeline
from rlhf.sampling_options import check_sampling_options

if TYPE_CHECKING:
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer

_SHOWN_ROWS = 4
TRACKING = ("log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs", "exp_name", "task_name", "on_nan")
"""Settings that say where metrics go, and whether bad numbers end a run: one that goes on may have others."""
SHOWN_FIGURES = (MONITOR, "eval/kl", "eval/eos_rate", "eval/length")


@dataclass(frozen=True)
class RunOutput:
    """Where a run writes, and what it says there about itself."""

    directory: Path
    """New or empty."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings, without secrets, as `config.yaml` and manifests hold them."""
    data_fingerprint: str | None = None
    publish_in: Path | None = None
    """Folder whose link `latest` shall name the best model."""
    wandb: WandbSettings = field(default_factory=WandbSettings)
    tensorboard: bool = False
    is_held: bool = False
    """Whether the caller holds the directory's lock already."""


def train(
    trainer: PPOTrainer,
    prompts: Iterable[Any] | None = None,
    *,
    reward: Any = None,
    generation: GenerateParams | Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: int = 1,
    eval_prompts: Iterable[Any] = (),
    eval_every: int = 10,
    save_to: RunOutput | Path | str | None = None,
    save_every: int = 100,
    keep_last: int = 2,
    keep_best: int = 1,
    resume: ResumePoint | bool = False,
    prompt_format: PromptFormat = "qa",
    max_prompt_length: int | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    length_penalty: float = 0.0,
    samples_logged: int = 8,
    decoding: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train on prompts; returns what was logged, one dict per line of `metrics.jsonl` (`METRICS` defines the names).

    prompts, eval_prompts: questions, rows or ids (`as_prompts`); without `prompts` the trainer's dataset. Evaluation prompts should be
        others than those trained on.
    reward: what judges the answers (`as_pipeline`); without it the trainer's.
    generation: how answers are sampled, as `generation_config` of a config: `{"max_new_tokens": 32}`.
    steps: PPO steps; without it `config.steps`, else as many as `epochs` passes over the prompts give.
    eval_every, save_every: in steps. keep_last, keep_best: how many of the newest and of the best checkpoints are kept.
    save_to: a new folder for metrics, tables and checkpoints; its `best` is a transformers directory. None: nothing is saved, and
        metrics go where `log_stats` has them.
    resume: True goes on from the last good checkpoint in `save_to`, with a trainer, prompts and arguments made as then: the run ends with
        the bits of one that never stopped.
    prompt_format: how questions become text; recorded with checkpoints. max_prompt_length: tokens that questions are cut to, by default
        what the model's positions leave.
    missing_eos_penalty, missing_eos_score, length_penalty: see `penalised_scores`.
    samples_logged: rows of the sample table. decoding: further arguments of `collect_rollout`.

    Processes that were started together (`trainer.runtime`) all call this with the same arguments; the first of them alone writes.

    A second call goes on where the first ended. SIGINT and SIGTERM save, then raise `Stopped`. Raises UserError for what cannot be used.
    """
    # 1. what judges the answers, how they are sampled, which prompts
    config, runtime, model, sharding = trainer.config, trainer.runtime, trainer.model, trainer.sharding
    pipeline = as_pipeline(_given(reward, trainer.reward, "reward"), device=runtime.device)
    sharding.place(*pipeline.networks)
    params = _sampling(generation)
    limit = max_prompt_length or _room(model.config, params.max_new_tokens)
    encoded = partial(
        as_prompts,
        tokenizer=trainer.tokenizer,
        prompt_format=prompt_format,
        max_length=limit,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    training = _with_all_columns(encoded(_given(prompts, trainer.dataset, "prompts"), name="prompts"))
    held_out = _with_all_columns(encoded(eval_prompts, name="eval_prompts"))
    decoding = {"batch_size": config.batch_size, **(decoding or {})}
    each, answers = config.samples_per_prompt, config.batch_size * runtime.world_size
    if pipeline.needs_calibration:
        first_prompts = training[: max(answers, len(held_out))]
        with sharding.gathered(model, *pipeline.networks):
            calibrate(pipeline, model, trainer.tokenizer, first_prompts, params, config.seed, decoding, runtime)
    penalise = partial(
        _penalised, missing_eos_penalty=missing_eos_penalty, missing_eos_score=missing_eos_score, length_penalty=length_penalty
    )
    evaluate = Evaluator(trainer, pipeline, held_out, params, penalise=penalise, seed=config.seed, samples=samples_logged, **decoding)

    # 2. how long, and in which order
    batch_of_prompts = answers // each
    steps = steps or config.steps or len(training) * epochs // batch_of_prompts
    if steps == 0:
        raise UserError(f"{len(training)} prompts x {epochs} epochs make no batch of {batch_of_prompts}")
    first = trainer.steps_done
    order = PromptOrder(len(training), answers, seed=config.seed, samples=each)
    own = range(runtime.rank * config.batch_size, (runtime.rank + 1) * config.batch_size)

    # 3. where it writes, or goes on; the first process decides
    fingerprint = partial(_fingerprint, training, held_out)
    output, point = runtime.broadcast(_output(save_to, config, resume, fingerprint) if runtime.is_main else (None, None))
    if point is not None and point.finished:
        if runtime.is_main:
            say_finished(point)
        return read_history(point.run_dir)
    began_with = ""
    if output is not None:
        with sharding.whole(model) as held:
            began_with = weights_digest(held.pretrained_model.state_dict())
    state: dict[str, Any] | None = None
    if point is not None:
        state = point.state
        refuse_other_processes(runtime.world_size, state["processes"])
        if sharding.name != state.get("sharding", sharding.name):
            raise UserError(f"--resume: sharding is {sharding.name} now, and was {state['sharding']} when the run began; start it as then")
        if steps != state["steps"]:
            raise UserError(f"steps: got {steps}, but the run began with {state['steps']}; a resumed run keeps them")
        check_start_weights(began_with, state["began_with"], "policy's weights")
        with sharding.whole(model) as held:
            check_trained_weights(held.pretrained_model, state["weights"])
        sharding.load_weights(model.pretrained_model, state["weights"])
        trainer.load_state_dict(state["trainer"])
        pipeline.load_state_dict(state["reward"])
        first = state["first"]
    history: list[dict[str, float]] = []
    networks = trainer.networks.trained
    with sharding.gathered(*networks):
        one = checkpoint_bytes(*networks)
    with contextlib.ExitStack() as stack:
        tracker = trainer.tracker if output is None and trainer.tracker is not None else Tracker(Path(), is_main=False)  # writes nothing
        keeper = None
        if output is not None and runtime.is_main:
            if not output.is_held:
                stack.enter_context(holding(output.directory, point))
            saves = most_saves(steps, save_every, steps // eval_every + 1 if held_out else 0)
            check_room(output.directory, one, keep_last + keep_best, saves, None if point is None else point.run_dir)
            if point is None:
                write_config(output.directory, output.config)
            tracker = stack.enter_context(
                start_tracker(
                    config,
                    output.directory,
                    output.config,
                    wandb=output.wandb,
                    tensorboard=output.tensorboard,
                )
            )
            facts = {"prompt_format": prompt_format, "max_prompt_length": limit, "max_length": limit + params.max_new_tokens}
            save = partial(_save, trainer, output, facts)
            keeper = CheckpointKeeper(output.directory, save, monitor=MONITOR, mode="max", keep_last=keep_last, keep_best=keep_best)
            if point is not None and state is not None:
                remove_leftovers(keeper.folder)
                keeper.load_state_dict(state["keeper"], point.step)
                tracker.go_back(state["metrics"], point.step)
                history += read_history(output.directory)
        history = runtime.broadcast(history)
        stop = stack.enter_context(StopSignals(tells=runtime.is_main))

        def note(line: str) -> None:
            if runtime.is_main:
                progress.note(line)

        def log(figures: Mapping[str, float], step: int) -> None:
            tracker.log(figures, step)
            history.append({"step": step, **figures})

        def look(step: int, remark: str = "") -> dict[str, float]:
            """Evaluate; returns the figures."""
            evaluation = evaluate()
            log(evaluation.figures, step)
            tracker.table("eval/samples", SAMPLE_COLUMNS, evaluation.samples, step)
            remark = remark or (standing(keeper, evaluation.figures, start[MONITOR]) if keeper is not None else "")
            note(f"step {step}: {shown(evaluation.figures)}{remark}")
            return evaluation.figures

        def position(weights: Mapping[str, Tensor], trainer_state: Mapping[str, Any], looks: bool) -> dict[str, Any]:
            """What the run needs to go on from here; `looks`: with the evaluation of this step."""
            return {
                "looks": looks,
                "processes": runtime.world_size,
                "sharding": sharding.name,
                "first": first,
                "steps": steps,
                "start": start,
                "began_with": began_with,
                "weights": weights,
                "trainer": trainer_state,
                "reward": pipeline.state_dict(),
                "metrics": tracker.position,
            }

        def save_now(step: int, evaluated: Mapping[str, float] | None = None, looks: bool = False) -> None:
            """All processes call it; the first one, which has the keeper, writes."""
            if trainer.critic is not None:
                with sharding.whole(trainer.critic) as critic:
                    check_finite(critic, step)
            trainer_state = trainer.state_dict()
            with sharding.whole(model) as held:
                check_finite(held, step)
                if keeper is not None:
                    keeper.save(step, evaluated, partial(position, trained_weights(held.pretrained_model), trainer_state, looks))

        together = f" of {runtime.world_size} processes" if runtime.world_size > 1 else ""
        with sharding.gathered(*networks):
            lines = opening_lines(
                output.directory if output is not None else None,
                parameters=[parameter for network in networks for parameter in network.parameters()],
                rows={"train": len(training), "evaluation": len(held_out)},
                steps=steps,
                batch=f"{answers} answers{together}{f', {each} to each prompt' if each > 1 else ''}",
                device=str(runtime.device),
                step_name="PPO",
            )
        if runtime.is_main:
            print(*lines, sep="\n")
        started = time.perf_counter()
        progress = Progress(first + steps, done=trainer.steps_done, label="PPO", enabled=runtime.is_main)
        start = state["start"] if state is not None else look(first, "  (the start)") if held_out else {}

        if output is not None and state is not None and state.get("looks"):
            save_now(trainer.steps_done, look(trainer.steps_done))

        # 4. the loop
        for step in range(trainer.steps_done + 1, first + steps + 1):
            begun = time.perf_counter()
            batch = [training[row] for row in order.batch(step - 1)]
            rollout = trainer.rollout_of_all([prompt.ids for prompt in batch], params, group=each, seed=config.seed, step=step, **decoding)
            sampled = time.perf_counter()
            try:
                with sharding.gathered(*pipeline.networks):
                    result, texts_cut = score_rollout(runtime, pipeline, batch, rollout, each)
            except UserError as error:
                if output is not None and step - 1 > first:
                    save_now(step - 1)
                raise _of_rows(error, step, batch) from error
            scored = time.perf_counter()
            scores = penalise(result.scores, rollout)
            part = rollout if runtime.world_size == 1 else rollout.select(own)
            stats = trainer.step(part.queries, part.responses, scores[list(own)], temperature=params.temperature, sampled=part)
            ended = time.perf_counter()

            plain = torch.tensor(result.scores)
            figures = {name: value for name, value in stats.items() if name in METRICS}
            figures |= {
                "train/score": float(plain.mean()),
                "train/score_std": float(plain.std()) if len(plain) > 1 else 0.0,
                "train/eos_rate": sum(rollout.ended) / len(rollout),
                "train/judge_texts_cut": texts_cut,
                "train/epoch": step * batch_of_prompts / len(training),
                **{f"reward/{name}": sum(values) / len(values) for name, values in result.components.items()},
                "perf/rollout_seconds": sampled - begun,
                "perf/reward_seconds": scored - sampled,
                "perf/update_seconds": ended - scored,
                "perf/tokens_per_second": sum(map(len, rollout.responses)) / runtime.world_size / (ended - begun),
                "perf/memory_gib": peak_memory_gib(runtime.device),
            }
            log(figures, step)
            progress.update(
                step, {"score": figures["train/score"], "kl": figures["objective/kl"], "length": stats["tokens/responses_len_mean"]}
            )
            if stats["ppo/early_stopped"]:
                moved, limit_of_kl = stats["ppo/policy/last_policykl"], 1.5 * config.target_kl
                note(f"step {step}: early stop, an update moved {moved:.3g} nats per token (1.5 x target_kl = {limit_of_kl:.3g})")
            if stats["ppo/not_finite_minibatches"]:
                note(f"step {step}: {int(stats['ppo/not_finite_minibatches'])} updates left out, not finite in loss or gradient")
            if stats["ppo/skipped_minibatches"]:
                note(f"step {step}: {int(stats['ppo/skipped_minibatches'])} updates skipped, their ratio exceeded the threshold")
            is_last = step == first + steps
            try:
                evaluated = look(step) if held_out and (step % eval_every == 0 or is_last) else None
            except UserError as error:
                if output is not None:
                    save_now(step, looks=True)
                raise _of_rows(error, step, held_out) from error
            stopping = runtime.any(stop.received is not None)
            best = runtime.any(keeper is not None and evaluated is not None and keeper.improves(evaluated))
            if output is not None and (step % save_every == 0 or is_last or stopping or best):
                save_now(step, evaluated)
            if stopping:
                if keeper is not None:
                    note(f"saved {keeper.last}; stopping")
                stop.stop()
        progress.close()

        # 5. what came of it
        seconds, memory = time.perf_counter() - started, peak_memory_gib(runtime.device)
        if not runtime.is_main:
            return history
        if output is None or keeper is None:
            print(cost_line(steps, seconds, memory))
            return history
        outcome = RunResult(
            model=keeper.close(),
            monitor=MONITOR,
            best_value=keeper.best_value,
            best_metrics=keeper.best_metrics,
            steps=steps,
            seconds=seconds,
            peak_memory_gib=memory,
            validated=bool(held_out),
            start_value=start.get(MONITOR),
            started_from=getattr(model.config, "_name_or_path", None),
        )
        extra = {"first_score": start[MONITOR]} if start else {}
        finish_run(tracker, outcome, runs_root=output.publish_in, extra=extra, log_model=output.wandb.log_model)
    return history


def calibrate(
    pipeline: RewardPipeline,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    params: GenerateParams,
    seed: int,
    decoding: Mapping[str, Any],
    runtime: Runtime,
) -> None:
    """Show the pipeline what the starting policy, which is the reference, answers to training prompts.

    Processes share the answering; each pipeline sees all answers, and takes what the first one learnt.
    """

    def collect(queries: Sequence[Sequence[int]], rows: Sequence[int]) -> Rollout:
        return collect_rollout(model, tokenizer, queries, params, seed=seed, rows=rows, **decoding)

    rollout = roll_out(runtime, [prompt.ids for prompt in prompts], collect)
    records = [prompt.record for prompt in prompts]
    pipeline.calibrate([record.prompt for record in records], rollout.texts, [record.columns for record in records], rollout.ended)
    if runtime.world_size > 1:
        pipeline.load_state_dict(runtime.broadcast(pipeline.state_dict()))


def read_history(run_dir: Path) -> list[dict[str, float]]:
    """What a run has logged so far, as `train` returns it."""
    return [{name: value for name, value in line.items() if name != TIME} for line in read_metrics(run_dir)]


def shown(figures: Mapping[str, float]) -> str:
    """What a line about an evaluation says of it."""
    return "  ".join(f"{name} {format_figure(round(figures[name], 6))}" for name in SHOWN_FIGURES)


def standing(keeper: CheckpointKeeper, figures: Mapping[str, float], start: float) -> str:
    """How an evaluation compares with the checkpoints before it, and the best of them with the start."""
    if not keeper.improves(figures):
        return ""
    return f"  (best so far{'' if figures[MONITOR] > start else f', but not above the start: {format_figure(start)}'})"


def _of_rows(error: UserError, step: int, prompts: Sequence[EncodedPrompt]) -> UserError:
    """The error of a reward, with the step and where the prompts stand whose answers it was to judge."""
    row = getattr(error, "row", None)
    where = [prompt.record.where for prompt in (prompts if row is None else prompts[row : row + 1])]
    shown = "; ".join(where[:_SHOWN_ROWS]) + (f"; {len(where) - _SHOWN_ROWS} more" if len(where) > _SHOWN_ROWS else "")
    return UserError(*(f"PPO step {step}: {problem} (prompt: {shown})" for problem in error.problems))


def _given(argument: Any, own: Any, name: str) -> Any:
    """What `train` was given, else what the trainer has."""
    if argument is None and own is None:
        raise UserError(f"train needs {name}: pass {name} to it, or {'dataset' if name == 'prompts' else name} to PPOTrainer")
    return own if argument is None else argument


def _sampling(generation: GenerateParams | Mapping[str, Any] | None) -> GenerateParams:
    """Options of sampling, checked; `pad_token_id` is left out, since padding is told by position."""
    if not isinstance(generation, GenerateParams):
        generation = PPOGeneration.model_validate({name: value for name, value in (generation or {}).items() if name != "pad_token_id"})
    if not generation.do_sample:
        raise UserError("generation: got do_sample false; PPO learns from different answers to a question, leave it true")
    check_sampling_options(generation, setting="generation")
    return generation


def _room(model_config: Any, max_new_tokens: int) -> int:
    """Prompt tokens that fit the model beside an answer."""
    positions = positions_of(model_config)
    if positions is None:
        return UNLIMITED_PROMPT
    return positions if model_config.is_encoder_decoder else positions - max_new_tokens


def _with_all_columns(prompts: Sequence[EncodedPrompt]) -> Sequence[EncodedPrompt]:
    if isinstance(prompts, StoredRows):
        return prompts  # `read_prompts` has seen to it
    records = with_columns([prompt.record for prompt in prompts], {name: None for prompt in prompts for name in prompt.record.columns})
    return [EncodedPrompt(prompt.ids, record) for prompt, record in zip(prompts, records, strict=True)]


def _penalised(scores: Sequence[float], rollout: Rollout, **penalties: Any) -> Tensor:
    """Scores (B,) of a rollout after its penalties."""
    lengths = torch.tensor([len(response) for response in rollout.responses])
    return penalised_scores(torch.tensor(scores), lengths, torch.tensor(rollout.ended), **penalties)


def _output(
    save_to: RunOutput | Path | str | None, config: PPOConfig, resume: ResumePoint | bool, fingerprint: Callable[[], str]
) -> tuple[RunOutput | None, ResumePoint | None]:
    point = resume if isinstance(resume, ResumePoint) else None
    if save_to is None and resume:
        raise UserError("resume: nothing to go on from without save_to, the folder of the earlier run")
    if save_to is None or isinstance(save_to, RunOutput):
        return save_to, point
    directory = Path(save_to)
    if resume:
        point = point or point_in(directory, "ppo")
        directory = point.run_dir  # save_to may name one of its checkpoints
    settings = json.loads(json.dumps(asdict(config), default=str))  # as files hold them: no paths, no tuples
    output = RunOutput(directory, {"ppo_config": settings}, data_fingerprint=fingerprint())
    if point is not None:
        _check_same(point, output, config)
        return output, point
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"save_to: {directory} is not empty; runs are never mixed or overwritten, give a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    return output, None


def _fingerprint(*prompts: Sequence[EncodedPrompt]) -> str:
    """SHA-256 of the prompts' ids."""
    return hashlib.sha256(json.dumps([prompt.ids for part in prompts for prompt in part]).encode()).hexdigest()


def _check_same(point: ResumePoint, output: RunOutput, config: PPOConfig) -> None:
    """Refuse to go on with other prompts or under another config than the run began with. Raises UserError."""
    problems = []
    if output.data_fingerprint != point.manifest.data_fingerprint:
        problems.append("resume: the prompts are not those that the run began with")
    before = point.read_config()
    if list(before) != ["ppo_config"]:
        raise UserError(f"resume: {point.run_dir} was not begun by PPOTrainer.train; train_ppo.py --resume {point.run_dir} goes on with it")
    defaults = {setting.name: setting.default for setting in fields(type(config))}
    for name, (old, new) in differences(before, dict(output.config)).items():
        key = name.split(".")[1]
        is_of_another_version = new == ABSENT or (old == ABSENT and new == defaults.get(key))
        if key not in TRACKING and not is_of_another_version:
            problems.append(f"{name}: got {new}, but the run began with {old}; a resumed run keeps it")
    if problems:
        raise UserError(*problems)


def _save(
    trainer: PPOTrainer,
    output: RunOutput,
    facts: Mapping[str, Any],
    directory: Path,
    figures: dict[str, float],
    step: int,
    write_state: Callable[[Path], None],
) -> None:
    """One checkpoint: a transformers directory with a manifest of these `facts`, and the value head where it is what estimates values."""
    manifest = new_manifest(
        "ppo",
        trainer.tokenizer,
        metrics=figures,
        data_fingerprint=output.data_fingerprint,
        config=dict(output.config),
        step=step,
        processes=trainer.runtime.world_size,
        **facts,
    )

    with trainer.sharding.whole(trainer.model) as model:

        def extra(staging: Path) -> None:
            if trainer.estimator.reads_values and trainer.critic is None:
                model.v_head.save(staging)
            write_state(staging)

        save_model_directory(directory, model.pretrained_model, trainer.tokenizer, manifest, extra=extra)
