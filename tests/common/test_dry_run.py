"""What a dry run says follows from what was measured: times on a line through two costs, lengths, sizes, room on the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.disk import nearest
from common.dry_run import Cost, disk_problems, length_lines, model_bytes, seconds_of
from common.tokenization import TextLengths


def test_batches_between_two_measured_ones_take_times_between_theirs() -> None:
    longest, typical = Cost(300, 4.0), Cost(100, 2.0)  # 1 s and 10 ms a token
    assert seconds_of([100, 200, 300], longest, typical) == pytest.approx(2.0 + 3.0 + 4.0)
    assert seconds_of([0], longest, typical) == pytest.approx(1.0)


@pytest.mark.parametrize("longest", [Cost(100, 9.0), Cost(300, 1.0)])
def test_one_length_or_a_longest_batch_that_was_quicker_costs_every_batch_the_same(longest: Cost) -> None:
    assert seconds_of([10, 1000], longest, Cost(100, 2.0)) == pytest.approx(4.0)


def test_no_batch_takes_less_than_nothing() -> None:
    # Steeper than through 0: time is taken as proportional to tokens.
    assert seconds_of([50], Cost(200, 9.0), Cost(100, 2.0)) == pytest.approx(1.0)


def test_lengths_are_those_of_the_texts_before_cutting() -> None:
    prompts, answers = TextLengths(), TextLengths(cut=2, cut_tokens=7)
    prompts.tokens.extend(range(100, 0, -1))
    answers.tokens.extend([4, 1200, 4])
    assert length_lines("train", {"prompt": prompts, "answer": answers, "other": TextLengths()}) == [
        "train prompts: 1 / 51 / 95 / 100 tokens (min / median / 95 % / max), none cut",
        "train answers: 4 / 4 / 4 / 1,200 tokens (min / median / 95 % / max), 2 of 3 cut (7 tokens)",
    ]


def test_a_weight_with_two_names_is_saved_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False), "c": nn.Linear(2, 1, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"].to(torch.bfloat16)
    assert model_bytes(model, SimpleNamespace()) == 4 * 12 + 2 * 2


def test_a_place_that_is_too_small_or_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models" / "sft"
    assert nearest(root) == tmp_path
    assert disk_problems(tmp_path, root, 2048, 2048) == []
    [problem] = disk_problems(tmp_path, root, 4096, 2048)
    assert str(root) in problem and "need 4.0 KiB, 2.0 KiB are free" in problem and "keep_last" in problem
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert disk_problems(tmp_path, root, 0, 1) == [f"{root}: {tmp_path} cannot be written"]
