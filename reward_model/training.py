"""One training run of a reward model, top to bottom; what differs between pairs and scores is handed in as an `Objective`."""

from __future__ import annotations

import copy
import heapq
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
import torch
from transformers import PreTrainedTokenizerBase

from common.checkpoint import MANIFEST, Stage, new_manifest, read_manifest, save_model_directory
from common.closing import finish_run, opening_lines
from common.config import resolved_dict
from common.disk import checkpoint_bytes
from common.errors import UserError
from common.file_records import tokenizer_rows
from common.followers import follows
from common.freezing import apply_freezing
from common.launch.checkpointing import LAST
from common.launch.joining import shared_run
from common.launch.lightning import (
    autocast_dtype,
    avoids_padding,
    batch_limit,
    batch_words,
    build_trainer,
    check_processes,
    check_trainer,
    fit,
    on_all_gpus,
    processes_of,
    total_optimizer_steps,
    trainer_params,
    training_device,
)
from common.launch.memory import LIGHTNING_REMEDY, telling_out_of_memory
from common.launch.rehearsal import report_training, saves_at_most
from common.launch.workers import check_number_of_workers
from common.lora import add_lora
from common.models.answers import Answer
from common.models.frozen_states import cached_answers, state_facts
from common.models.fused import set_fused
from common.models.load import build_backbone, give_pad_token, load_backbone, load_tokenizer, set_dropout, train_tokenizer
from common.models.lower_states import frozen_layers, lower_facts, started_answers
from common.models.parts import without_adapters
from common.models.recompute import recompute_activations
from common.models.reward import RewardModel, RewardScorer
from common.notes import say
from common.records import PairRecord, ScoreRecord, Splits
from common.resume import ResumePoint
from common.runs import stage_runs_root, write_text_atomically
from common.schema import FreezeSettings, TrainerSettings
from common.score_transform import ScoreTransform
from common.token_rows import lengths_of, token_cache
from common.tokenization import Encoder
from common.tracking import Tracker
from reward_model.config import RewardConfig
from reward_model.loaders import Row, answers_in, training_loader, validation_loader

# Rows of the training set on which the mean and scale of the scores are measured.
SCORE_SAMPLE = 2000
EVERYTHING = FreezeSettings(freeze_emb=True, freeze_ln=True, freeze_attn=True, freeze_ff=True, freeze_other=True)

Record = TypeVar("Record", PairRecord, ScoreRecord)
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Objective(Generic[Record, R]):
    """What a kind of reward model learns from.

    texts           texts of a record, for a tokenizer trained on them
    encode          records, encoder, entry [, cache, split] -> rows of ids, on disk where there is a cache and records stay in their file;
                    raises UserError with a line for each bad row
    collate         rows, their places, padding id, denominator, pad_to, counted -> batch
    module          model, optimizer steps, validation rows -> LightningModule
    """

    stage: Stage
    texts: Callable[[Record], Iterable[str]]
    encode: Callable[..., Sequence[R]]
    collate: Callable[..., Mapping[str, Any]]
    module: Callable[[RewardModel, int, Sequence[R]], pl.LightningModule]
    transform: ScoreTransform = field(default_factory=ScoreTransform)


@telling_out_of_memory(LIGHTNING_REMEDY)
def train(
    config: RewardConfig,
    splits: Splits[Record],
    objective: Objective[Record, R],
    resume: ResumePoint | None = None,
    *,
    dry_run: bool = False,
) -> Path:
    """Train, keep the best checkpoint, publish it as `latest`; returns the run directory. `resume`: where an earlier run goes on.

    dry_run: measure a few steps in memory, say what the run would take, write nothing, and return the folder of runs.
    """
    resolved = resolved_dict(config)
    config = config.model_copy(update={"trainer": on_devices(config)})
    check_processes(config.trainer, dry_run)
    check_trainer(config.trainer)
    processes = processes_of(config.trainer)
    check_number_of_workers(config.launch, processes)

    # 1. model and tokenizer
    tokenizer, model = start_model(config, (text for record in tokenizer_rows(splits.train) for text in objective.texts(record)), resume)
    if resume is not None:
        resume.check_tokenizer(tokenizer)
    prepared = prepare_model(model, config)

    # 2. rows -> ids -> loaders
    data = config.data
    encoder = text_encoder(config, tokenizer, model)
    remedy = "raise data.max_length" if data.max_prompt_length is None else "raise data.max_length or data.max_prompt_length"
    runs_root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, objective.stage)
    cache = token_cache(data.cache_dir, runs_root, splits.fingerprint, dry_run=dry_run)
    train_rows = objective.encode(splits.train, encoder, model.entry, cache, "train")
    notes = encoder.take_notes("train", remedy=remedy)
    val_rows = objective.encode(splits.val, encoder, model.entry, cache, "val")
    for note in [*notes, *encoder.take_notes("val", remedy=remedy)]:
        say(note)
    if not train_rows or not val_rows:
        raise UserError(f"{data.data_dir}: no usable row is left in {'val' if train_rows else 'train'}")
    if config.model_params.kept_states is not None and not dry_run:
        train_rows, val_rows = read_from_cache(model, tokenizer, (train_rows, val_rows), config, runs_root)
    accumulate = trainer_params(config.trainer).get("accumulate_grad_batches", 1)
    train_loader = training_loader(
        train_rows,
        data,
        tokenizer.pad_token_id,
        objective.collate,
        seed=config.seed,
        accumulate=accumulate,
        limit=batch_limit(config.trainer),
        processes=processes,
    )
    val_loader = validation_loader(val_rows, data, tokenizer.pad_token_id, objective.collate, processes)
    total_steps = total_optimizer_steps(config.trainer, len(train_loader))
    module = objective.module(model, total_steps, val_rows)

    if dry_run:
        report_training(
            config,
            data,
            module,
            model,
            encoder,
            train_loader,
            val_loader,
            total_steps=total_steps,
            processes=processes,
            padding_free=model.packs,
            root=runs_root,
            keeps_states=config.model_params.kept_states is not None,
            closing=lambda: score_with_a_copy(model, tokenizer, train_rows, objective.stage, config),
        )
        return runs_root

    # 3. run directory, trainer
    def save(directory: Path, metrics: dict[str, float], step: int, extra: Callable[[Path], None]) -> None:
        manifest = new_manifest(
            objective.stage,
            tokenizer,
            prompt_format=data.prompt_format,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            is_encoder_decoder=model.config.is_encoder_decoder,
            readout=config.model_params.readout.model_dump(),
            score_transform=objective.transform,
            metrics=metrics,
            data_fingerprint=splits.fingerprint,
            config=resolved,
            step=step,
            processes=processes,
        )
        save_model_directory(directory, module.model, tokenizer, manifest, extra=extra)

    saves = saves_at_most(config.trainer, len(train_loader), total_steps)
    with (
        shared_run(config, resolved, runs_root, resume, checkpoint_bytes(model), saves) as run_dir,
        Tracker.start(
            run_dir,
            stage=objective.stage,
            config=resolved,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            is_main=not follows(),
        ) as tracker,
    ):
        opening = opening_lines(
            run_dir,
            parameters=model.parameters(),
            rows={"train": len(train_rows), "val": len(val_rows)},
            steps=total_steps,
            batch=batch_words(config.trainer, data.batch_size),
        )
        print("\n".join([*prepared, *opening]))
        trainer = build_trainer(
            config.trainer,
            run_dir=run_dir,
            tracker=tracker,
            seed=config.seed,
            save=save,
            choices=config.monitored,
            total_steps=total_steps,
            on_nan=config.on_nan,
            resume=resume,
        )

        # 4. train, then measure the scores of what was kept
        result = fit(trainer, module, train_loader, val_loader)
        if follows():
            return run_dir
        answers = answers_in(train_rows)
        moments = {path: record_score_moments(path, answers, config) for path in {result.model, (run_dir / LAST).resolve()}}
        mean, scale = moments[result.model]
        print(f"scores on the training set: mean {mean:.4f}, standard deviation {scale:.4f} (of {min(len(answers), SCORE_SAMPLE)} answers)")
        extra = {"score_mean": mean, "score_scale": scale}
        finish_run(tracker, result, runs_root=runs_root, extra=extra, log_model=config.wandb.log_model)
    return run_dir


def on_devices(config: RewardConfig) -> TrainerSettings:
    """The trainer's settings for the devices that are here."""
    return on_all_gpus(config.trainer) if config.use_multi_gpu_if_available else config.trainer


def start_model(
    config: RewardConfig, texts: Iterable[str], resume: ResumePoint | None = None
) -> tuple[PreTrainedTokenizerBase, RewardModel]:
    """The model that training starts from, in training mode, and its tokenizer, whose padding is a token of its own.

    ckpt_path: a whole reward model with its head. model_name: the transformer under any model, with a fresh head. model_init: a fresh
    transformer and a tokenizer trained on `texts`, or that of a run that goes on.
    """
    params, trust = config.model_params, config.trust_remote_code
    if config.trainer.ckpt_path is not None:
        tokenizer = load_tokenizer(config.trainer.ckpt_path, trust_remote_code=trust)
        model = RewardModel.load(
            config.trainer.ckpt_path, dtype=params.model_dtype, trust_remote_code=trust, readout_settings=params.readout
        )
        give_pad_token(tokenizer, model.backbone)
        return tokenizer, model.train()
    if config.model_init is not None:
        tokenizer = train_tokenizer(texts, config.model_init.vocab_size) if resume is None else load_tokenizer(str(resume.checkpoint))
        backbone = build_backbone(config.model_init, tokenizer, config.data.max_length, config.seed)
        backbone.to(getattr(torch, params.model_dtype))
    else:
        assert config.model_name is not None, "the config has one of model_name and model_init"
        tokenizer = load_tokenizer(config.model_name, trust_remote_code=trust)
        backbone = load_backbone(config.model_name, dtype=params.model_dtype, trust_remote_code=trust)
    give_pad_token(tokenizer, backbone)
    return tokenizer, RewardModel.from_backbone(backbone, params.readout, seed=config.seed).train()


def text_encoder(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, model: RewardModel) -> Encoder:
    """What makes ids of texts as the data section says, for the parts of the model that they enter."""
    data = config.data
    return Encoder(
        tokenizer,
        prompt_format=data.prompt_format,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        truncate_prompt=data.truncate_prompt,
        is_encoder_decoder=model.entry.splits,
    )


def prepare_model(model: RewardModel, config: RewardConfig) -> list[str]:
    """Dropout, recomputed activations, adapters or frozen parts as the config says; returns lines that tell what was done."""
    params = config.model_params
    if params.dropout is not None:
        set_dropout(model.backbone, params.dropout)
    for note in set_fused(model, config.fused):
        say(note)
    if params.gradient_checkpointing:
        recompute_activations(model.backbone)
    if params.freeze_backbone:
        trained = str(apply_freezing(model, EVERYTHING, always_train=model.HEAD_PREFIXES))
    elif params.lora is not None:
        model.backbone = add_lora(model.backbone, params.lora, seed=config.seed)
        for name in model.unread_parameters:
            model.get_parameter(name).requires_grad_(False)
        trained = f"LoRA adapters of rank {params.lora.r} and the score head train, everything else is frozen"
    else:
        trained = str(apply_freezing(model, params, always_train=model.HEAD_PREFIXES, unread=model.unread_parameters))
    model.set_padding_free(avoids_padding(config.trainer, config.data))
    return [trained]


def read_from_cache(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, splits: Sequence[Sequence[R]], config: RewardConfig, runs_root: Path
) -> list[list[R]]:
    """The rows of each split with cached states; states that no earlier run has left are computed here.

    Of a frozen backbone they are what the readout reads, in the place of token ids; else what enters the lowest layer that trains, above
    which `model` starts from now on.
    """
    params = config.model_params
    assert params.kept_states is not None
    answers = [answer for rows in splits for row in rows for answer in row.answers]
    folder = Path(params.cache_dir) if params.cache_dir else runs_root / "state_cache"
    autocast = autocast_dtype(config.trainer)
    arguments: dict[str, Any] = {
        "pad_id": tokenizer.pad_token_id,
        "device": training_device(config.trainer),
        "autocast": autocast,
        "show_progress": trainer_params(config.trainer).get("enable_progress_bar", True),
    }
    known: Sequence[Answer]
    if params.freeze_backbone:
        known = cached_answers(model, answers, folder, state_facts(model, tokenizer, params.kept_states, autocast), **arguments)
    else:
        lower = frozen_layers(model, without_adapters(model.backbone))
        model.start_above(lower)
        facts = lower_facts(lower, tokenizer, params.kept_states, autocast)
        known = started_answers(lower, answers, folder, facts, packs=model.packs, **arguments)
    upcoming = iter(known)
    return [[replace(row, answers=tuple(islice(upcoming, len(row.answers)))) for row in rows] for rows in splits]


def score_with_a_copy(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], stage: Stage, config: RewardConfig
) -> None:
    """Score a batch of the longest rows beside the trained model, as `record_score_moments` does after training."""
    batch_size = config.data.val_batch_size or config.data.batch_size
    longest = [rows[place] for _, place in sorted(heapq.nlargest(batch_size, zip(lengths_of(rows), count(), strict=False)))]
    scorer = RewardScorer(
        copy.deepcopy(model),
        batch_size=batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        tokenizer=tokenizer,
        manifest=new_manifest(stage, tokenizer),
    )
    scorer.score_members([answer for row in longest for answer in row.answers][:batch_size])


def record_score_moments(directory: Path, answers: Sequence[Answer], config: RewardConfig) -> tuple[float, float]:
    """Mean and standard deviation of a checkpoint's output scores on training answers, also written into its manifest.

    Above `SCORE_SAMPLE` answers they are measured on a seeded sample of that many. PPO normalises scores with them. The mean of each
    member of an ensemble goes into the manifest, too.
    """
    manifest = read_manifest(directory)
    assert manifest is not None, "a checkpoint has a manifest"
    sample = random.Random(config.seed).sample(answers, min(len(answers), SCORE_SAMPLE))
    scorer = RewardScorer(
        str(directory),
        batch_size=config.data.val_batch_size or config.data.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        trust_remote_code=config.trust_remote_code,
    )
    raw = scorer.score_members(sample)  # (N, M)
    scores = torch.tensor(scorer.transform.invert(raw.mean(1).tolist()), dtype=torch.float64)
    mean, scale = float(scores.mean()), float(scores.std(correction=0))
    measured: dict[str, Any] = {"score_mean": mean, "score_scale": scale}
    if scorer.model.members > 1:
        measured["member_means"] = [statistics.fmean(scorer.transform.invert(member)) for member in raw.T.tolist()]
    complete = manifest.model_copy(update=measured)
    write_text_atomically(directory / MANIFEST, complete.model_dump_json(indent=2) + "\n")
    return mean, scale
