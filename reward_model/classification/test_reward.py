"""Score the pairs of a split with a trained reward model and say whether it can be trusted.

Writes a CSV of both scores and the margin of every pair (continued where it stopped when started again) and a summary: accuracy
against "the longer answer wins" with intervals by question, calibration, dependence on length, padding and batch order.
It trains nothing and reads no split but the one named.

    python test_reward.py --config_file configs/test_config.yaml [section.key=value ...]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from operator import sub
from pathlib import Path
from typing import TYPE_CHECKING

STAGE_DIR = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[0] = str(STAGE_DIR.parents[1])

from common.config import parse_command_line
from common.errors import run_main
from common.evaluation.csv_log import add_resume_option
from common.records import PairRecord, question_key
from reward_model.classification.report import ScoredPair, pair_report
from reward_model.config import RewardTestConfig
from reward_model.inputs import breakdown_values, prompt_length, read_test_data, tested_model

if TYPE_CHECKING:
    from common.models.reward import RewardScorer

COLUMNS = ("question", "chosen", "rejected", "chosen_score", "rejected_score", "margin")


def main(argv: Sequence[str]) -> int:
    invocation = parse_command_line(RewardTestConfig, STAGE_DIR, argv, description=__doc__ or "", add_options=add_resume_option)
    config = invocation.config
    invocation.print_notes()
    source, splits = read_test_data(config, "pair")
    records: Sequence[PairRecord] = splits.split(config.data.split)
    pairs = [(record, rejected) for record in records for rejected in record.rejected]
    values = breakdown_values([record for record, _ in pairs], config.test_params.breakdown_by)
    title = f"{tested_model(config)}: {len(pairs)} pairs, {config.data.split} split of {config.data.data_dir}"
    for note in splits.notes:
        print(f"note: {note}")
    if invocation.validate_only:
        invocation.say_valid(title)
        return 0

    from reward_model import evaluation

    log = evaluation.open_log(config, source, splits.fingerprint, COLUMNS, only_resume=invocation.options.only_resume)
    scorer = evaluation.load_scorer(config)
    for start in range(len(log.rows), len(pairs), config.test_params.save_steps):
        log.append(scored_rows(scorer, pairs[start : start + config.test_params.save_steps]))
        print(f"{len(log.rows)} of {len(pairs)} pairs scored", flush=True)
    for note in scorer.encoder.take_notes(config.data.split, remedy="raise data.max_length or data.max_prompt_length"):
        print(f"note: {note}")

    scored = [
        ScoredPair(
            question=question_key(record.prompt),
            chosen_score=float(row["chosen_score"]),
            rejected_score=float(row["rejected_score"]),
            chosen_length=len(record.chosen),
            rejected_length=len(rejected),
            prompt_length=prompt_length(record.prompt),
            spread=float(row["spread"]) if "spread" in row else None,
            values=row_values,
        )
        for (record, rejected), row, row_values in zip(pairs, log.rows, values, strict=True)
    ]
    differences = evaluation.invariance(scorer, [(record.prompt, record.chosen) for record in records], config.seed)
    report = pair_report(scored, differences, config.test_params.bootstrap_samples, config.seed, title, config.test_params.breakdown_by)
    evaluation.publish(report, log, config, "reward_classification")
    return 0


def scored_rows(scorer: RewardScorer, pairs: Sequence[tuple[PairRecord, str]]) -> list[dict[str, object]]:
    """CSV rows of (record, rejected answer) pairs; an answer that stands in several pairs is scored once.

    `spread`: standard deviation of the margins that the members of an ensemble give.
    """
    from reward_model.evaluation import judge_unique

    chosen = judge_unique(scorer, [(record.prompt, record.chosen) for record, _ in pairs])
    rejected = judge_unique(scorer, [(record.prompt, answer) for record, answer in pairs])
    return [
        {
            "question": record.prompt.question,
            "chosen": record.chosen,
            "rejected": answer,
            "chosen_score": high.score,
            "rejected_score": low.score,
            "margin": high.score - low.score,
        }
        | ({"spread": statistics.pstdev(map(sub, high.members, low.members))} if len(high.members) > 1 else {})
        for (record, answer), high, low in zip(pairs, chosen, rejected, strict=True)
    ]


if __name__ == "__main__":
    run_main(main)
