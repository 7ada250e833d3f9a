"""One PPO run, top to bottom: sample, score, update; look at fixed prompts now and then; keep the best."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.checkpoint import new_manifest, save_model_directory
from common.closing import RunResult, finish_run, opening_lines
from common.config import resolved_dict
from common.failed_start import removed_if_unused
from common.freezing import apply_freezing
from common.launch.checkpointing import CheckpointKeeper
from common.launch.runtime import Runtime, peak_memory_gib
from common.launch.signals import StopSignals
from common.lora import add_lora
from common.models.fused import set_fused
from common.models.kinds import positions_of
from common.models.load import check_vocabulary, load_generator, load_tokenizer
from common.models.modes import recompute_activations
from common.notes import say
from common.optim import lr_lambda
from common.progress import Progress, format_figure
from common.record_types import PromptRecord
from common.records import Splits
from common.runs import create_run_directory, run_log, stage_runs_root, write_config
from common.schema import WandbSettings
from common.tokenization import Encoder
from common.tracking import Tracker
from rlhf.config import PPORunConfig
from rlhf.critic_start import start_critic
from rlhf.evaluation import SAMPLE_COLUMNS, Evaluator, choose_evaluation_prompts, score_rollout
from rlhf.inputs import Sources, prompt_limit, total_steps, training_prompts, unique
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.metrics import METRICS
from rlhf.ppo.models import ModelWithValueHead, with_value_head
from rlhf.ppo.rewards import penalised_scores
from rlhf.ppo.rollout import Rollout, collect_rollout
from rlhf.ppo.trainer import PPOTrainer
from rlhf.prompt_order import PromptOrder
from rlhf.reward_pipelines.build import RewardPipeline, build_pipeline

MONITOR = "eval/penalised_score"
SHOWN_FIGURES = (MONITOR, "eval/kl", "eval/eos_rate", "eval/length")


def train(config: PPORunConfig, splits: Splits[PromptRecord], sources: Sources) -> Path:
    """Run PPO; returns the run directory. Raises UserError before anything is written."""
    params, generation, runtime = config.ppo_config, config.generation_config, Runtime.local()
    seed = config.seed if params.seed is None else params.seed

    # 1. policy, reward pipeline
    tokenizer = load_tokenizer(params.model_name, trust_remote_code=config.trust_remote_code)
    model, table = load_policy(config, tokenizer, seed)
    model.to(runtime.device)
    pipeline = build_pipeline(config.reward_config, device=runtime.device, trust_remote_code=config.trust_remote_code)

    # 2. prompts -> ids
    limit = prompt_limit(config, positions_of(model.config), bool(model.config.is_encoder_decoder))
    encoder = Encoder(
        tokenizer,
        prompt_format=sources.prompt_format,
        max_length=limit,
        truncate_prompt=config.data_config.truncate_prompt,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    records = training_prompts(splits, config.data_config)
    prompt_ids = encode(encoder, records, "train")
    held_out = choose_evaluation_prompts(unique(splits.val), config.evaluation.num_prompts, seed)
    held_out_ids = encode(encoder, held_out, "val")
    padding = config.data_config.padding
    decoding: dict[str, Any] = {
        "pad_to": limit if padding == "max_length" else None,
        "batch_size": 1 if padding is False else params.batch_size,  # without padding prompts are answered one by one
        "use_cache": params.use_cache,
    }

    # 3. the trainer; a critic needs the reward's scale, which the starting policy's answers may have to tell
    if pipeline.needs_calibration:
        count = min(len(records), max(params.batch_size, config.evaluation.num_prompts))
        rollout = collect_rollout(model, tokenizer, prompt_ids[:count], generation, seed=seed, **decoding)
        calibrate(pipeline, records[:count], rollout)
    critic = start_critic(model, tokenizer, pipeline) if params.critic == "model" else None
    if critic is not None:
        set_fused(critic, config.fused)
    trainer = PPOTrainer(PPOConfig.from_params(params, seed), model, tokenizer=tokenizer, critic=critic, runtime=runtime)

    def penalise(scores: Sequence[float], rollout: Rollout) -> Tensor:
        return penalised_scores(
            torch.tensor(scores),
            torch.tensor([len(response) for response in rollout.responses]),
            torch.tensor(rollout.ended),
            missing_eos_penalty=params.missing_eos_penalty,
            missing_eos_score=params.missing_eos_score,
            length_penalty=params.length_penalty,
        )

    samples = config.evaluation.num_samples_logged
    evaluate = Evaluator(trainer, pipeline, held_out, held_out_ids, generation, penalise=penalise, seed=seed, samples=samples, **decoding)
    steps = total_steps(config, len(records), runtime.world_size)
    order = PromptOrder(len(records), params.batch_size, seed=seed, world_size=runtime.world_size, rank=runtime.rank)
    if params.lr_schedule != "constant":
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lr_lambda(params.lr_schedule, 0, steps))

    # 4. a run directory, from here on things are written
    root = stage_runs_root(config.save_config.checkpoint_dir, config.results_root, "rlhf")
    run_dir = create_run_directory(root, config.desc, config.index)
    resolved = resolved_dict(config)

    def save(directory: Path, figures: dict[str, float], step: int) -> None:
        manifest = new_manifest(
            "ppo",
            tokenizer,
            prompt_format=sources.prompt_format,
            max_length=limit + generation.max_new_tokens,
            max_prompt_length=limit,
            metrics=figures,
            data_fingerprint=splits.fingerprint,
            config=resolved,
            step=step,
        )
        save_model_directory(directory, model.pretrained_model, tokenizer, manifest, extra=None if critic else model.v_head.save)

    keeper = CheckpointKeeper(run_dir, save, monitor=MONITOR, mode="max", keep_last=config.save_config.keep_last)
    with (
        removed_if_unused(run_dir),
        run_log(run_dir),
        start_tracker(config, run_dir, resolved) as tracker,
        StopSignals() as stop,
    ):
        write_config(run_dir, resolved)
        if table is not None:
            print(table)
        for line in opening_lines(
            run_dir,
            parameters=[*model.parameters(), *(critic.parameters() if critic is not None else ())],
            rows={"train": len(records), "evaluation": len(held_out)},
            steps=steps,
            batch=f"{params.batch_size} answers",
            device=str(runtime.device),
            step_name="PPO",
        ):
            print(line)
        started = time.perf_counter()
        progress = Progress(steps, label="PPO")
        evaluation = evaluate()
        first_score = evaluation.figures[MONITOR]
        tracker.log(evaluation.figures, 0)
        tracker.table("eval/samples", SAMPLE_COLUMNS, evaluation.samples, 0)
        progress.note(f"step 0: {shown(evaluation.figures)}  (the start)")

        # 5. the loop
        for step in range(1, steps + 1):
            begun = time.perf_counter()
            rows, numbers = order.batch(step - 1)
            batch = [records[row] for row in rows]
            ids = [prompt_ids[row] for row in rows]
            rollout = trainer.rollout(ids, generation, seed=seed, step=step, rows=numbers, **decoding)
            sampled = time.perf_counter()
            cut_before = pipeline.texts_cut
            result = score_rollout(pipeline, batch, rollout)
            scored = time.perf_counter()
            scores = penalise(result.scores, rollout)
            stats = trainer.step(rollout.queries, rollout.responses, scores, temperature=generation.temperature, sampled=rollout)
            ended = time.perf_counter()

            plain = torch.tensor(result.scores)
            figures = {name: value for name, value in stats.items() if name in METRICS}
            figures |= {
                "train/score": float(plain.mean()),
                "train/score_std": float(plain.std()) if len(plain) > 1 else 0.0,
                "train/eos_rate": sum(rollout.ended) / len(rollout),
                "train/judge_texts_cut": pipeline.texts_cut - cut_before,
                "train/epoch": step * params.batch_size * runtime.world_size / len(records),
                **{f"reward/{name}": sum(values) / len(values) for name, values in result.components.items()},
                "perf/rollout_seconds": sampled - begun,
                "perf/reward_seconds": scored - sampled,
                "perf/update_seconds": ended - scored,
                "perf/tokens_per_second": sum(map(len, rollout.responses)) / (ended - begun),
                "perf/memory_gib": peak_memory_gib(runtime.device),
            }
            tracker.log(figures, step)
            progress.update(
                step, {"score": figures["train/score"], "kl": figures["objective/kl"], "length": stats["tokens/responses_len_mean"]}
            )
            if stats["ppo/early_stopped"]:
                moved, limit_of_kl = stats["ppo/policy/last_policykl"], 1.5 * params.target_kl
                progress.note(f"step {step}: early stop, an update moved {moved:.3g} nats per token (1.5 x target_kl = {limit_of_kl:.3g})")
            if stats["ppo/skipped_minibatches"]:
                progress.note(f"step {step}: {int(stats['ppo/skipped_minibatches'])} updates skipped, their ratio exceeded the threshold")
            evaluated = None
            if step % config.evaluation.every_n_steps == 0 or step == steps:
                evaluation = evaluate()
                evaluated = evaluation.figures
                tracker.log(evaluated, step)
                tracker.table("eval/samples", SAMPLE_COLUMNS, evaluation.samples, step)
                progress.note(f"step {step}: {shown(evaluated)}{standing(keeper, evaluated, first_score)}")
            if step % config.save_config.save_interval == 0 or step == steps or (evaluated and keeper.improves(evaluated)):
                keeper.save(step, evaluated)
            if stop.received is not None:
                keeper.save(step, evaluated)
                progress.note(f"saved {keeper.last}; stopping")
                progress.note(
                    f"to go on: ppo_config.model_name={keeper.last} starts a new run from this policy, which is its reference, too "
                    "(optimizer, critic and KL coefficient start afresh)"
                )
                stop.stop()
        progress.close()
        keeper.close()
        assert keeper.best is not None
        result_of_run = RunResult(
            model=keeper.best,
            monitor=MONITOR,
            best_value=keeper.best_value,
            best_metrics=keeper.best_metrics,
            start_value=first_score,
            started_from=params.model_name,
            steps=steps,
            seconds=time.perf_counter() - started,
            peak_memory_gib=peak_memory_gib(runtime.device),
        )
        finish_run(tracker, result_of_run, runs_root=root, extra={"first_score": first_score}, log_model=config.wandb.log_model)
        if config.hf_hub_name:
            push_to_hub(keeper.best, config.hf_hub_name)
    return run_dir


def shown(figures: Mapping[str, float]) -> str:
    """What a line about an evaluation says of it."""
    return "  ".join(f"{name} {format_figure(round(figures[name], 6))}" for name in SHOWN_FIGURES)


def standing(keeper: CheckpointKeeper, figures: Mapping[str, float], start: float) -> str:
    """How an evaluation compares with the checkpoints before it, and the best of them with the start."""
    if not keeper.improves(figures):
        return ""
    return f"  (best so far{'' if figures[MONITOR] > start else f', but not above the start: {format_figure(start)}'})"


def load_policy(config: PPORunConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[ModelWithValueHead, Any]:
    """The policy with a fresh value head and what trains of it set; the table of frozen groups, None with adapters."""
    params = config.ppo_config
    pretrained: Any = load_generator(params.model_name, dtype=params.model_dtype, trust_remote_code=config.trust_remote_code)
    check_vocabulary(tokenizer, pretrained, params.model_name)
    for note in set_fused(pretrained, config.fused):
        say(note)
    if params.gradient_checkpointing:
        recompute_activations(pretrained)
    if params.lora is not None:
        return with_value_head(add_lora(pretrained, params.lora, seed=seed)), None
    model = with_value_head(pretrained)
    return model, apply_freezing(model, config.freeze_config, always_train=("v_head",))


def encode(encoder: Encoder, records: Sequence[PromptRecord], split: str) -> list[list[int]]:
    """Prompt ids of records; prints what was cut."""
    ids = encoder.prompts([record.prompt for record in records], [record.where for record in records])
    remedy = "raise data_config.max_prompt_length or lower generation_config.max_new_tokens"
    for note in encoder.take_notes(split, remedy=remedy):
        say(note)
    return ids


def calibrate(pipeline: RewardPipeline, records: Sequence[PromptRecord], rollout: Rollout) -> None:
    """Show the pipeline what the starting policy, which is the reference, answers to training prompts."""
    columns = [record.columns for record in records]
    pipeline.calibrate([record.prompt for record in records], rollout.texts, columns, rollout.ended)


def start_tracker(config: PPORunConfig, run_dir: Path, resolved: dict[str, Any]) -> Tracker:
    """Metrics to files always; to wandb or TensorBoard by `log_with` (TensorBoard by the top-level switch too)."""
    params = config.ppo_config
    wandb: WandbSettings | None = None
    if params.log_with == "wandb":
        wandb = config.wandb
        if params.tracker_project_name is not None:
            wandb = wandb.model_copy(update={"project_name": params.tracker_project_name})
    nested = params.tracker_kwargs.get("wandb", params.tracker_kwargs)
    return Tracker.start(
        run_dir,
        stage="rlhf",
        config=resolved,
        wandb=wandb,
        tensorboard=config.tensorboard or params.log_with == "tensorboard",
        directions={MONITOR: "max"},
        init_arguments=dict(nested),
    )


def push_to_hub(directory: Path, name: str) -> None:
    """Upload a saved model where a login exists; whatever goes wrong is a warning, the local model is safe."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        print(f"note: not pushed to {name}: no Hugging Face login (hf auth login); the model is in {directory}")
        return
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True, private=True)  # its owner decides when to publish
        api.upload_folder(repo_id=name, folder_path=str(directory.resolve()))
        print(f"pushed to the hub as {name}")
    except Exception as error:
        print(
            f"warning: pushing to {name} failed ({str(error).strip().partition(chr(10))[0]}); the model is in {directory}", file=sys.stderr
        )
