"""What a reward model learns from pairs."""

from __future__ import annotations

from common.prompts import answer_text, render_prompt
from common.records import PairRecord
from reward_model.classification.dataset import PairRow, collate_pairs, encode_pairs
from reward_model.classification.module import PairModule
from reward_model.config import ClassificationConfig
from reward_model.training import Objective


def pair_objective(config: ClassificationConfig) -> Objective[PairRecord, PairRow]:
    return Objective(
        stage="reward_classification",
        texts=lambda record: (render_prompt(record.prompt), *map(answer_text, (record.chosen, *record.rejected))),
        encode=lambda records, encoder, entry, cache=None, split="": encode_pairs(
            records, encoder, entry, config.model_params, config.data.unusable_rows, cache, split
        ),
        collate=collate_pairs,
        module=lambda model, total_steps, _: PairModule(model, config.model_params, total_steps, config.seed),
    )
