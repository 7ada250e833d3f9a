"""Training runs of both kinds, from the command line to the directory that PPO takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.checkpoint import new_manifest, read_manifest, save_model_directory, verify_directory
from common.errors import UserError
from common.models.load import build_generator, train_tokenizer
from common.models.reward import RewardModel, RewardScorer
from common.schema import ModelInit
from reward_model.classification import train_reward as train_pairs
from reward_model.regression import train_reward as train_scores

MAINS = {"pair": train_pairs.main, "score": train_scores.main}
QUICK = ("trainer.params.max_steps=2", "trainer.params.val_check_interval=1")
QUESTIONS = ["What?", "What is thing 3-1?"]
ANSWERS = ["good 3", "bad thing thing 1"]


def run(kind: str, config: Path, *overrides: str) -> Path:
    """Train and return `models/latest`, resolved."""
    assert MAINS[kind](["--config_file", str(config), *overrides]) == 0
    return (config.parent / "models" / "latest").resolve()


def raw_scores_of_plain_transformers(directory: Path) -> torch.Tensor:
    """What a user without this project computes, from the documented prompt text, in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    texts = [f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}" for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", split_special_tokens=False, add_special_tokens=False)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(("kind", "metric", "steps"), [("pair", "val/accuracy", 30), ("score", "val/pair_accuracy", 64)])
def test_a_separable_toy_is_learnt(kind: str, metric: str, steps: int, write_config, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(kind, trainer={"params": {"max_epochs": -1, "max_steps": steps, "val_check_interval": 4}})
    directory = run(kind, config)
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.metrics[metric] == 1.0
    scorer = RewardScorer(directory)
    good, bad = scorer.score([QUESTIONS[0]] * 2, ["good thing thing 5", "bad thing thing 5"])
    assert good > bad
    out = capsys.readouterr().out
    assert "best val/loss" in out and directory.name in out
    assert (directory.parents[1] / "curves.png").is_file()


@pytest.mark.parametrize("architecture", ["gpt_neo", "llama", "t5", "bert"])
@pytest.mark.parametrize("kind", ["pair", "score"])
def test_every_kind_of_backbone_trains_and_its_directory_scores(kind: str, architecture: str, write_config) -> None:
    directory = run(kind, write_config(kind, architecture), *QUICK)
    assert verify_directory(directory) == []
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.stage == {"pair": "reward_classification", "score": "reward_regression"}[kind]
    assert manifest.is_encoder_decoder == (architecture == "t5")
    scorer = RewardScorer(directory)
    raw = scorer.raw_scores(QUESTIONS, ANSWERS)
    final = scorer.score(QUESTIONS, ANSWERS)
    if kind == "pair":
        assert final == raw
    else:
        assert manifest.score_transform is not None and manifest.score_transform.name == "standardize"
        assert final == pytest.approx([value * manifest.score_transform.scale + manifest.score_transform.shift for value in raw])
    if architecture in {"gpt_neo", "llama"}:
        torch.testing.assert_close(raw_scores_of_plain_transformers(directory), torch.tensor(raw), rtol=0, atol=1e-6)


def test_the_manifest_holds_mean_and_scale_of_final_scores_on_the_training_set(write_config) -> None:
    config = write_config("score", model_params={"score_transform": "minmax"})
    directory = run("score", config, *QUICK)
    rows = json.loads((config.parent / "score.json").read_text())["train"]
    scores = torch.tensor(RewardScorer(directory).score([row["Question"] for row in rows], [row["Answer"] for row in rows]))
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert manifest.score_scale == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    last = read_manifest((directory.parents[1] / "last").resolve())
    assert last is not None and last.score_scale is not None


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_what_was_cut_is_printed_and_stands_in_the_log(kind: str, write_config, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run(kind, write_config(kind), *QUICK, "data.max_prompt_length=20")
    log = (directory.parents[1] / "log.txt").read_text()
    rows = {"pair": 32, "score": 64}[kind]
    [line] = [line for line in log.splitlines() if line.startswith("note: train: ")]
    assert line.startswith(f"note: train: {rows} of {rows} prompts cut (")
    assert line.endswith(" tokens); raise data.max_length or data.max_prompt_length to keep them")
    assert line in capsys.readouterr().out


def test_large_training_sets_are_sampled(write_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("reward_model.training.SCORE_SAMPLE", 10)
    run("pair", write_config("pair"), *QUICK)
    assert "(of 10 answers)" in capsys.readouterr().out


def test_it_starts_from_an_sft_directory(write_config, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Question: What is thing 1?\nAnswer: good thing"], 270)
    init = ModelInit(model_type="gpt_neo", config={"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64})
    generator = build_generator(init, tokenizer, 64, seed=7)
    save_model_directory(tmp_path / "sft", generator, tokenizer, new_manifest("sft", tokenizer))
    config = write_config("pair", model_init=None, model_name=str(tmp_path / "sft"), model_params={"learning_rate": 1e-12})
    directory = run("pair", config, *QUICK)
    trained, start = RewardModel.load(directory).backbone, generator.transformer
    for name, value in start.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=0, atol=1e-6)


def test_ckpt_path_continues_a_reward_model_with_its_head(write_config) -> None:
    first = run("pair", write_config("pair"), *QUICK)
    second = run("pair", write_config("pair"), *QUICK, f"trainer.ckpt_path={first}", "model_params.learning_rate=1e-12")
    assert second.parents[1].name == "desc-toy,index-1"
    scores = [RewardScorer(directory).raw_scores(QUESTIONS, ANSWERS) for directory in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_lora_trains_adapters_and_head_and_saves_merged_weights(write_config) -> None:
    directory = run("pair", write_config("pair", model_params={"lora": {"r": 2}}), *QUICK)
    assert (directory / "adapter" / "adapter_config.json").is_file()
    raw = torch.tensor(RewardScorer(directory).raw_scores(QUESTIONS, ANSWERS))
    torch.testing.assert_close(raw_scores_of_plain_transformers(directory), raw, rtol=0, atol=1e-6)


def test_a_frozen_backbone_stays_as_it_was_while_the_head_learns(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")}
    still = run("pair", write_config("pair", model_params=frozen), *QUICK)
    moved = run("pair", write_config("pair", model_params=frozen), *QUICK, "trainer.params.max_steps=4")
    assert "head" in capsys.readouterr().out  # the table says that it trains
    a, b = RewardModel.load(still), RewardModel.load(moved)
    for name, value in a.backbone.state_dict().items():
        assert torch.equal(value, b.backbone.state_dict()[name]), name
    assert not torch.equal(a.readout.score.weight, b.readout.score.weight)


@pytest.mark.parametrize(
    "override",
    [
        "model_params.gradient_checkpointing=true",
        "model_params.dropout=0.2",
        "data.batching=random",
        "data.batching=by_question",
        "data.on_tpu=true",
        "trainer.params.precision=bf16-mixed",
        "trainer.params.precision=bf16-true",
        "trainer.params.precision=64-true",
        "trainer.params.overfit_batches=1",
        "trainer.params.accumulate_grad_batches=2",
        "model_params.label_smoothing=0.1",
        "model_params.centring_coef=0.1",
    ],
)
def test_settings_that_change_how_it_trains(override: str, write_config) -> None:
    directory = run("pair", write_config("pair"), "trainer.params.max_steps=2", override)
    assert all(torch.isfinite(torch.tensor(RewardScorer(directory).raw_scores(QUESTIONS, ANSWERS))))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_every_regression_loss_and_transform_trains(loss: str, transform: str, write_config) -> None:
    config = write_config("score", model_params={"loss": loss, "score_transform": transform})
    manifest = read_manifest(run("score", config, "trainer.params.max_steps=1"))
    assert manifest is not None and manifest.score_transform is not None
    assert manifest.score_transform.name == transform


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.checkpoint.monitor=val/bleu"], "val/bleu.*val/accuracy"),
        (["data.max_length=4"], "max_length"),
        (["model_init=null", "model_name=/nowhere"], "no model directory"),
        (["trainer.params.precision='16'"], "bf16-mixed"),
        (["trainer.params.strategy=fsdp"], "got fsdp, but the run is one process"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(overrides: list[str], message: str, write_config) -> None:
    config = write_config("pair")
    with pytest.raises(UserError, match=message):
        MAINS["pair"](["--config_file", str(config), *overrides])
    assert not (config.parent / "models").exists()


def test_a_run_without_validation_claims_no_best(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    run("pair", write_config("pair"), "trainer.params.max_steps=1", "trainer.params.limit_val_batches=0")
    out = capsys.readouterr().out
    assert "no validation ran, so no checkpoint is known to be the best" in out and "\nbest val" not in out


def test_no_time_for_a_step_is_said(write_config) -> None:
    with pytest.raises(UserError, match=r"before its first step; raise trainer\.params\.max_time"):
        MAINS["pair"](["--config_file", str(write_config("pair")), "trainer.params.max_time=00:00:00:00"])


def test_pair_accuracy_cannot_choose_where_validation_has_no_pair(write_config, tmp_path: Path) -> None:
    config = write_config("score", trainer={"checkpoint": {"monitor": "val/pair_accuracy", "mode": "max"}})
    rows = json.loads((tmp_path / "score.json").read_text())
    (tmp_path / "score.json").write_text(json.dumps({**rows, "val": rows["val"][::2]}))
    with pytest.raises(UserError, match="no question of the validation split has two answers of different score"):
        MAINS["score"](["--config_file", str(config), "--validate"])


def test_validate_reads_everything_and_writes_nothing(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, main in MAINS.items():
        config = write_config(kind)
        assert main(["--config_file", str(config), "--validate"]) == 0
        assert "train, 6 val" in capsys.readouterr().out.replace("12 val", "6 val")
        assert not (config.parent / "models").exists()


def test_the_same_seed_gives_the_same_model(write_config) -> None:
    weights = [RewardModel.load(run("pair", write_config("pair"), *QUICK)).state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
