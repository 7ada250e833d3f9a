"""From a config to what it names, and `PPOTrainer.train` on it: one PPO run. The loop itself stands in `ppo/loop.py`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from common.config import resolved_dict
from common.errors import UserError
from common.freezing import apply_freezing
from common.launch.checkpointing import BEST
from common.launch.memory import telling_out_of_memory
from common.launch.runtime import Runtime
from common.launch.sharding import Sharding, launched_sharding
from common.launch.signals import Stopped
from common.lora import add_lora
from common.models.fused import set_fused
from common.models.kinds import positions_of
from common.models.load import check_vocabulary, load_generator, load_tokenizer
from common.notes import say
from common.optim import lr_lambda, warmup_steps
from common.record_types import PromptRecord
from common.records import Splits
from common.resume import ResumePoint, run_directory, say_finished, writing
from common.runs import stage_runs_root
from common.start_files import start_files
from common.token_rows import token_cache
from common.tokenization import Encoder
from common.training_state import STATE_FILES
from rlhf.config import PPORunConfig
from rlhf.critic_start import start_critic
from rlhf.inputs import Sources, prompt_limit, total_steps, training_prompts, unique
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.evaluation import choose_evaluation_prompts
from rlhf.ppo.loop import RunOutput, calibrate
from rlhf.ppo.models import ModelWithValueHead, with_value_head
from rlhf.ppo.prompts import encode
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rehearsal import report_ppo
from rlhf.reward_pipelines.build import build_pipeline

MEMORY_REMEDY = (
    "lower ppo_config.mini_batch_size, ppo_config.batch_size, generation_config.max_new_tokens or reward_config.batch_size, set "
    "ppo_config.gradient_checkpointing: true or ppo_config.mixed_precision: bf16, or train ppo_config.lora"
)


@telling_out_of_memory(MEMORY_REMEDY)
def train(
    config: PPORunConfig, splits: Splits[PromptRecord], sources: Sources, resume: ResumePoint | None = None, *, dry_run: bool = False
) -> Path:
    """Run PPO; returns the run directory. `resume`: where an earlier run goes on. Raises UserError before anything is written.

    Processes that were started together all call this; the first of them decides where the run goes on and lies, and it alone writes.

    dry_run: measure a few steps in memory, say what the run would take, write nothing, and return the folder of runs.
    """
    with Runtime.start(timeout_s=config.ppo_config.process_timeout_s) as runtime, _speaking(runtime.is_main):
        resume = runtime.broadcast(resume)
        if resume is not None and resume.finished:
            say_finished(resume)
            return resume.run_dir
        return _train(config, splits, sources, resume, runtime, dry_run=dry_run)


def _train(
    config: PPORunConfig,
    splits: Splits[PromptRecord],
    sources: Sources,
    resume: ResumePoint | None,
    runtime: Runtime,
    *,
    dry_run: bool,
) -> Path:
    params, generation = config.ppo_config, config.generation_config
    seed = config.seed if params.seed is None else params.seed
    sharding = launched_sharding(runtime, params.mixed_precision)
    refuse_unserved(config, sharding)
    if sharding.spreads:
        say("weights are sharded: cache_frozen_layers and static_decoding have no effect, every process reads the models' files")

    # 1. policy, reward pipeline
    start = start_files(params.model_name, params.model_pretrain)
    tokenizer = load_tokenizer(start.tokenizer, trust_remote_code=config.trust_remote_code)
    if resume is not None:
        resume.check_tokenizer(tokenizer)
    model, table = load_policy(config, tokenizer, seed)
    pipeline = build_pipeline(config.reward_config, device=runtime.device, trust_remote_code=config.trust_remote_code)
    if pipeline.needs_calibration or not sharding.spreads:  # else it goes there in parts
        model.to(runtime.device)

    # 2. prompts -> ids
    limit = prompt_limit(config, positions_of(model.config), bool(model.config.is_encoder_decoder))
    encoder = Encoder(
        tokenizer,
        prompt_format=sources.prompt_format,
        max_length=limit,
        truncate_prompt=config.data_config.truncate_prompt,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
    )
    remedy = "raise data_config.max_prompt_length or lower generation_config.max_new_tokens"
    root = stage_runs_root(config.save_config.checkpoint_dir, config.runs_root, "rlhf")
    cache = token_cache(config.data_config.cache_dir, root, splits.fingerprint, dry_run=dry_run)
    prompts = encode(encoder, training_prompts(splits, config.data_config), "train", remedy=remedy, cache=cache)
    held_out = choose_evaluation_prompts(unique(splits.val), config.evaluation.num_prompts, seed)
    eval_prompts = encode(encoder, held_out, "val", remedy=remedy)
    padding = config.data_config.padding
    decoding: dict[str, Any] = {
        "pad_to": limit if padding == "max_length" else None,
        "batch_size": 1 if padding is False else params.batch_size,  # without padding prompts are answered one by one
        "use_cache": params.use_cache,
    }

    # 3. the trainer; a critic needs the reward's scale, which the starting policy's answers may have to tell
    if pipeline.needs_calibration:
        first = prompts[: max(params.batch_size * runtime.world_size, config.evaluation.num_prompts)]
        calibrate(pipeline, model, tokenizer, first, generation, seed, decoding, runtime)
    critic = start_critic(model, tokenizer, pipeline) if params.critic == "model" else None
    if critic is not None:
        set_fused(critic, config.fused)
    trainer = PPOTrainer(
        PPOConfig.from_params(params, seed, config.on_nan),
        model,
        tokenizer=tokenizer,
        reward=pipeline,
        critic=critic,
        runtime=runtime,
        sharding=sharding,
    )
    steps = total_steps(config, len(prompts), runtime.world_size)
    warmup = warmup_steps(params.warmup_steps_per_cent, steps)
    if warmup or params.lr_schedule not in ("constant", "constant_with_warmup"):
        schedule = lr_lambda(params.lr_schedule, warmup, steps, params.lr_scheduler_kwargs, peak=params.learning_rate)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, schedule)

    arguments: dict[str, Any] = {
        "generation": generation,
        "prompt_format": sources.prompt_format,
        "max_prompt_length": limit,
        "missing_eos_penalty": params.missing_eos_penalty,
        "missing_eos_score": params.missing_eos_score,
        "length_penalty": params.length_penalty,
        "decoding": decoding,
    }
    if dry_run:
        report_ppo(config, trainer, encoder, prompts, eval_prompts, arguments, steps=steps, sources=sources, root=root)
        return root

    # 4. a run directory, from here on things are written
    run_dir = runtime.broadcast(run_directory(resume, root, config) if runtime.is_main else root)
    output = RunOutput(
        run_dir,
        config=resolved_dict(config),
        data_fingerprint=splits.fingerprint,
        publish_in=root,
        wandb=config.wandb,
        tensorboard=config.tensorboard,
        is_held=True,
    )
    with writing(run_dir, resume) if runtime.is_main else contextlib.nullcontext():
        if table is not None:
            print(table)
        try:
            trainer.train(
                prompts,
                steps=steps,
                eval_prompts=eval_prompts,
                eval_every=config.evaluation.every_n_steps,
                samples_logged=config.evaluation.num_samples_logged,
                save_to=output,
                save_every=config.save_config.save_interval,
                keep_last=config.save_config.keep_last,
                keep_best=config.save_config.keep_best,
                resume=resume or False,
                **arguments,
            )
        except Stopped:
            if runtime.is_main:
                print("to go on: the same command with --resume", file=sys.stderr)
            raise
        if config.hf_hub_name and runtime.is_main:
            push_to_hub(run_dir / BEST, config.hf_hub_name)
    return run_dir


@contextlib.contextmanager
def _speaking(speaks: bool) -> Iterator[None]:
    """One of the processes is heard."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def refuse_unserved(config: PPORunConfig, sharding: Sharding) -> None:
    """Raise UserError for what sharded weights do not allow."""
    params, problems = config.ppo_config, []
    if sharding.spreads and config.reward_config.offload:
        problems.append("reward_config.offload: got true, but reward models lie spread over the processes as all others do; leave it false")
    if sharding.spreads and params.optimizer == "Adafactor":
        problems.append(f"ppo_config.optimizer: got Adafactor, which needs whole weights; under {sharding.name} use AdamW, Adam or SGD")
    if sharding.steps_all and params.critic_warmup_steps:
        warmup = params.critic_warmup_steps
        problems.append(
            f"ppo_config.critic_warmup_steps: got {warmup}, expected 0: {sharding.name} counts them as steps of the policy; or use FSDP"
        )
    if problems:
        raise UserError(*problems)


def load_policy(config: PPORunConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[ModelWithValueHead, Any]:
    """The policy with a fresh value head and what trains of it set; the table of frozen groups, None with adapters."""
    params = config.ppo_config
    start = start_files(params.model_name, params.model_pretrain)
    trust = config.trust_remote_code
    pretrained: Any = load_generator(start.model, dtype=params.model_dtype, trust_remote_code=trust, weights=start.weights)
    check_vocabulary(tokenizer, pretrained, start.model)
    for note in set_fused(pretrained, config.fused):
        say(note)
    if params.lora is not None:
        return with_value_head(add_lora(pretrained, params.lora, seed=seed)), None
    model = with_value_head(pretrained)
    table = apply_freezing(model, config.freeze_config, always_train=("v_head",))
    if not any(parameter.requires_grad for parameter in model.pretrained_model.parameters()):
        raise UserError("freeze_config: nothing of the policy is left to train; let a group train or name a layer in layers_not_to_freeze")
    return model, table


def push_to_hub(directory: Path, name: str) -> None:
    """Upload a saved model where a login exists; whatever goes wrong is a warning, the local model is safe."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        print(f"note: not pushed to {name}: no Hugging Face login (hf auth login); the model is in {directory}")
        return
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True, private=True)  # its owner decides when to publish
        api.upload_folder(repo_id=name, folder_path=str(directory.resolve()), ignore_patterns=list(STATE_FILES))
        print(f"pushed to the hub as {name}")
    except Exception as error:
        print(
            f"warning: pushing to {name} failed ({str(error).strip().partition(chr(10))[0]}); the model is in {directory}", file=sys.stderr
        )
