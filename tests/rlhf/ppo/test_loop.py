"""`PPOTrainer.train`: the whole loop from a few lines of Python. (`tests/rlhf/test_train_ppo.py` runs it from a config.)"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from common.checkpoint import read_manifest, verify_directory
from common.errors import UserError
from common.launch.signals import Stopped
from common.record_types import Prompt
from common.tracking import read_metrics
from rlhf.config import RewardComponent, RewardSettings
from rlhf.ppo import PPOTrainer
from rlhf.ppo.prompts import as_prompts
from rlhf.reward_pipelines import RewardPipeline, as_pipeline, build_pipeline
from rlhf.reward_pipelines.rules import LengthRule

Build = Callable[..., PPOTrainer]
QUESTIONS = [f"Is {number} a number?" for number in range(6)]
SHORT = {"max_new_tokens": 3, "pad_token_id": 0}  # as classic scripts name a padding token


def shorter(responses: list[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


def test_a_few_lines_train_evaluate_and_save(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, folder = build(), tmp_path / "run"
    history = trainer.train(
        QUESTIONS, reward=shorter, generation=SHORT, steps=2, eval_prompts=["Is water wet?"], eval_every=1, save_to=folder
    )
    assert [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(folder)] == history
    assert [line["step"] for line in history] == [0, 1, 1, 2, 2] and trainer.steps_done == 2
    assert history[0]["eval/kl"] == pytest.approx(0.0, abs=1e-4) and history[1]["reward/shorter"] == history[1]["train/score"]
    assert verify_directory(folder / "best") == [] and verify_directory(folder / "last") == []
    manifest = read_manifest(folder / "last")
    assert manifest is not None and (manifest.stage, manifest.max_prompt_length, manifest.max_length) == ("ppo", 61, 64)
    saved = AutoModelForCausalLM.from_pretrained(folder / "last")
    assert torch.equal(saved.lm_head.weight, trainer.model.pretrained_model.lm_head.weight)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert "ppo_config:" in (folder / "config.yaml").read_text()
    assert "6 train, 1 evaluation rows; 2 PPO steps of 4 answers" in capsys.readouterr().out


def test_without_a_folder_nothing_is_written_and_without_evaluation_none_runs(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    history = build().train(QUESTIONS, reward=shorter, generation=SHORT, epochs=2)
    assert [line["step"] for line in history] == [1, 2, 3] and not any(name.startswith("eval/") for line in history for name in line)
    assert list(tmp_path.iterdir()) == []
    assert "done: 3 steps" in capsys.readouterr().out


def test_without_evaluation_the_last_checkpoint_stands_in_for_the_best(build: Build, tmp_path: Path) -> None:
    build().train(QUESTIONS, reward=shorter, generation=SHORT, steps=2, save_to=tmp_path / "run", save_every=1, keep_last=2)
    assert (tmp_path / "run" / "best").resolve().name == "step-000002"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_a_second_call_goes_on_where_the_first_ended(build: Build) -> None:
    whole, halves = build(optimizer="adam"), build(optimizer="adam")
    lines = whole.train(QUESTIONS, reward=shorter, generation=SHORT, steps=4)
    first, second = (halves.train(QUESTIONS, reward=shorter, generation=SHORT, steps=2) for _ in range(2))
    assert [line["step"] for line in [*first, *second]] == [1, 2, 3, 4]
    assert [line["train/score"] for line in [*first, *second]] == [line["train/score"] for line in lines]
    assert torch.equal(weights(whole), weights(halves))


def test_the_trainers_own_dataset_reward_and_steps_serve_where_none_are_given(build: Build, tokenizer: Any) -> None:
    seen: list[tuple[list[str], list[int]]] = []

    def reward(prompts: list[str], responses: list[str], topic: list[int]) -> list[float]:
        seen.append((prompts, topic))
        return [0.0] * len(responses)

    rows = [{"query": f"Number {number} is", "input_ids": torch.tensor([20 + number, 9]), "topic": number} for number in range(4)]
    trainer = build(steps=1)
    trainer.dataset, trainer.reward = rows, reward
    [line] = trainer.train(generation=SHORT)
    [(prompts, topics)] = seen
    assert sorted(prompts) == [row["query"] for row in rows] and [prompts[topics.index(n)] for n in range(4)] == sorted(prompts)
    assert line["tokens/queries_len_mean"] == 2


def test_a_column_that_some_rows_lack_is_none_there(build: Build) -> None:
    seen: list[int | None] = []

    def reward(responses: list[str], topic: list[int | None]) -> list[float]:
        seen.extend(topic)
        return [0.0] * len(responses)

    rows = [{"prompt": "a?", "topic": 1}, {"prompt": "b?"}, "c?", {"prompt": "d?", "topic": 4}]
    build().train(rows, reward=reward, generation=SHORT, steps=1)
    assert sorted(seen, key=str) == [1, 4, None, None]


def test_a_judge_that_needs_the_references_answers_gets_them(build: Build, reward_dir: Path) -> None:
    part = RewardComponent(type="model", model_name=str(reward_dir), normalise="reference")
    pipeline = build_pipeline(RewardSettings(pipeline=part))
    assert pipeline.needs_calibration
    history = build().train(QUESTIONS, reward=pipeline, generation=SHORT, steps=1)
    assert abs(history[0]["train/score"]) < 3 and not pipeline.needs_calibration


def test_penalties_and_the_temperature_reach_the_step(build: Build) -> None:
    warm, cool = (
        build().train(QUESTIONS, reward=shorter, generation={**SHORT, "temperature": temperature}, steps=1)[0] for temperature in (9.0, 0.1)
    )
    assert all(line["objective/kl"] == pytest.approx(0.0, abs=1e-4) for line in (warm, cool))
    assert warm["ppo/policy/entropy"] > 5.5 > 1.0 > cool["ppo/policy/entropy"]  # log 280 = 5.63 at most
    line = build().train(QUESTIONS, reward=shorter, generation=SHORT, steps=1, length_penalty=2.0, missing_eos_penalty=100.0)[0]
    expected = line["train/score"] - 2.0 * line["tokens/responses_len_mean"] - 100.0 * (1 - line["train/eos_rate"])
    assert line["ppo/mean_scores"] == pytest.approx(expected, rel=1e-5)


def test_a_signal_saves_and_stops(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    original = trainer.step

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(Stopped):
        trainer.train(QUESTIONS, reward=shorter, generation=SHORT, steps=3, save_to=tmp_path / "run")
    assert verify_directory(tmp_path / "run" / "last") == []
    with pytest.raises(Stopped):
        trainer.train(QUESTIONS, reward=shorter, generation=SHORT, steps=3)
    assert trainer.steps_done == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "train needs reward: pass reward to it, or reward to PPOTrainer"),
        ({"prompts": None}, "train needs prompts: pass prompts to it, or dataset to PPOTrainer"),
        ({"generation": {"do_sample": False}}, "got do_sample false"),
        ({"generation": {"num_beams": 4}}, "generation.num_beams: got 4, which PPO's sampling does not know"),
        ({"prompts": QUESTIONS[:3]}, "3 prompts x 1 epochs make no batch of 4"),
        ({"prompts": [{"Quesion": "a?"}] * 4}, "prompts 0: .*did you mean Question"),
        ({"reward": 3}, "reward: got int, expected a function"),
        ({"reward": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(
    changes: dict[str, Any], message: str, build: Build, tmp_path: Path
) -> None:
    given = {"prompts": QUESTIONS, "reward": shorter, "generation": SHORT, "save_to": tmp_path / "run", **changes}
    with pytest.raises(UserError, match=message):
        build().train(given.pop("prompts"), **given)
    assert not (tmp_path / "run").exists()


def test_runs_are_never_mixed_and_one_that_fails_at_once_leaves_nothing(build: Build, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"save_to: .* is not empty"):
        build().train(QUESTIONS, reward=shorter, generation=SHORT, save_to=tmp_path)

    def failing(responses: list[str]) -> list[float]:
        raise RuntimeError("no")

    with pytest.raises(UserError, match="reward function failing failed on 4 answers: RuntimeError: no"):
        build().train(QUESTIONS, reward=failing, generation=SHORT, save_to=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_of_every_kind_become_ids_and_what_a_reward_sees(tokenizer: Any) -> None:
    question = "What is the capital of Peru?"
    given = [
        question,
        Prompt(question, context="Lima."),
        {"prompt": question, "topic": 1},
        [30, 31],
        torch.tensor([[32]]),
        {"input_ids": [33], "query": "text"},
    ]
    read = as_prompts(given, tokenizer, name="prompts", prompt_format="qa", max_length=60)
    texts = [tokenizer.decode(prompt.ids) for prompt in read[:3]]
    assert texts == [f"Question: {question}\nAnswer:", f"Question: {question}\nContext: Lima.\nAnswer:", texts[0]]
    assert [prompt.ids for prompt in read[3:]] == [[30, 31], [32], [33]]
    assert [prompt.record.prompt.question for prompt in read[2:]] == [question, tokenizer.decode([30, 31]), tokenizer.decode([32]), "text"]
    assert read[2].record.columns == {"topic": 1}
    with pytest.raises(UserError, match=r"eval 0: prompt: got 3 \(a number\), expected text\neval 1: "):
        as_prompts([{"prompt": 3}, {"nothing": "here"}], tokenizer, name="eval", prompt_format="qa", max_length=60)


def test_a_reward_of_any_kind_becomes_a_pipeline(reward_dir: Path) -> None:
    rule = LengthRule("length", 1, None)
    pipeline = RewardPipeline(rule)
    assert as_pipeline(pipeline) is pipeline and as_pipeline(rule).root is rule
    for function, name in ((shorter, "shorter"), (lambda responses: [0.0] * len(responses), "function")):
        assert as_pipeline(function).root.name == name
        assert len(as_pipeline(function)(["a?", "b?"], ["x", "yy"])) == 2
    assert as_pipeline("examples.custom_reward:polite_and_short").root.name == "polite_and_short"
    for directory in (reward_dir, str(reward_dir)):
        [score] = as_pipeline(directory)(["Is water wet?"], ["Yes"])
        assert isinstance(score, float)


def test_a_run_goes_on_in_a_new_process_and_a_finished_one_is_left_alone(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"reward": shorter, "generation": SHORT, "steps": 3, "eval_prompts": ["Is water wet?"], "eval_every": 1}

    def train(trainer: PPOTrainer, folder: Path, **changes: Any) -> list[dict[str, float]]:
        given = {"prompts": QUESTIONS, **arguments, **changes}
        lines = trainer.train(given.pop("prompts"), save_to=folder, **given)
        return [{name: value for name, value in line.items() if not name.startswith(("perf/", "time/"))} for line in lines]

    expected = train(build(), tmp_path / "whole")
    stopped = build()
    original = stopped.step

    def interrupted(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **options)

    monkeypatch.setattr(stopped, "step", interrupted)
    with pytest.raises(Stopped):
        train(stopped, tmp_path / "run")
    with pytest.raises(UserError, match="the prompts are not those that the run began with"):
        train(build(), tmp_path / "run", prompts=QUESTIONS[::-1], resume=True)
    with pytest.raises(UserError, match=r"ppo_config\.cliprange: got 0\.3, but the run began with 0\.2"):
        train(build(cliprange=0.3), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="steps: got 5, but the run began with 3"):
        train(build(), tmp_path / "run", steps=5, resume=True)
    began = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(began.read_text())
    for broken, problem in (
        ("- 1\n", "got list, expected"),
        ("a: [\n", "cannot be read"),
        ("seed: 1\n", "not begun by PPOTr"),
    ):
        began.write_text(broken)
        with pytest.raises(UserError, match=problem):
            train(build(), tmp_path / "run", resume=True)
    del settings["ppo_config"]["cliprange"]  # as of another version, which had this one besides
    settings["ppo_config"]["warmth"] = 3
    began.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"ppo_config\.cliprange: got 0\.3, but the run began with nothing"):
        train(build(cliprange=0.3), tmp_path / "run", resume=True)
    assert train(build(), tmp_path / "run", resume=True) == expected
    earlier = tmp_path / "run" / "checkpoints" / "step-000001"
    assert train(build(project_kwargs={"logging_dir": tmp_path / "logs"}), earlier, resume=True) == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(build(), tmp_path / "run", resume=True) == expected
    assert "is finished (step 3); nothing is left to do, and nothing was written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
