"""The comparison with best of n: what was measured is kept, ratios are right, and policies are measured as training sees them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frontier
from benchmarks.frontier import Bench, Budget, Kept
from benchmarks.frontier_results import BEST_OF_N, OPTIMUM, Measured, draw, markdown, save, table, table_lines
from common.checkpoint import new_manifest, save_model_directory
from common.config import load_config
from common.evaluation.generate import Answer
from common.models.load import build_generator, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit
from examples.measure import Judged
from examples.world.oracle import judge
from rlhf.config import PPORunConfig

TEXTS = ["Question: What is the capital of Peru?\nAnswer: The capital of Peru is Lima. Any atlas shows it."]
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "max_position_embeddings": 160}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, one near it, and a reward model."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer(TEXTS, 280)
    policy = build_generator(ModelInit(model_type="gpt_neo", config=SHAPE), tokenizer, 160, 0)
    judge = RewardModel.from_backbone(policy.transformer, seed=3)
    reward = new_manifest("reward_classification", tokenizer, max_length=160, score_mean=0.5, score_scale=2.0)
    sft = save_model_directory(folder / "sft", policy, tokenizer, new_manifest("sft", tokenizer, max_length=160))
    directories = {"sft": sft, "reward": save_model_directory(folder / "reward", judge, tokenizer, reward)}
    with torch.no_grad():
        policy.transformer.wte.weight += 0.1 * torch.randn(policy.transformer.wte.weight.shape, generator=torch.Generator().manual_seed(0))
    directories["ppo"] = save_model_directory(folder / "step-000005", policy, tokenizer, new_manifest("ppo", tokenizer, max_length=160))
    return directories


@pytest.fixture
def bench(models: dict[str, Path], root: Path) -> Bench:
    overrides = [
        f"ppo_config.model_name={models['sft']}",
        f"reward_config.reward_model_name={models['reward']}",
        "generation_config.max_new_tokens=4",
    ]
    config = load_config(PPORunConfig, root / "rlhf/configs/trainer_config.yaml", overrides)
    return Bench(config, 0, Budget(questions=3, draws=8, answers=4))


def points(scale: float = 0.5, seed: int = 0) -> list[Measured]:
    """Best of n gains 1 within 1 nat, PPO `scale` of it, which is less than the whole."""
    start = Measured(seed, BEST_OF_N, 1, "test", 0.0, 2.0, 0.5)
    return [
        start,
        replace(start, setting=4, kl=1.0, score=3.0),
        replace(start, method=OPTIMUM, setting=0.1, kl=1.0, score=3.1),
        replace(start, method=OPTIMUM, setting=1.0, kl=0.1, score=2.1),
        replace(start, method="PPO", setting=0.1, kl=1.0, score=2.0 + scale, step=5),
        replace(start, method="PPO", setting=0.1, kl=1.2, score=2.0 + scale, step=10),
    ]


def test_the_table_compares_gains_within_the_same_kl() -> None:
    rows = table([*points(0.5, 0), *points(1.0, 1)])
    row = next(row for row in rows if (row["method"], row["kl"]) == ("PPO", 1.0))
    assert (row["gain"], row["gain_best_of_n"], row["ratio"], row["least_ratio"]) == (0.75, 1.0, 0.75, 0.5)
    assert next(row for row in rows if (row["method"], row["kl"]) == ("PPO", 0.5))["gain"] == pytest.approx(0.375)
    lines = [line for line in table_lines(rows) if "below" in line]
    assert len(lines) == len([row for row in rows if row["method"] == "PPO"])


def test_the_table_of_a_document_has_the_methods_of_several_coefficients(tmp_path: Path) -> None:
    """Two seeds, two splits, two coefficients of PPO, one of RLOO."""
    plain = [*points(0.5, seed=0), *points(1.0, seed=1)]
    plain += [replace(point, split="train") for seed in (0, 1) for point in points(0.25, seed)]
    other = [replace(point, setting=0.2) for point in plain if point.method == "PPO"]
    rloo = [replace(point, method="RLOO") for point in plain if point.method == "PPO"]
    measured = [*plain, *other, *rloo]
    save(tmp_path / "f.json", {"methods": {"PPO": [], "RLOO": []}}, table(measured), measured)
    lines = markdown(json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))).splitlines()
    assert lines[0] == "| test questions: within nats | best of n | PPO | of best of n (least seed) | optimum |"
    assert [line for line in lines if line.startswith("| 1 |")] == [
        "| 1 | 1.000 | 0.750 | 0.75 (0.50) | 1.100 |",
        "| 1 | 1.000 | 0.250 | 0.25 (0.25) | 1.100 |",
    ]
    assert lines[lines.index("") + 1].startswith("| train questions: within nats |")


def test_the_picture_is_written(tmp_path: Path) -> None:
    assert draw([*points(0.5, 0), *points(1.0, 1)], tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_read_and_not_measured_again(tmp_path: Path) -> None:
    def fail() -> list[Measured]:
        raise AssertionError

    kept = Kept(tmp_path / "points.jsonl")
    assert kept.points({"from": ["a=1"]}, points) == points()
    assert kept.points({"from": ["a=1"]}, fail) == points()
    with pytest.raises(AssertionError):
        kept.points({"from": ["a=2"]}, fail)
    assert len(kept.path.read_text().splitlines()) == 1


def test_best_of_n_and_the_optimum_start_from_the_sft_model(bench: Bench) -> None:
    measured = [point for point in bench.draws() if point.split == "test"]
    [start] = [point for point in measured if (point.method, point.setting) == (BEST_OF_N, 1)]
    [best] = [point for point in measured if (point.method, point.setting) == (BEST_OF_N, 8)]
    flat = next(point for point in measured if point.method == OPTIMUM)
    assert start.kl == pytest.approx(0, abs=1e-9) and (flat.kl, flat.score) == pytest.approx((0, start.score), abs=2e-3)
    assert best.kl > 0.1 and best.score > start.score


def test_a_checkpoint_is_measured_from_the_sft_model(bench: Bench, models: dict[str, Path]) -> None:
    [test, train] = bench.checkpoints("PPO", 0.1, models["ppo"].parent)
    assert (test.step, test.split, train.split) == (5, "test", "train")
    assert 0.01 < test.kl < 10
    assert test.score != train.score


def test_an_answer_that_does_not_end_pays_the_penalty(bench: Bench) -> None:
    question, verdict = "What is the capital of Peru?", judge("What is the capital of Peru?", "Lima.")
    flags = [True, False, True]
    found = bench.scores([Judged(question, Answer("Lima.", (1,), ended), verdict) for ended in flags])
    plain = bench.pipeline.score([question] * 3, ["Lima."] * 3, ended=flags).scores
    assert found == pytest.approx([plain[0], plain[1] - 1, plain[2]], abs=1e-5)


def test_answers_to_a_question_stand_side_by_side_and_differ(bench: Bench) -> None:
    answers = bench.answers(bench.sft, bench.records["test"], 2)
    assert [one.question for one in answers] == [record.prompt.question for record in bench.records["test"] for _ in range(2)]
    assert len({one.answer.ids for one in answers}) == 6


def test_a_command_given_again_goes_on(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings are copies of models here; those of SFT and reward model happen once, a run for each method and coefficient."""
    trained: list[str] = []

    def run_plan(plan: Any, overrides: Sequence[str]) -> None:
        settings = dict(text.split("=", 1) for text in overrides)
        name, folder = plan[0][0][0].name, Path(settings["results_root"])
        trained.append(name)
        if name == "ppo":
            run = folder / "rlhf" / f"desc-{settings['desc']},index-0" / "checkpoints"
            shutil.copytree(models["ppo"], run / "step-000005")
        else:
            source, stage = {"sft": ("sft", "sft"), "classification": ("reward", "reward_classification")}[name]
            shutil.copytree(models[source], folder / stage / "latest")

    monkeypatch.setattr(frontier, "run_plan", run_plan)
    arguments = ["--smoke", "--seeds", "7", "--work", str(tmp_path), "--methods", "PPO", "--kl-coefs", "0.1"]
    threads = torch.get_num_threads()
    assert frontier.main(arguments) == 0
    assert trained == ["sft", "classification", "ppo"]
    assert frontier.main([*arguments, "0.2"]) == 0
    torch.set_num_threads(threads)
    assert trained == ["sft", "classification", "ppo", "ppo"]
    assert "PPO on test questions" in capsys.readouterr().out
    results = json.loads((tmp_path / "smoke/frontier.json").read_text(encoding="utf-8"))
    assert {point["setting"] for point in results["points"] if point["method"] == "PPO"} == {0.1, 0.2}
    assert (tmp_path / "smoke/frontier.png").is_file()
