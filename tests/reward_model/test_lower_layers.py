"""The lower layers alone are frozen: what enters the lowest trained one is computed once, and training from there is training the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import read_manifest
from common.errors import UserError
from common.models import lower_states
from common.models.answers import StartedAnswer
from common.models.reward import RewardModel
from reward_model.classification import train_reward as train_pairs
from reward_model.regression import train_reward as train_scores
from tests.runs import trap

MAINS = {"pair": train_pairs.main, "score": train_scores.main}
QUICK = ("trainer.params.max_steps=2", "trainer.params.val_check_interval=2", "trainer.params.log_every_n_steps=1")
TOP = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")} | {"layers_not_to_freeze": [-1]}
LAYERS = {"gpt_neo": "num_layers", "llama": "num_hidden_layers", "bert": "num_hidden_layers"}


def run(kind: str, config: Path, *overrides: str) -> Path:
    """Train and return `models/latest`, resolved."""
    assert MAINS[kind](["--config_file", str(config), *overrides]) == 0
    return (config.parent / "models" / "latest").resolve()


def settings(architecture: str, **params: Any) -> dict[str, Any]:
    """Sections of a config: three layers of which the last trains; a large epsilon, so that AdamW does not blow up rounding."""
    model = {} if architecture == "t5" else {"model_init": {"config": {LAYERS[architecture]: 3}}}
    return {**model, "model_params": {**TOP, "adam_eps": 1e-3, **params}}


def logged(directory: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (directory.parents[1] / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in row.items() if name.startswith(("train/loss", "val/", "train/margin"))} for row in rows]
    return [row for row in figures if row]


@pytest.fixture
def lower_layers_run_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the lowest layer refuse to run once its states are known; the number of answers whose states these are."""
    known: list[int] = []

    def answers_and_trap(lower: Any, *arguments: Any, **keywords: Any) -> list[StartedAnswer]:
        found = lower_states.started_answers(lower, *arguments, **keywords)
        lower.below[0].forward = trap("a frozen layer")
        known.append(len(found))
        return found

    monkeypatch.setattr("reward_model.training.started_answers", answers_and_trap)
    return known


@pytest.mark.parametrize(
    ("kind", "architecture", "readout", "overrides"),
    [
        ("pair", "gpt_neo", {"name": "last_token"}, ()),
        ("pair", "gpt_neo", {"name": "last_token"}, ("data.padding_free=false",)),
        ("score", "llama", {"name": "weighted_layers", "n_layers": 2}, ("model_params.gradient_checkpointing=true",)),
        ("pair", "llama", {"name": "mean_pool", "ensemble": 2}, ("data.num_workers=1",)),
        ("score", "bert", {"name": "layerwise_attention", "n_layers": 2, "attention_size": 8}, ()),  # dropout above alone
        ("pair", "bert", {"name": "last_token"}, ("data.on_tpu=true",)),
    ],
)
def test_losses_scores_and_weights_are_those_of_training_without_a_cache(
    kind: str, architecture: str, readout: dict[str, Any], overrides: tuple[str, ...], write_config, lower_layers_run_once: list[int]
) -> None:
    config = write_config(kind, architecture, **settings(architecture, readout=readout))
    plain = run(kind, config, *QUICK, *overrides)
    assert not (config.parent / "models" / "state_cache").exists()
    cached = run(kind, config, *QUICK, *overrides, "model_params.cache_states=float32")
    assert lower_layers_run_once == [76]
    before, after = logged(plain), logged(cached)
    assert len(before) == len(after) > 2
    for expected, found in zip(before, after, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    manifests = [read_manifest(directory) for directory in (plain, cached)]
    assert manifests[0] is not None and manifests[1] is not None
    for name in ("score_mean", "score_scale"):
        assert getattr(manifests[1], name) == pytest.approx(getattr(manifests[0], name), abs=1e-5)
    weights = [RewardModel.load(directory).state_dict() for directory in (plain, cached)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)
    [folder] = (config.parent / "models" / "state_cache").iterdir()
    facts = json.loads((folder / "cache.json").read_text())
    assert (facts["part"], facts["token"], facts["layers"], facts["hidden_size"]) == ("entering layer 2", "all", 1, 32)


def test_the_cache_is_of_what_lies_below_alone(write_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("pair", write_config("pair", **settings("gpt_neo", cache_states="bfloat16")), *QUICK)
    out = capsys.readouterr().out
    assert "note: states of 76 answers take " in out and "note: every token's state that enters layer 2: " in out
    # the first run's model has other weights above, the same below
    again = {"model_init": None, "model_name": str(first), "model_params": {**TOP, "cache_states": "bfloat16"}}
    run("pair", write_config("pair", **again), *QUICK, "seed=43")
    out = capsys.readouterr().out
    assert "states of 76 answers are there already: " in out and " take " not in out
    run("pair", write_config("pair", **again), *QUICK, "model_params.layers_not_to_freeze=[-2,-1]")
    assert "every token's state that enters layer 1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "params", "overrides", "expected"),
    [
        (
            "gpt_neo",
            {"readout": {"name": "weighted_layers"}},
            (),
            "readout.n_layers: weighted_layers reads 3 layers, of which 1 lie below those that cache_states keeps; set it to 2 at",
        ),
        ("gpt_neo", {"layers_not_to_freeze": [0]}, (), "model_params.cache_states: h.0.ln_1.weight of GPTNeoModel trains"),
        ("gpt_neo", {}, ("model_params.dropout=0.1",), "model_params.cache_states: drop has dropout 0.1 below the lowest layer"),
        ("t5", {"readout": {"name": "mean_pool"}}, (), "model_params.cache_states: the layers of T5Model hand on more"),
        ("gpt_neo", {"freeze_emb": False}, (), "model_params.cache_states: got float32, but the lowest layers train; it needs freeze_emb"),
        ("gpt_neo", {"do_freeze": False}, (), "it needs freeze_emb: true, freeze_ln: true, freeze_attn: true, freeze_ff: true"),
    ],
)
def test_where_what_lies_below_changes_one_line_says_so(
    architecture: str, params: dict[str, Any], overrides: tuple[str, ...], expected: str, write_config
) -> None:
    config = write_config("pair", architecture, **settings(architecture, cache_states="float32", **params))
    with pytest.raises(UserError) as refused:
        run("pair", config, *overrides)
    [line] = refused.value.problems
    assert expected in line
    assert not list((config.parent / "models").glob("*"))
