"""SFT of the top layers alone: starting from kept states is training the whole model, for every way in which rows are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.models import lower_states
from common.models.answers import StartedAnswer
from common.tracking import read_metrics
from tests.runs import trap
from tests.sft.test_train_sft import config, run

TOP = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")} | {"layers_not_to_freeze": [-1]}
KEPT = "model_params.cache_states=float32"
LLAMA = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 32, "window_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "llama": {**LLAMA, "tie_word_embeddings": True},
    "cohere": {**LLAMA, "logit_scale": 0.5, "pad_token_id": 0},  # scales its logits: the whole model runs for them
}


def stage(tmp_path: Path, architecture: str, **params: Any) -> Path:
    """A config of three layers of which the last trains; a large epsilon, so that AdamW does not blow up rounding."""
    init = {"model_type": architecture, "vocab_size": 280, "config": MODELS[architecture]}
    return config(tmp_path, model_init=init, model_params={"learning_rate": 1e-2, "adam_eps": 1e-3, **TOP, **params})


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("gpt_neo", ()),
        ("gpt_neo", ("data.padding_free=false", "data.batching=packed")),
        ("gpt2", ("model_params.dropout=0", "data.on_tpu=true")),
        ("llama", ("data.padding_free=false", "data.batching=bucketed")),
        ("cohere", ("data.batching=packed", "data.on_tpu=true")),
    ],
)
def test_losses_and_weights_are_those_of_training_without_a_cache(
    tmp_path: Path, architecture: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ("trainer.params.max_steps=3", "trainer.params.log_every_n_steps=1", *overrides)
    known: list[int] = []

    def rows_and_trap(lower: Any, *arguments: Any, **keywords: Any) -> list[StartedAnswer]:
        found = lower_states.started_answers(lower, *arguments, **keywords)
        lower.below[0].forward = trap("a frozen layer")
        known.append(len(found))
        return found

    monkeypatch.setattr("sft.training.started_answers", rows_and_trap)
    path = stage(tmp_path, architecture)
    runs = [run(path, *quick), run(path, *quick, KEPT)]
    assert known == [23]  # training and validation rows
    logs = [
        [{name: line[name] for name in line if name.startswith(("train/loss", "val/"))} for line in read_metrics(directory.parents[1])]
        for directory in runs
    ]
    for expected, found in zip(*logs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert len([line for line in logs[0] if line]) >= 3
    before, after = (AutoModelForCausalLM.from_pretrained(directory).state_dict() for directory in runs)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)


def test_answers_during_validation_come_from_the_whole_model(tmp_path: Path) -> None:
    path = stage(tmp_path, "gpt_neo", do_compute_metrics=True, cache_states="bfloat16", cache_dir=str(tmp_path / "shared"))
    run(path, "trainer.params.max_steps=1", "evaluation.num_generated=2", "evaluation.generate_params.max_new_tokens=4")
    assert [*(tmp_path / "shared").glob("*/shard-*.states")]


@pytest.mark.parametrize(
    ("architecture", "params", "expected"),
    [
        ("gpt2", {}, "drop has dropout 0.1 below the lowest layer that trains"),
        ("llama", {"layers_not_to_freeze": [0, -1]}, "layers.0.self_attn.q_proj.weight of LlamaModel trains"),
        ("llama", {"freeze_emb": False}, "got float32, but the lowest layers train; it needs freeze_emb: true"),
        ("gpt_neo", {**dict.fromkeys(TOP, False), "layers_not_to_freeze": [], "lora": {"r": 2}}, "lora trains adapters in every layer"),
        (
            "gpt_neo",
            {**dict.fromkeys(TOP, False), "layers_not_to_freeze": [], "lora": {"r": 2, "target_modules": ["q_proj"]}},
            "h.0.attn.attention.q_proj.lora_A.default.weight of GPTNeoModel trains",
        ),
    ],
)
def test_where_what_lies_below_changes_one_line_says_so(tmp_path: Path, architecture: str, params: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        run(stage(tmp_path, architecture, **params), KEPT)
    [line] = refused.value.problems
    assert "model_params.cache_states: " in line and expected in line
    assert not (tmp_path / "models").exists()


def test_adapters_of_the_upper_layers_alone_start_from_kept_states_too(tmp_path: Path) -> None:
    params = {**dict.fromkeys(TOP, False), "layers_not_to_freeze": [], "lora": {"r": 2, "target_modules": ["h.2.attn.attention.q_proj"]}}
    path = stage(tmp_path, "gpt_neo", **params)
    quick = ("trainer.params.max_steps=2", "trainer.params.log_every_n_steps=1")
    losses = [
        [line["train/loss"] for line in read_metrics(run(path, *quick, *more).parents[1]) if "train/loss" in line] for more in ((), (KEPT,))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
