"""`train_sft.py` from end to end on a handful of rows: what it writes, what it learns, what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from common.checkpoint import read_manifest, verify_directory
from common.errors import UserError
from common.run_lock import locked
from common.tracking import read_metrics
from sft.module import SFTModule
from sft.train_sft import main
from tests.runs import left_by, stop_at

ROWS = [
    {"Question": f"What is {a} and {b}?", "Answer": f"It is {a + b}, friend."} for a in range(5) for b in range(5)
]  # fmt: skip


def config(tmp_path: Path, **changes: Any) -> Path:
    """A config file in its own stage folder, with data beside it; `changes` replace whole sections or merge into them."""
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "data.json").write_text(json.dumps({"train": ROWS[:20], "val": ROWS[20:23], "test": ROWS[23:]}))
    settings: dict[str, Any] = {
        "data": {"data_dir": str(tmp_path / "data.json"), "batch_size": 5, "max_length": 48},
        "model_init": {
            "model_type": "gpt_neo",
            "vocab_size": 280,
            "config": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 8},
        },
        "model_params": {"learning_rate": 1e-2},
        "trainer": {
            "checkpoint": {"dirpath": str(tmp_path / "models")},
            "params": {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0},
        },
        "wandb": {"mode": "disabled"},
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) and isinstance(settings.get(key), dict) else value
    path = tmp_path / "configs" / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(path: Path, *overrides: str) -> Path:
    assert main(["--config_file", str(path), *overrides]) == 0
    return (path.parent.parent / "models" / "latest").resolve()


@pytest.mark.usefixtures("picture")
def test_a_run_writes_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    directory = run(config(tmp_path))
    assert verify_directory(directory) == []
    manifest = read_manifest(directory)
    assert manifest is not None and (manifest.stage, manifest.prompt_format, manifest.step) == ("sft", "qa", 4)
    run_dir = tmp_path / "models" / "desc-run,index-0"
    for name in ("config.yaml", "metrics.jsonl", "metrics.csv", "curves.png", "summary.json", "log.txt", "best", "last"):
        assert (run_dir / name).exists(), name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # Plain transformers gives the validation loss that the run logged.
    nats, tokens = 0.0, 0
    for row in ROWS[20:23]:
        prompt = tokenizer(f"Question: {row['Question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(" " + row["Answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nats -= sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer))
        tokens += len(answer)
    logged = [line["val/loss"] for line in read_metrics(run_dir) if "val/loss" in line]
    assert logged[-1] == pytest.approx(nats / tokens, rel=1e-5)


def test_what_was_read_and_cut_is_printed_and_stands_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = {"train": [{**row, "Score": 1} for row in ROWS[:20]], "val": ROWS[20:23]}
    path = config(tmp_path, data={"max_length": 22})
    (tmp_path / "data.json").write_text(json.dumps(scored))
    log = (run(path).parents[1] / "log.txt").read_text().splitlines()
    assert any(line.startswith("note: ") and "SFT imitates every answer alike" in line for line in log)
    [line] = [line for line in log if line.startswith("note: train: ")]
    assert "20 prompts cut (" in line and line.endswith(" tokens); raise data.max_length to keep them")
    assert line in capsys.readouterr().out


def test_it_learns_and_monitors_generated_answers(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        model_params={"learning_rate": 1e-2, "do_compute_metrics": True, "use_cache": True},
        evaluation={"num_generated": 3, "generate_params": {"max_new_tokens": 16}},
    )
    run(path, "trainer.params.max_epochs=8", "trainer.checkpoint.monitor=val_loss")
    lines = read_metrics(tmp_path / "models" / "desc-run,index-0")
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert all(name in lines[-1] or any(name in line for line in lines) for name in ("val/bleu", "val/rougeL_fmeasure", "val/eos_rate"))
    assert list((tmp_path / "models" / "desc-run,index-0" / "tables").glob("*.jsonl"))


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_every_kind_of_batch_trains(tmp_path: Path, batching: str) -> None:
    run(config(tmp_path), f"data.batching={batching}", "trainer.params.max_steps=2", "trainer.params.accumulate_grad_batches=2")


def test_an_encoder_decoder_trains_through_the_same_script(tmp_path: Path) -> None:
    init = {"model_type": "t5", "vocab_size": 280, "config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}}
    directory = run(config(tmp_path, model_init=init), "trainer.params.max_steps=2")
    assert AutoModelForSeq2SeqLM.from_pretrained(directory).config.is_encoder_decoder
    manifest = read_manifest(directory)
    assert manifest is not None and manifest.is_encoder_decoder


def test_lora_and_gradient_checkpointing_train_and_save_merged_weights(tmp_path: Path) -> None:
    params = {"learning_rate": 1e-2, "gradient_checkpointing": True, "lora": {"r": 2}}
    directory = run(config(tmp_path, model_params=params), "trainer.params.max_steps=2")
    assert (directory / "adapter" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(directory)


def test_a_run_starts_from_a_directory_and_from_ckpt_path(tmp_path: Path) -> None:
    first = run(config(tmp_path))
    again = config(tmp_path, model_init=None, model_name=str(first))
    second = run(again, "trainer.params.max_steps=1", "data.on_tpu=true")
    assert second != first
    third = run(again, f"trainer.ckpt_path={second}", "trainer.params.max_steps=1", "model_params.learning_rate=1e-12")
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (second, third))
    for name, value in before.items():
        torch.testing.assert_close(value, after[name], atol=1e-9, rtol=0)


def test_an_unknown_monitor_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of: val/loss, val/perplexity, val/token_accuracy"):
        main(["--config_file", str(config(tmp_path)), "trainer.checkpoint.monitor=val/bleu"])
    assert not (tmp_path / "models").exists()


def test_an_unknown_generation_option_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.generate_params.*num_beam.*num_beams"):
        run(config(tmp_path), "evaluation.generate_params.num_beam=3")


def test_validate_reads_everything_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config_file", str(config(tmp_path)), "--validate"]) == 0
    assert "20 train, 3 val, 2 test" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=5000", "exceeds the 64 positions"),
        ("data.max_length=5", "expected at least 7"),
        ("model_init.config.num_head=4", "did you mean num_heads"),
        ("model_init.model_type=gpt9", "got gpt9"),
    ],
)
def test_validate_refuses_what_training_would(tmp_path: Path, override: str, message: str) -> None:
    path = config(tmp_path, model_init={"vocab_size": 280, "config": {"hidden_size": 16, "max_position_embeddings": 64}})
    with pytest.raises(UserError, match=message):
        main(["--config_file", str(path), override, "--validate"])


@pytest.mark.parametrize("model_type", ["opt", "t5"])
def test_packing_is_refused_where_rows_would_see_each_other(tmp_path: Path, model_type: str) -> None:
    small = {"opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}}
    init = {
        "model_type": model_type,
        "vocab_size": 280,
        "config": small.get(model_type, {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}),
    }
    with pytest.raises(UserError, match=r"data\.batching: packed rows"):
        main(["--config_file", str(config(tmp_path, model_init=init)), "data.batching=packed", "data.padding_free=false"])
    assert not (tmp_path / "models").exists()


# --- going on ----------------------------------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the process to stop in the training step after `step` of them."""
    stop_at(monkeypatch, SFTModule, "training_step", lambda module: module.trainer.global_step == step)


@pytest.mark.parametrize(
    ("params", "steps"),
    [
        ({}, range(8)),
        ({"lora": {"r": 2}}, (3,)),
        ({"freeze_emb": True, "freeze_ff": True}, (5,)),
        ({"optimizer": "Adafactor", "lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}, (3,)),
        ({"optimizer": "SGD", "momentum": 0.9, "lr_scheduler": "inverse_sqrt"}, (2,)),
    ],
    ids=["whole", "lora", "frozen", "adafactor", "sgd"],
)
def test_a_stopped_run_goes_on_with_the_same_bits(
    tmp_path: Path, params: dict[str, Any], steps: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(
        tmp_path,
        model_params={"dropout": 0.2, **params},
        trainer={"params": {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1}},
    )
    run(path, "desc=whole")
    expected = left_by(tmp_path / "models" / "desc-whole,index-0")
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            stop_after(patch, step)
            main(["--config", str(path), f"desc=stopped-{step}"])
        assert left.value.code == 143
        assert main(["--config", str(path), f"desc=stopped-{step}", "--resume"]) == 0
        assert left_by(tmp_path / "models" / f"desc-stopped-{step},index-0") == expected, step


def test_what_a_resumed_run_says_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path)
    with pytest.raises(UserError, match="no run of desc 'run' there to go on with"):
        main(["--config", str(path), "--resume"])
    (tmp_path / "models" / "desc-killed_at_once,index-0").mkdir(parents=True)
    with pytest.raises(UserError, match="the run has no checkpoint to go on from yet; start it anew"):
        main(["--config", str(path), "desc=killed_at_once", "--resume"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        main(["--config", str(path)])
    run_dir = tmp_path / "models" / "desc-run,index-0"
    with pytest.raises(UserError) as refused:
        main(["--config", str(path), "--resume", "seed=7", "data.batch_size=4", "trainer.checkpoint.keep_last=3"])
    assert sorted(problem.partition(":")[0] for problem in refused.value.problems) == [
        "--resume goes on under the settings of " + str(run_dir / "config.yaml"),
        "data.batch_size",
        "seed",
    ]
    rows = json.loads((tmp_path / "data.json").read_text())
    rows["train"][0]["Answer"] += "!"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="the training data have changed since the run began"):
        main(["--config", str(path), "--resume"])
    with locked(run_dir), pytest.raises(UserError, match=rf"another process writes this run \(process {os.getpid()}\)"):
        main(["--config", str(path), "--resume", "--allow_data_change"])
    capsys.readouterr()
    (tmp_path / "other").symlink_to(tmp_path / "models", target_is_directory=True)
    with locked(run_dir), pytest.raises(UserError, match=f"^{tmp_path}/other/desc-run,index-0: another process"):  # as it was named
        main(["--config", str(path), "--resume", str(tmp_path / "other" / "desc-run,index-0"), "--allow_data_change"])
    with locked(run_dir), pytest.raises(UserError, match=f"^{run_dir}: another process"):
        main(["--config", str(path), "--resume", str(tmp_path / "other" / "desc-run,index-0" / "last"), "--allow_data_change"])
    assert main(["--config", str(path), "--resume", str(run_dir), "--allow_data_change", "trainer.checkpoint.keep_last=3"]) == 0
    said = capsys.readouterr().out
    assert "keep_last: 3 from here on, 2 before" in said and "is not what an undisturbed run would give" in said
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main(["--config", str(path), "--resume", "--allow_data_change"]) == 0
    assert "is finished (step 4); nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, trainer={"checkpoint": {"dirpath": str(tmp_path / "models"), "every_n_train_steps": 1}})
    run(path)
    run_dir = tmp_path / "models" / "desc-run,index-0"
    expected = left_by(run_dir)
    newest = run_dir / "checkpoints" / "step-000004" / "training_state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert main(["--config", str(path), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "is finished (step 4); nothing is left to do" in said
    assert f"the steps after 3 again, whose checkpoints are damaged: --resume {run_dir / 'checkpoints' / 'step-000003'}\n" in said
    (run_dir / "summary.json").unlink()
    assert main(["--config", str(path), "--resume"]) == 0
    assert f"damaged, so passed over: {newest}: content differs from its checksum" in capsys.readouterr().out
    assert left_by(run_dir) == expected
    (run_dir / "summary.json").unlink()
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError) as refused:
        main(["--config", str(path), "--resume"])
    assert len(refused.value.problems) == 3 and "no checkpoint is whole" in refused.value.problems[-1]


def test_a_finished_run_that_goes_on_from_an_earlier_checkpoint_is_finished_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, trainer={"checkpoint": {"dirpath": str(tmp_path / "models"), "every_n_train_steps": 1, "keep_last": 4}})
    run(path)
    run_dir = tmp_path / "models" / "desc-run,index-0"
    expected = left_by(run_dir)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 3)
        main(["--config", str(path), "trainer.checkpoint.keep_last=4", "--resume", str(run_dir / "checkpoints" / "step-000002")])
    with pytest.raises(UserError, match="aside-step-000004 is no checkpoint of its run any more"):
        main(["--config", str(path), "--resume", str(run_dir / "checkpoints" / "aside-step-000004")])
    assert main(["--config", str(path), "--resume"]) == 0
    assert "is finished" not in capsys.readouterr().out
    assert left_by(run_dir) == expected


def test_a_run_goes_on_though_a_newer_version_has_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        main(["--config", str(path)])
    then = tmp_path / "models" / "desc-run,index-0" / "config.yaml"
    settings = yaml.safe_load(then.read_text())
    del settings["model_params"]["weight_decay"], settings["trust_remote_code"]
    settings["model_params"]["warmth"], settings["oven"] = 3, {"rack": 1}
    settings["trainer"]["params"]["max_steps"] = 7
    then.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as refused:
        main(["--config", str(path), "--resume", "model_params.weight_decay=0.5"])
    assert [problem.partition(";")[0] for problem in refused.value.problems[:-1]] == [
        "model_params.weight_decay: got 0.5, but the run began with nothing",
        "trainer.params.max_steps: got nothing, but the run began with 7",
    ]
    del settings["trainer"]["params"]["max_steps"]
    then.write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    assert main(["--config", str(path), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "note: model_params.warmth: this version has none, 3 before" in said
    assert "note: oven: this version has none, {'rack': 1} before" in said
    assert "note: trust_remote_code: False from here on, nothing before" in said


def test_a_run_that_goes_on_keeps_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 1)
        main(["--config", str(path)])
    rows = json.loads((tmp_path / "data.json").read_text())
    for row in rows["train"]:
        row["Answer"] = "zzz zzz " + row["Answer"]  # another tokenizer of this size would come of it
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert main(["--config", str(path), "--resume", "--allow_data_change"]) == 0
    kept = tmp_path / "models" / "desc-run,index-0" / "checkpoints"
    assert len({(folder / "tokenizer.json").read_bytes() for folder in kept.glob("step-*")}) == 1
