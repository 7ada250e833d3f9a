"""One SFT run, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.batching import BatchPlan, batch_loader
from common.checkpoint import new_manifest, save_model_directory
from common.closing import finish_run, opening_lines
from common.collate import supports_packing
from common.config import resolved_dict
from common.disk import checkpoint_bytes
from common.errors import UserError
from common.evaluation.generate import Answer, generate_answers
from common.evaluation.text_metrics import corpus_metrics
from common.file_records import FileRecords, tokenizer_rows
from common.followers import follows, rank
from common.freezing import apply_freezing
from common.gathered import Gathered, own_share
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
    processes_of,
    total_optimizer_steps,
    trainer_params,
    training_device,
)
from common.launch.memory import LIGHTNING_REMEDY, telling_out_of_memory
from common.launch.rehearsal import report_training, saves_at_most
from common.launch.workers import check_number_of_workers
from common.lora import add_lora
from common.models.answers import StartedAnswer
from common.models.backbone import RewardInput
from common.models.fused import set_fused
from common.models.kinds import positions_of
from common.models.load import build_generator, load_generator, load_tokenizer, set_dropout, train_tokenizer
from common.models.lower_states import frozen_layers, lower_facts, started_answers
from common.models.parts import without_adapters
from common.models.recompute import recompute_activations
from common.notes import say
from common.prompts import answer_text, render_prompt
from common.records import SFTRecord, Splits
from common.resume import ResumePoint
from common.runs import stage_runs_root
from common.token_rows import StoredRows, TokenCache, TokenIds, lengths_of, stored_rows, token_cache
from common.tokenization import Encoded, Encoder, encode_answers
from common.tracking import Tracker
from sft.config import SFTConfig
from sft.dataset import SFTRows
from sft.module import SFTModule
from sft.reader import AnswerReader


@telling_out_of_memory(LIGHTNING_REMEDY)
def train(config: SFTConfig, splits: Splits[SFTRecord], resume: ResumePoint | None = None, *, dry_run: bool = False) -> Path:
    """Train on `splits.train`, validate on `splits.val`; returns the run directory. Raises UserError before anything is written.

    resume: where an earlier run of this config goes on. dry_run: measure a few steps in memory, say what the run would take, write nothing,
    and return the folder of runs.
    """
    check_processes(config.trainer, dry_run)
    check_trainer(config.trainer)
    processes = processes_of(config.trainer)
    check_number_of_workers(config.launch, processes)

    # 1. model and tokenizer
    model, tokenizer = load_model(config, splits.train, resume)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    freezing = apply_freezing(model, config.model_params)
    if config.model_params.gradient_checkpointing:
        recompute_activations(model)
    if config.model_params.lora is not None:
        model = add_lora(model, config.model_params.lora, seed=config.seed)
    reader = AnswerReader(model, padding_free=avoids_padding(config.trainer, config.data))
    if config.data.batching == "packed" and not reader.packs and (is_encoder_decoder or not supports_packing(model)):
        raise UserError(f"data.batching: packed rows of {type(without_adapters(model)).__name__} would see each other; use bucketed")

    # 2. rows -> ids -> batches
    encoder = Encoder(
        tokenizer,
        prompt_format=config.data.prompt_format,
        max_length=config.data.max_length,
        truncate_prompt=config.data.truncate_prompt,
        is_encoder_decoder=is_encoder_decoder,
    )
    root = stage_runs_root(config.trainer.checkpoint.dirpath, config.runs_root, "sft")
    cache = token_cache(config.data.cache_dir, root, splits.fingerprint, dry_run=dry_run)
    train_rows, train_records = encode(encoder, splits.train, config, "train", cache)
    val_rows, val_records = encode(encoder, splits.val, config, "val", cache)
    started = None if dry_run else started_rows(reader, tokenizer, (train_rows, val_rows), config, root)
    train_loader, val_loader = loaders(config, train_rows, val_rows, tokenizer.pad_token_id, reader, started)
    answered = val_records[: config.evaluation.num_generated] if config.model_params.do_compute_metrics else []
    prompts = answer_prompts(config, model, tokenizer, answered)
    total_steps = total_optimizer_steps(config.trainer, len(train_loader))

    if dry_run:
        silent = Tracker(Path(), is_main=False)
        answer = answering(config, model, tokenizer, answered, prompts, silent) if answered else None
        report_training(
            config,
            config.data,
            SFTModule(reader, config.model_params, total_steps, answer),
            model,
            encoder,
            train_loader,
            val_loader,
            total_steps=total_steps,
            processes=processes,
            padding_free=reader.packs,
            root=root,
            keeps_states=config.model_params.kept_states is not None,
        )
        return root

    # 3. a run directory, from here on things are written
    resolved = resolved_dict(config)
    saves = saves_at_most(config.trainer, len(train_loader), total_steps)
    with shared_run(config, resolved, root, resume, checkpoint_bytes(model), saves) as run_dir:
        print(freezing)
        for line in opening_lines(
            run_dir,
            parameters=model.parameters(),
            rows={"train": len(train_rows), "val": len(val_rows)},
            steps=total_steps,
            batch=batch_words(config.trainer, config.data.batch_size),
        ):
            print(line)

        # 4. train
        with Tracker.start(
            run_dir,
            stage="sft",
            config=resolved,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            is_main=not follows(),
        ) as tracker:
            answer = answering(config, model, tokenizer, answered, prompts, tracker) if answered else None
            module = SFTModule(reader, config.model_params, total_steps, answer, train_records)

            def save(directory: Path, figures: dict[str, float], step: int, extra: Callable[[Path], None]) -> None:
                manifest = new_manifest(
                    "sft",
                    tokenizer,
                    prompt_format=config.data.prompt_format,
                    max_length=config.data.max_length,
                    is_encoder_decoder=is_encoder_decoder,
                    metrics=figures,
                    data_fingerprint=splits.fingerprint,
                    config=resolved,
                    step=step,
                    processes=processes,
                )
                save_model_directory(directory, module.model, tokenizer, manifest, extra=extra)

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
            result = fit(trainer, module, train_loader, val_loader)
            finish_run(tracker, result, runs_root=root, log_model=config.wandb.log_model)
    return run_dir


def load_model(
    config: SFTConfig, train_rows: Sequence[SFTRecord], resume: ResumePoint | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: from a directory or the hub, or built with a tokenizer trained on `train_rows`.

    `trainer.ckpt_path` replaces where the weights come from. A run that goes on keeps its tokenizer.
    """
    name = config.trainer.ckpt_path or config.model_name
    if name is not None:
        tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
        model = load_generator(name, dtype=config.model_params.model_dtype, trust_remote_code=config.trust_remote_code)
    else:
        assert config.model_init is not None  # the config holds one of the two
        texts = (text for row in tokenizer_rows(train_rows) for text in (render_prompt(row.prompt), answer_text(row.answer, "qa")))
        tokenizer = train_tokenizer(texts, config.model_init.vocab_size) if resume is None else load_tokenizer(str(resume.checkpoint))
        model = build_generator(config.model_init, tokenizer, config.data.max_length, config.seed)
        model.to(getattr(torch, config.model_params.model_dtype))
    if resume is not None:
        resume.check_tokenizer(tokenizer)
    if config.model_params.dropout is not None:
        set_dropout(model, config.model_params.dropout)
    for note in set_fused(model, config.fused):
        say(note)
    return model, tokenizer


def encode(
    encoder: Encoder, records: Sequence[SFTRecord], config: SFTConfig, split: str, cache: TokenCache
) -> tuple[Sequence[Encoded], Sequence[SFTRecord]]:
    """Usable rows as ids, with their records; prints what was cut or dropped. `cache`: for ids of records that stay in their file."""
    rows: Sequence[Encoded]
    if isinstance(records, FileRecords):
        rows = stored_rows(_one_answer, encoder, records, cache, split, config.data.unusable_rows)
        kept: Sequence[SFTRecord] = rows.records
    else:
        encoded = encode_answers(encoder, records, config.data.unusable_rows)
        rows = [row for row in encoded if row is not None]
        kept = [record for row, record in zip(encoded, records, strict=True) if row is not None]
    for note in encoder.take_notes(split, remedy="raise data.max_length"):
        say(note)
    if not rows:
        raise UserError(f"{config.data.data_dir}: no usable row is left in {split}")
    return rows, kept


def _one_answer(ids: TokenIds, records: Sequence[SFTRecord], row: int) -> Encoded:
    return ids.answers(row)[0]


def loaders(
    config: SFTConfig,
    train_rows: Sequence[Encoded],
    val_rows: Sequence[Encoded],
    pad_id: int,
    reader: AnswerReader,
    started: list[StartedAnswer] | None = None,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders over this process's share of training rows, in an order that (seed, epoch) decides, and of the validation rows as they are.

    `started`: training and validation rows with the states that enter the lowest layer that trains.
    """
    data = config.data
    processes = {"world_size": processes_of(config.trainer), "rank": rank()}
    pad_to = data.max_length if data.on_tpu else None
    capacity = data.max_length if data.batching == "packed" else None
    train_plan = BatchPlan(
        lengths_of(train_rows),
        weights=train_rows.answers if isinstance(train_rows, StoredRows) else [len(row.answer_ids) for row in train_rows],
        batch_size=data.batch_size,
        accumulate=trainer_params(config.trainer).get("accumulate_grad_batches", 1),
        seed=config.seed,
        mode=data.batching,
        capacity=capacity,
        limit=batch_limit(config.trainer),
        **processes,
    )
    val_plan = BatchPlan(
        lengths_of(val_rows),
        batch_size=data.val_batch_size or data.batch_size,
        seed=config.seed,
        mode="sequential",
        **processes,
    )
    # A model that reads rows one behind the other needs no lines of them.
    own = (started[: len(train_rows)], started[len(train_rows) :]) if started is not None else (None, None)
    train_data = SFTRows(train_rows, pad_id, pad_to, None if reader.packs else capacity, reader.is_encoder_decoder, own[0])
    val_data = SFTRows(val_rows, pad_id, pad_to, None, reader.is_encoder_decoder, own[1])
    return (
        batch_loader(train_plan, train_data, num_workers=data.num_workers),
        batch_loader(val_plan, val_data, num_workers=data.num_workers),
    )


def started_rows(
    reader: AnswerReader, tokenizer: PreTrainedTokenizerBase, splits: Sequence[Sequence[Encoded]], config: SFTConfig, runs_root: Path
) -> list[StartedAnswer] | None:
    """All splits' rows with the states that enter the lowest layer that trains, where the config keeps them; `reader` starts there then.

    States that no earlier run has left are computed here.
    """
    params = config.model_params
    if params.kept_states is None:
        return None
    reader.lower = frozen_layers(reader.model, reader.trunk)
    autocast = autocast_dtype(config.trainer)
    return started_answers(
        reader.lower,
        [RewardInput(row.input_ids) for rows in splits for row in rows],
        Path(params.cache_dir) if params.cache_dir else runs_root / "state_cache",
        lower_facts(reader.lower, tokenizer, params.kept_states, autocast),
        packs=reader.packs,
        pad_id=tokenizer.pad_token_id,
        device=training_device(config.trainer),
        autocast=autocast,
        show_progress=trainer_params(config.trainer).get("enable_progress_bar", True),
    )


def answer_prompts(
    config: SFTConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[SFTRecord]
) -> list[list[int]]:
    """Ids of the validation questions that are answered, cut to leave `max_new_tokens` of the model's positions to the answer."""
    if not records:
        return []
    limit = config.data.max_length
    positions = positions_of(model.config)
    if positions is not None and not model.config.is_encoder_decoder:
        new = config.evaluation.generate_params.max_new_tokens
        if new >= positions:
            raise UserError(f"evaluation.generate_params.max_new_tokens: got {new}, but the model has {positions} positions in all")
        limit = min(limit, positions - new)
    encoder = Encoder(
        tokenizer, prompt_format=config.data.prompt_format, max_length=limit, is_encoder_decoder=bool(model.config.is_encoder_decoder)
    )
    return encoder.prompts([record.prompt for record in records])


def answering(
    config: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[SFTRecord],
    prompts: Sequence[Sequence[int]],
    tracker: Tracker,
) -> Callable[[int], dict[str, float]]:
    """A function of the step that answers fixed validation questions with the model as it is, logs them as a table, returns figures.

    Processes that train together share the questions, and all get the figures.
    """

    def answer(step: int) -> dict[str, float]:
        share = own_share(len(prompts))
        own = generate_answers(
            model,
            tokenizer,
            [prompts[index] for index in share],
            config.evaluation.generate_params,
            seed=config.seed,
            batch_size=config.data.val_batch_size or config.data.batch_size,
            use_cache=config.model_params.use_cache,
            rows=share,
        )
        gathered = Gathered()
        for index, given in zip(share, own, strict=True):
            gathered.add(index, given)
        answers: list[Answer] = gathered.rows()
        rows = [(record.prompt.question, record.answer, given.text) for record, given in zip(records, answers, strict=True)]
        tracker.table("val/answers", ("question", "original_answer", "generated_answer"), rows, step)
        figures = corpus_metrics([given.text for given in answers], [record.answer for record in records])
        return {
            **{f"val/{name}": value for name, value in figures.items()},
            "val/eos_rate": sum(given.ended for given in answers) / len(answers),
            "val/answer_tokens": sum(len(given.ids) for given in answers) / len(answers),
        }

    return answer
