"""A frozen backbone: its states are computed once, and training on them is training on the backbone itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import read_manifest, verify_directory
from common.errors import UserError, run_main
from common.models.frozen_states import cached_answers
from common.models.reward import RewardModel
from reward_model.classification import train_reward as train_pairs
from reward_model.regression import train_reward as train_scores
from tests.runs import trap

MAINS = {"pair": train_pairs.main, "score": train_scores.main}
QUICK = ("trainer.params.max_steps=2", "trainer.params.val_check_interval=1", "trainer.params.log_every_n_steps=1")
READOUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("pair", "gpt_neo", {"name": "last_token"}),
    ("score", "llama", {"name": "mean_pool", "hidden_sizes": [8]}),
    ("pair", "bert", {"name": "layerwise_attention", "attention_size": 8}),
    ("score", "t5", {"name": "attention_pooled_encoder"}),
    ("pair", "t5", {"name": "decoder_output"}),
    ("score", "t5", {"name": "last_token"}),
]


def run(kind: str, config: Path, *overrides: str) -> Path:
    """Train and return `models/latest`, resolved."""
    assert MAINS[kind](["--config_file", str(config), *overrides]) == 0
    return (config.parent / "models" / "latest").resolve()


def logged(directory: Path) -> list[dict[str, float]]:
    """What the run of a model directory logged, without times."""
    rows = [json.loads(line) for line in (directory.parents[1] / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in row.items() if name.startswith(("train/loss", "val/", "train/margin"))} for row in rows]
    return [row for row in figures if row]


@pytest.mark.parametrize(("kind", "architecture", "readout"), READOUTS)
def test_losses_scores_and_weights_are_those_of_training_without_a_cache(
    kind: str, architecture: str, readout: dict[str, Any], write_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(kind, architecture, model_params={"freeze_backbone": True, "readout": readout})
    plain = run(kind, config, *QUICK, "model_params.cache_states=never")
    assert not (config.parent / "models" / "state_cache").exists()

    def answers_and_trap(*arguments: Any, **keywords: Any) -> Any:
        found = cached_answers(*arguments, **keywords)
        monkeypatch.setattr(RewardModel, "_states", trap("the backbone"))  # from now on, in training, validation and score moments
        return found

    monkeypatch.setattr("reward_model.training.cached_answers", answers_and_trap)
    cached = run(kind, config, *QUICK)
    before, after = logged(plain), logged(cached)
    assert len(before) == len(after) > 2
    for expected, found in zip(before, after, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert verify_directory(cached) == []
    manifests = [read_manifest(directory) for directory in (plain, cached)]
    assert manifests[0] is not None and manifests[1] is not None
    for name in ("score_mean", "score_scale"):
        assert getattr(manifests[1], name) == pytest.approx(getattr(manifests[0], name), abs=1e-5)
    assert manifests[0].files.keys() == manifests[1].files.keys()
    weights = [RewardModel.load(directory).state_dict() for directory in (plain, cached)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=0 if name.startswith("backbone") else 1e-5)


def test_the_size_is_said_once_and_a_second_run_reads_what_the_first_wrote(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config("pair", model_params={"freeze_backbone": True, "readout": {"name": "mean_pool"}})
    run("pair", config, *QUICK)
    out = capsys.readouterr().out
    assert "note: states of 76 answers take " in out and f"in {config.parent / 'models' / 'state_cache'}" in out
    assert "this readout reads every token" in out
    run("pair", config, *QUICK, "model_params.learning_rate=1e-4", "seed=43")
    out = capsys.readouterr().out
    assert "states of 76 answers take" in out  # a seed makes another backbone here: model_init draws it
    run("pair", config, *QUICK, "model_params.learning_rate=1e-5")
    out = capsys.readouterr().out
    assert "note: states of 76 answers are there already: " in out and "take" not in out


def test_a_readout_of_fewer_layers_reads_what_a_wider_one_left(write_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = {"freeze_backbone": True, "cache_dir": str(tmp_path / "shared"), "cache_states": "bfloat16"}
    run("pair", write_config("pair", model_params={**shared, "readout": {"name": "weighted_layers"}}), *QUICK)
    capsys.readouterr()
    run("pair", write_config("pair", model_params={**shared, "readout": {"name": "last_token"}}), *QUICK)
    assert "states of 76 answers are there already" in capsys.readouterr().out
    [folder] = (tmp_path / "shared").iterdir()
    facts = json.loads((folder / "cache.json").read_text())
    assert (facts["layers"], facts["token"], facts["dtype"]) == (2, "last", "bfloat16")


def test_ctrl_c_while_states_are_computed_says_what_is_kept_and_what_goes_on(
    write_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("pair", model_params={"freeze_backbone": True})
    arguments = ["--config_file", str(config), *QUICK]
    rows, calls = RewardModel.state_rows, iter(range(9))

    def twice(model: RewardModel, batch: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rows(model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(RewardModel, "state_rows", twice)
        patched.setattr("common.models.frozen_states.CHUNK_TOKENS", {"cpu": 50, "cuda": 50})
        patched.setattr("sys.argv", ["train_reward.py", *arguments])
        with pytest.raises(SystemExit) as left:
            run_main(train_pairs.main)
    assert left.value.code == 130
    assert "interrupted: the states computed so far are kept in " in (err := capsys.readouterr().err) and "Traceback" not in err
    run("pair", config, *QUICK)  # the same command
    assert "answers are there already" in capsys.readouterr().out


def test_workers_read_the_cache_themselves(write_config) -> None:
    config = write_config("pair", model_params={"freeze_backbone": True, "readout": {"name": "mean_pool"}})
    alone = run("pair", config, *QUICK)
    beside = run("pair", config, *QUICK, "data.num_workers=1")
    assert logged(alone) == logged(beside)


def test_a_full_disk_is_one_line_before_anything_is_written(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**28}))
    config = write_config("pair", model_params={"freeze_backbone": True})
    with pytest.raises(UserError, match=r"state_cache: the states take .* name another model_params\.cache_dir"):
        run("pair", config, *QUICK)
    assert not list((config.parent / "models").glob("*"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze_backbone": True, "lora": {}}, "model_params.lora: adapters train it, and freeze_backbone is true"),
        ({"freeze_backbone": True, "freeze_emb": True}, "model_params.freeze_emb: nothing is left for freeze_"),
        ({"freeze_backbone": True, "do_freeze": True}, "model_params.do_freeze: nothing is left for freeze_"),
        ({"freeze_backbone": True, "layers_not_to_freeze": [-1]}, "model_params.layers_not_to_freeze: got [-1], and freeze_backbone"),
        ({"freeze_backbone": True, "dropout": 0.1}, "model_params.dropout: got 0.1; it runs without dropout"),
        ({"freeze_backbone": True, "gradient_checkpointing": True}, "model_params.gradient_checkpointing: got true, but no activations"),
        (
            {"cache_states": "bfloat16", "freeze_emb": True, "freeze_attn": True, "freeze_ff": True},
            "model_params.cache_states: got bfloat16, but the lowest layers train; it needs freeze_ln: true, or freeze_backbone: true",
        ),
        ({"cache_dir": "somewhere"}, "model_params.cache_dir: got "),
    ],
)
def test_settings_that_cannot_act_together_are_refused(settings: dict[str, Any], expected: str, write_config) -> None:
    with pytest.raises(UserError) as refused:
        run("pair", write_config("pair", model_params=settings))
    assert expected in str(refused.value)
