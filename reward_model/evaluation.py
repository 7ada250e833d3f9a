"""What both `test_reward.py` share: the model, the rows still to score, the invariance of scores, and where the report goes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from common.config import resolved_dict
from common.errors import UserError
from common.evaluation.csv_log import CsvLog
from common.evaluation.identity import model_identity
from common.model_source import ModelSource
from common.models.backbone import RewardInput, collate_rewards, reward_inputs
from common.models.reward import Judgement, RewardScorer
from common.records import Prompt
from common.runs import write_text_atomically
from common.tracking import Tracker, wandb_mode
from reward_model.config import RewardTestConfig
from reward_model.inputs import tested_model
from reward_model.report import Report

# Rows whose scores are compared under other padding and order.
INVARIANCE_ROWS = 32


def load_scorer(config: RewardTestConfig) -> RewardScorer:
    """The reward model on the device that the config asks for. Raises UserError for a GPU that is not there."""
    if config.cuda and not torch.cuda.is_available():
        raise UserError("cuda: true, but this machine has no GPU that torch can use; set cuda: false")
    return RewardScorer(
        tested_model(config),
        batch_size=config.data.batch_size,
        device="cuda" if config.cuda else "cpu",
        trust_remote_code=config.trust_remote_code,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        truncate_prompt=config.data.truncate_prompt,
    )


def columns_of(source: ModelSource, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of a CSV of scores; those of an ensemble of readouts have their spread, too."""
    return (*columns, "spread") if source.readouts > 1 else tuple(columns)


def open_log(
    config: RewardTestConfig, source: ModelSource, data_fingerprint: str, columns: Sequence[str], *, only_resume: bool = False
) -> CsvLog:
    """The CSV of this evaluation, continued if the same model was being evaluated on the same rows; `only_resume`: else refused."""
    limits = {"max_length": config.data.max_length, "max_prompt_length": config.data.max_prompt_length}
    identity = {"model": model_identity(source), "data": data_fingerprint, "split": config.data.split, **limits}
    log = CsvLog(config.test_params.log_file, columns_of(source, columns), identity, only_resume=only_resume)
    if log.note:
        print(log.note)
    return log


def judge_unique(scorer: RewardScorer, rows: Sequence[tuple[Prompt, str]]) -> list[Judgement]:
    """Final scores of (prompt, answer) rows; one that occurs several times is scored once."""
    unique = list(dict.fromkeys(rows))
    judged = dict(zip(unique, scorer.judge([prompt for prompt, _ in unique], [answer for _, answer in unique]), strict=True))
    return [judged[row] for row in rows]


def invariance(scorer: RewardScorer, rows: Sequence[tuple[Prompt, str]], seed: int) -> dict[str, float]:
    """Largest difference of a row's raw score from its score alone and unpadded: in batches, in other batches, under more padding."""
    chosen = random.Random(seed).sample(list(dict.fromkeys(rows)), min(INVARIANCE_ROWS, len(set(rows))))
    inputs = [reward_inputs(scorer.encoder, scorer.model.entry, prompt, answer) for prompt, answer in chosen]
    alone = [_batch_scores(scorer, [row])[0] for row in inputs]
    order = list(range(len(inputs)))
    random.Random(seed + 1).shuffle(order)
    results = {
        "in batches": _scored_in_order(scorer, inputs, list(range(len(inputs)))),
        "in another order": _scored_in_order(scorer, inputs, order),
        "under more padding": [_batch_scores(scorer, [row], _padded(scorer, row))[0] for row in inputs],
    }
    return {
        name: max((abs(score - single) for score, single in zip(scores, alone, strict=True)), default=0.0)
        for name, scores in results.items()
    }


def _padded(scorer: RewardScorer, row: RewardInput) -> int:
    return max(scorer.encoder.max_length, len(row.input_ids), len(row.decoder_input_ids or ()))


def _scored_in_order(scorer: RewardScorer, inputs: Sequence[RewardInput], order: Sequence[int]) -> list[float]:
    """Scores in the inputs' order when batches are cut from `order`."""
    scores = [0.0] * len(inputs)
    for start in range(0, len(order), scorer.batch_size):
        chunk = order[start : start + scorer.batch_size]
        for index, score in zip(chunk, _batch_scores(scorer, [inputs[index] for index in chunk]), strict=True):
            scores[index] = score
    return scores


def _batch_scores(scorer: RewardScorer, inputs: Sequence[RewardInput], pad_to: int | None = None) -> list[float]:
    batch = collate_rewards(inputs, scorer.tokenizer.pad_token_id, pad_to).to(scorer.device)
    with torch.inference_mode():
        scores: list[float] = scorer.model(*batch).tolist()
    return scores


def publish(report: Report, log: CsvLog, config: RewardTestConfig, stage: str) -> Path:
    """Print the report, write it as JSON beside the CSV, and hand figures and scores to wandb where it is asked for."""
    summary = log.path.with_suffix(".summary.json")
    write_text_atomically(summary, json.dumps(report.json(), indent=2, ensure_ascii=False) + "\n")
    print(f"\n{report}\n\nscores: {log.path}\nsummary: {summary}")
    if wandb_mode(config.wandb) != "disabled":
        folder = log.path.with_suffix(".tracking")
        folder.mkdir(exist_ok=True)
        with Tracker.start(folder, stage=f"{stage}_test", config=resolved_dict(config), wandb=config.wandb) as tracker:
            tracker.log({f"test/{figure.name}": figure.value for figure in report.figures}, step=0)
            rows = [[row[column] for column in log.columns] for row in log.rows]
            tracker.table(config.test_params.table_name, log.columns, rows, step=0)
    return summary
