"""The sample files in llm-on-ray's formats: each of them is read as it is by the stage that its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.record_types import RecordKind
from common.records import read_splits
from common.row_formats import find_format

DATA = Path(__file__).resolve().parents[2] / "examples/data"
KEYS = {
    "sample_finetune_data.jsonl": ["instruction", "context", "response"],
    "sample_rm_data.jsonl": ["prompt", "chosen", "rejected"],
    "sample_ppo_data.jsonl": ["prompt"],
}


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        ("sample_finetune_data.jsonl", "sft", "instruction"),
        ("sample_rm_data.jsonl", "pair", "prompt_pair"),
        ("sample_ppo_data.jsonl", "prompt", "prompt"),
    ],
)
def test_each_stage_reads_every_row_of_its_sample_file(name: str, kind: RecordKind, form: str) -> None:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    assert all(list(json.loads(line)) == KEYS[name] for line in lines)
    found = find_format(KEYS[name], kind)
    assert found is not None and found.name == form
    splits = read_splits(str(DATA / name), kind, validation_split_percentage=20)  # type: ignore[call-overload]
    assert len(splits.train) + len(splits.val) == len(lines) >= 12
    assert len(splits.val) == round(len(lines) * 0.2)


def test_samples_have_contexts_and_dialogues() -> None:
    sft = read_splits(str(DATA / "sample_finetune_data.jsonl"), "sft", validation_split_percentage=0).train
    pairs = read_splits(str(DATA / "sample_rm_data.jsonl"), "pair", validation_split_percentage=0).train
    prompts = read_splits(str(DATA / "sample_ppo_data.jsonl"), "prompt", validation_split_percentage=0).train
    assert sum(bool(row.prompt.context) for row in sft) == 5
    assert sum(bool(row.prompt.history) for row in pairs) == 2
    assert sum(bool(row.prompt.history) for row in prompts) == 2
