"""What cached states depend on, all of it, and how they are computed: as the model at rest gives them, in forwards that memory holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.chunks import CHUNK_TOKENS
from common.models import frozen_states
from common.models.backbone import RewardInput, collate_rewards
from common.models.frozen_states import cached_answers, fill, state_facts
from common.models.load import build_backbone, set_dropout, train_tokenizer
from common.models.reward import RewardModel
from common.readout_settings import ReadoutSettings
from common.schema import ModelInit
from common.state_cache import StateCache
from common.state_facts import StateFacts, code_digest, row_digests

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
ROWS = [RewardInput([5, 6, 7, 8, 1]), RewardInput([9, 1]), RewardInput([7, 7, 1])]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["a text"], 258)


def make(tokenizer: Any, model_type: str = "gpt_neo", *, width: int = 16, seed: int = 0, **readout: Any) -> RewardModel:
    sizes = {**CONFIGS[model_type], {"gpt_neo": "hidden_size", "t5": "d_model"}[model_type]: width}
    backbone = build_backbone(ModelInit(model_type=model_type, config=sizes), tokenizer, 32, seed)
    return RewardModel.from_backbone(backbone, ReadoutSettings.model_validate(readout), seed=0)


# --- what they depend on


def test_a_fact_changes_with_what_it_is_of_and_no_other_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts(model: RewardModel, own: Any = tokenizer, dtype: Any = "float32", autocast: torch.dtype | None = None) -> StateFacts:
        return state_facts(model, own, dtype, autocast)

    def configured(**values: Any) -> RewardModel:
        model = make(tokenizer)
        model.config.update(values)
        return model

    plain, encoder_decoder = facts(make(tokenizer)), facts(make(tokenizer, "t5", name="mean_pool"))
    changed: list[tuple[StateFacts, StateFacts, set[str]]] = [
        (plain, facts(make(tokenizer, seed=1)), {"weights"}),
        (plain, facts(configured(layer_norm_epsilon=1e-3)), {"config"}),
        (plain, facts(configured(_name_or_path="elsewhere", transformers_version="0")), set()),
        (plain, facts(make(tokenizer), train_tokenizer(["another"], 259)), {"tokenizer"}),
        (plain, facts(make(tokenizer, name="mean_pool")), {"token"}),
        (plain, facts(make(tokenizer, name="weighted_layers")), {"layers"}),
        (plain, facts(make(tokenizer), dtype="bfloat16"), {"dtype"}),
        (plain, facts(make(tokenizer), autocast=torch.bfloat16), {"computed_in"}),
        (plain, facts(make(tokenizer).to(torch.bfloat16)), {"computed_in", "weights"}),
        (plain, facts(make(tokenizer, width=8)), {"hidden_size", "weights", "config"}),
        (encoder_decoder, facts(make(tokenizer, "t5", name="decoder_output")), {"part", "token"}),
    ]
    monkeypatch.setattr(frozen_states, "code_digest", lambda model: "another version")
    changed.append((plain, facts(make(tokenizer)), {"code"}))
    for before, after, names in changed:
        assert {field.name for field in fields(StateFacts) if getattr(before, field.name) != getattr(after, field.name)} == names
    assert set().union(*(names for _, _, names in changed)) == {field.name for field in fields(StateFacts)} - {"format_version"}


def test_code_is_told_apart_by_versions_class_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(text: str, name: str = "Own") -> Any:
        """A transformer of the user's own."""
        (tmp_path / "own.py").write_text(text)
        monkeypatch.setitem(sys.modules, "own", SimpleNamespace(__file__=str(tmp_path / "own.py")))
        return type(name, (torch.nn.Module,), {"__module__": "own", "__qualname__": name})()

    digests = [code_digest(model("a")), code_digest(model("b")), code_digest(model("a", "Other"))]
    monkeypatch.setattr(torch, "__version__", "0")
    digests.append(code_digest(model("a")))
    monkeypatch.setattr("transformers.__version__", "0")
    digests.append(code_digest(model("a")))
    assert len(set(digests)) == 5 and code_digest(model("a")) == digests[-1]


# --- how they are computed


def test_states_are_those_of_the_model_at_rest_and_its_modes_stay(tokenizer: Any, tmp_path: Path) -> None:
    model = make(tokenizer, name="mean_pool").train()
    set_dropout(model.backbone, 0.5)
    model.readout.eval()
    [first, *_] = answers = cached_answers(model, ROWS, tmp_path, state_facts(model, tokenizer, "float32"), pad_id=0, show_progress=False)
    assert model.backbone.training and not model.readout.training
    found, lengths = first.states.rows.gather([answer.row for answer in answers])
    with torch.no_grad():
        inputs = rows_of(ROWS)
        expected = model.eval().backbone(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    assert lengths == [5, 2, 3]
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_it_is_said_that_equal_texts_are_computed_once(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tokenizer).eval()
    facts = state_facts(model, tokenizer, "float32")
    cached_answers(model, [*ROWS, ROWS[0]], tmp_path, facts, pad_id=0, show_progress=False)
    assert f"; equal texts are computed once (1 of {len(ROWS) + 1} answers repeat another one)" in capsys.readouterr().out
    cached_answers(model, ROWS, tmp_path / "other", facts, pad_id=0, show_progress=False)
    assert "equal texts" not in capsys.readouterr().out


def test_states_of_mixed_precision_are_computed_under_it(tokenizer: Any, tmp_path: Path) -> None:
    model = make(tokenizer).eval()
    found = []
    for autocast in (None, torch.bfloat16):
        facts = state_facts(model, tokenizer, "float32", autocast)
        answers = cached_answers(model, ROWS, tmp_path, facts, pad_id=0, autocast=autocast, show_progress=False)
        found.append(answers[0].states.rows.gather(range(len(ROWS)))[0][:, 0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.backbone(**rows_of(ROWS)).last_hidden_state[range(len(ROWS)), [len(row.input_ids) - 1 for row in ROWS]]
    assert (found[1] - found[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[1], expected.float(), rtol=0, atol=1e-3)


def rows_of(rows: Sequence[RewardInput]) -> dict[str, Tensor]:
    ids, mask, *_ = collate_rewards(rows, 0)
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize(
    ("in_order", "expected"),
    [
        (True, [[0], [1, 2], [3, 4], [5]]),
        (False, [[1, 3], [4, 2], [0], [5]]),  # the shortest first
    ],
)
def test_forwards_hold_as_many_padded_tokens_as_memory_does_or_one_row(
    in_order: bool, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_TOKENS, "cpu", 4)
    monkeypatch.setattr(frozen_states, "FORWARD_CHUNKS", 2)  # 8 tokens
    lengths = np.array([5, 1, 4, 2, 3, 9])
    forwards: list[list[int]] = []

    def compute(places: Sequence[int]) -> list[Tensor]:
        forwards.append(list(places))
        return [torch.full((int(lengths[place]), 2, 3), float(place)) for place in places]

    facts = StateFacts(weights="w", config="{}", code="c", tokenizer="t", part="whole", token="all", layers=2, hidden_size=3)
    cache, digests = StateCache(tmp_path, facts), row_digests([RewardInput([number]) for number in range(6)])
    fill(cache, digests, lengths, compute, in_order=in_order, show_progress=False)
    assert forwards == expected
    values, tokens = cache.rows(digests).gather(range(6))
    assert tokens == lengths.tolist() and values[:, 0, 0].tolist() == [float(row) for row in range(6) for _ in range(tokens[row])]
