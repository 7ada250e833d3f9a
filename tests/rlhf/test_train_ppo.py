"""`train_ppo.py` from config to published model, on tiny models."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from common.checkpoint import new_manifest, read_manifest, save_model_directory, verify_directory
from common.devices import gpus_at_most
from common.errors import UserError
from common.launch.signals import Stopped
from common.models.load import train_tokenizer
from common.models.reward import RewardModel, RewardScorer
from common.record_types import Prompt
from common.score_transform import ScoreTransform
from common.tracking import read_metrics
from rlhf import training
from rlhf.config import PPOData, PPOParams, PPORunConfig, RewardSettings
from rlhf.critic_start import start_critic
from rlhf.inputs import read_prompts
from rlhf.ppo.metrics import METRICS
from rlhf.ppo.models import with_value_head
from rlhf.ppo.rollout import Rollout, _Decoder
from rlhf.ppo.trainer import PPOTrainer
from rlhf.prompt_order import PromptOrder
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.model import TrainedRewardModel
from rlhf.train_ppo import main
from tests.runs import left_by, stop_at

QUESTIONS = [f"Is {number} a number?" for number in range(20)]


@pytest.fixture
def run(tmp_path: Path, policy_dir: Path, reward_dir: Path) -> Any:
    """`run(section__key=value, …)` writes data and config and trains; returns the run directory."""

    def start(*arguments: str, **changes: Any) -> Path:
        data = tmp_path / "prompts.json"
        rows = [{"prompt": question, "topic": index % 3} for index, question in enumerate(QUESTIONS)]
        data.write_text(json.dumps({"train": [*rows[:14], rows[0]], "val": rows[14:], "test": []}))
        config: dict[str, Any] = {
            "seed": 3,
            "data_config": {"data_file_path": str(data), "max_prompt_length": 40},
            "generation_config": {"max_new_tokens": 6},
            "global_epochs": 2,
            "ppo_config": {
                "model_name": str(policy_dir),
                "batch_size": 8,
                "mini_batch_size": 4,
                "ppo_epochs": 2,
                "learning_rate": 1e-3,
                "steps": 2,
            },
            "reward_config": {"reward_model_name": str(reward_dir)},
            "evaluation": {"num_prompts": 4, "every_n_steps": 1, "num_samples_logged": 3},
            "save_config": {"checkpoint_dir": str(tmp_path / "models"), "save_interval": 1},
        }
        for path, value in changes.items():
            section, _, key = path.partition("__")
            if key:
                config.setdefault(section, {})[key] = value
            else:
                config[section] = value
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        assert main(["--config", str(file), *arguments]) == 0
        return tmp_path / "models" / f"desc-{config.get('desc', 'run')},index-0"

    return start


@pytest.mark.usefixtures("picture")
def test_two_steps_end_to_end(run: Any, tmp_path: Path, policy_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run()
    lines = read_metrics(folder)
    steps = [line for line in lines if "objective/kl" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["step"] for line in lines if "eval/score" in line] == [0, 1, 2]
    assert [line["train/judge_texts_cut"] for line in steps] == [0, 0]
    assert abs(steps[0]["objective/kl"]) < 1e-4 and lines[0]["eval/kl"] == pytest.approx(0.0, abs=1e-4)
    logged = {name for line in lines for name in line} - {"step", "time"}
    parts = {f"{prefix}{name}" for prefix in ("reward/", "eval/reward/") for name in ("model", "model_raw")}
    assert parts <= logged and logged - parts == set(METRICS) - {"reward/NAME", "eval/reward/NAME", "ppo/loss/kl"}
    assert all(math.isfinite(value) for line in lines for value in line.values())

    latest = tmp_path / "models" / "latest"
    assert latest.resolve() == (folder / "best").resolve() and verify_directory(latest) == []
    manifest = read_manifest(latest)
    assert manifest is not None
    assert (manifest.stage, manifest.prompt_format, manifest.max_prompt_length, manifest.max_length) == ("ppo", "qa", 40, 46)
    model = AutoModelForCausalLM.from_pretrained(latest)
    before = AutoModelForCausalLM.from_pretrained(policy_dir)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert load_file(latest / "value_head.safetensors")["summary.weight"].shape == (1, 16)
    AutoTokenizer.from_pretrained(latest)

    samples = [json.loads(line) for line in (folder / "tables" / "eval_samples-step-000002.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and set(samples[0]) == {"prompt", "answer", "score", "kl", "ended"}
    assert (folder / "curves.png").stat().st_size > 1000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["monitor"] == "eval/penalised_score" and summary["steps"] == 2
    printed = capsys.readouterr()
    assert "14 train, 4 evaluation rows; 2 PPO steps of 8 answers" in printed.out  # the repeated question counts once
    first, *later = [line for line in printed.err.splitlines() if "eval/penalised_score" in line]
    assert first.startswith("step 0: eval/penalised_score ") and first.endswith("(the start)")
    assert all(name in first for name in ("eval/kl ", "eval/eos_rate ", "eval/length "))
    assert later[0].startswith("step 1: ") and "(best so far" in later[0] and later[1].startswith("step 2: ")


def test_what_was_cut_is_printed_and_stands_in_the_log(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    log = (run(data_config__max_prompt_length=18, ppo_config__steps=1) / "log.txt").read_text()
    printed = capsys.readouterr().out
    remedy = "raise data_config.max_prompt_length or lower generation_config.max_new_tokens to keep them"
    for split, cut in (("train", "14 of 14"), ("val", "4 of 4")):
        [line] = [line for line in log.splitlines() if line.startswith(f"note: {split}: ")]
        assert line.startswith(f"note: {split}: {cut} prompts cut (") and line.endswith(f" tokens); {remedy}") and line in printed


def test_34_two_runs_of_one_seed_are_alike_and_evaluation_is_fixed(run: Any) -> None:
    def figures(folder: Path) -> list[dict[str, Any]]:
        return [{name: value for name, value in line.items() if "perf/" not in name and name != "time"} for line in read_metrics(folder)]

    first, second = figures(run()), figures(run(desc="again"))
    assert first == second
    other = figures(run(desc="other", seed=4))
    assert other != first
    still = [line for line in figures(run(desc="still", ppo_config__learning_rate=1e-30)) if "eval/score" in line]
    assert len(still) == 3
    assert all(line["eval/score"] == pytest.approx(still[0]["eval/score"], abs=1e-6) for line in still)


def test_an_encoder_decoder_trains_through_the_same_script(run: Any, t5_dir: Path) -> None:
    folder = run(ppo_config__model_name=str(t5_dir))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "best")
    assert model.config.is_encoder_decoder
    assert len(read_metrics(folder)) == 5


def test_weights_over_base_models_are_those_of_the_run(
    run: Any, tmp_path: Path, policy_dir: Path, reward_dir: Path, make_model: Any
) -> None:
    """Bases of other weights, with the policy's weights as a bare file and the reward model as a directory over them."""
    whole = run(desc="whole", ppo_config__steps=1)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(policy_dir / name, tmp_path / "base")
    make_model("gpt_neo", 7).save_pretrained(tmp_path / "base")
    over = run(
        desc="over",
        ppo_config__steps=1,
        ppo_config__model_name=str(tmp_path / "base"),
        ppo_config__model_pretrain=str(policy_dir / "model.safetensors"),
        reward_config={"reward_model_name": str(tmp_path / "base"), "rm_pretrain": str(reward_dir)},
    )
    assert left_by(over)["weights"] == left_by(whole)["weights"]
    assert left_by(over)["metrics"] == left_by(whole)["metrics"]


def test_lora_saves_merged_weights_and_the_adapter(run: Any) -> None:
    folder = run(ppo_config__lora={"r": 2}, ppo_config__learning_rate=0.1, ppo_config__gradient_checkpointing=True)
    assert (folder / "best" / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(folder / "best")


def test_a_critic_starts_from_the_reward_model(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(ppo_config__critic="model", ppo_config__critic_warmup_steps=1)
    steps = [line for line in read_metrics(folder) if "objective/kl" in line]
    assert steps[0]["ppo/val/mean"] != 0.0
    assert steps[1]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the first step trained the critic alone
    assert not (folder / "best" / "value_head.safetensors").exists()


def test_a_critic_starts_on_the_scale_that_ppo_sees(run: Any, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the reference and weighed in a sum: what the reward model adds to a score is what its copy says first."""
    seen: list[tuple[float, float]] = []
    original = training.start_critic

    def start(model: Any, tokenizer: Any, pipeline: RewardPipeline) -> Any:
        critic: Any = original(model, tokenizer, pipeline)
        part = next(part for part in pipeline.root.walk() if part.name == "model")
        assert isinstance(part, TrainedRewardModel) and part.scale not in (1.0, 2.0)
        scorer: Any = part.scorer
        encoded = scorer.encoder.pair(Prompt(QUESTIONS[0]), "Yes")
        ids = torch.tensor([[*encoded.prompt_ids, *encoded.answer_ids]])
        with torch.no_grad():
            score, value = scorer.model(ids, torch.ones_like(ids)), critic.v_head(critic.trunk(ids).last_hidden_state[0, -1])
        seen.append((float(value), -0.5 * (float(score) - part.mean) / part.scale))
        return critic

    monkeypatch.setattr(training, "start_critic", start)
    judge = {"type": "model", "model_name": str(reward_dir), "normalise": "reference", "weight": 0.25}
    inner = {"type": "sum", "name": "inner", "members": [judge], "weight": -2.0}
    run(ppo_config__critic="model", reward_config={"pipeline": {"type": "sum", "members": [{"type": "repetition"}, inner]}})
    [(value, expected)] = seen
    assert value == pytest.approx(expected, abs=1e-5) and abs(value) > 1e-3


VALUE_METRICS = {"ppo/loss/value"} | {name for name in METRICS if name.startswith(("ppo/val/", "ppo/returns/"))}


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_answers_to_one_prompt_are_compared_without_a_critic(
    run: Any, estimator: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[Rollout] = []
    original = PPOTrainer.step

    def step(self: PPOTrainer, *arguments: Any, sampled: Rollout, **options: Any) -> Any:
        steps.append(sampled)
        return original(self, *arguments, sampled=sampled, **options)

    monkeypatch.setattr(PPOTrainer, "step", step)
    folder = run(ppo_config__advantage_estimator=estimator, ppo_config__samples_per_prompt=4, ppo_config__steps=None)
    lines = [line for line in read_metrics(folder) if "objective/kl" in line]
    assert len(lines) == 14  # 2 passes over 14 prompts, 2 in a batch
    assert [line["train/epoch"] for line in lines][6::7] == [1.0, 2.0]
    left_out = VALUE_METRICS | (set() if estimator == "grpo" else {"ppo/loss/kl"})
    assert set(METRICS) & set(lines[0]) == {name for name in METRICS if not name.startswith(("eval/", "reward/"))} - left_out
    for rollout in steps:
        prompts = [tuple(query) for query in rollout.queries]
        assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4 and prompts[0] != prompts[4]
        assert len({tuple(answer) for answer in rollout.responses}) > 2
    assert not (folder / "best" / "value_head.safetensors").exists()
    assert "14 PPO steps of 8 answers, 4 to each prompt" in capsys.readouterr().out


def test_every_other_setting_runs(run: Any) -> None:
    folder = run(
        freeze_config={"freeze_attn": True, "layers_not_to_freeze": [-1]},
        data_config__padding="max_length",
        data_config__unique_prompts=False,
        generation_config__temperature=0.7,
        generation_config__top_p=0.9,
        generation_config__stop_strings=["e"],
        ppo_config__lr_schedule="linear",
        ppo_config__use_score_scaling=True,
        ppo_config__use_score_norm=True,
        ppo_config__score_clip=1.0,
        ppo_config__whiten_rewards=True,
        ppo_config__missing_eos_penalty=1.0,
        ppo_config__length_penalty=0.1,
        ppo_config__dual_clip=3.0,
        ppo_config__entropy_coef=0.01,
        ppo_config__max_grad_norm=0.1,
        ppo_config__kl_penalty="full",
        ppo_config__use_cache=False,
        ppo_config__early_stopping=True,
        ppo_config__log_with="tensorboard",
        reward_config={
            "pipeline": {
                "type": "sum",
                "members": [{"type": "length", "max_words": 2, "weight": 0.5}, {"type": "repetition", "ngram": 1}],
            }
        },
    )
    steps = [line for line in read_metrics(folder) if "objective/kl" in line]
    assert steps[1]["ppo/learning_rate"] == pytest.approx(0.5e-3)
    assert {"reward/length", "reward/repetition", "reward/sum"} <= steps[0].keys()
    assert list((folder / "tensorboard").iterdir())


def test_reference_normalisation_is_measured_on_the_starting_answers(run: Any, reward_dir: Path) -> None:
    part = {"type": "model", "model_name": str(reward_dir), "normalise": "reference"}
    folder = run(reward_config={"pipeline": part}, data_config__padding=False)
    assert abs(read_metrics(folder)[0]["eval/score"]) < 3


def test_10_the_temperature_of_sampling_is_that_of_step_and_evaluation(run: Any) -> None:
    lines = read_metrics(run(generation_config__temperature=2.0, ppo_config__mini_batch_size=8, ppo_config__ppo_epochs=1))
    assert lines[0]["eval/kl"] == pytest.approx(0.0, abs=1e-4)
    first = next(line for line in lines if "objective/kl" in line)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("padding", "expected"), [(False, [1] * 8), (True, [8]), ("max_length", [8])])
def test_padding_decides_how_answers_are_decoded_everywhere(
    run: Any, reward_dir: Path, padding: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int | None]] = []
    original = _Decoder.run

    def decode(self: Any, queries: list[list[int]], rows: Any, pad_to: int | None) -> Any:
        seen.append((len(queries), pad_to))
        return original(self, queries, rows, pad_to)

    monkeypatch.setattr(_Decoder, "run", decode)
    part = {"type": "model", "model_name": str(reward_dir), "normalise": "reference"}
    evaluation = {"num_prompts": 4, "every_n_steps": 1}
    run(data_config__padding=padding, reward_config={"pipeline": part}, evaluation=evaluation, ppo_config__steps=1)
    four = [1] * 4 if padding is False else [4]
    assert [count for count, _ in seen] == [*expected, *four, *expected, *four]  # calibration, evaluation, step, evaluation
    assert {pad_to for _, pad_to in seen} == {40 if padding == "max_length" else None}


def test_the_best_checkpoint_is_chosen_after_penalties(run: Any) -> None:
    ends = [1, *range(20, 60)]
    folder = run(
        ppo_config__missing_eos_penalty=100.0,
        ppo_config__length_penalty=0.5,
        generation_config__eos_token_id=ends,
        evaluation__num_prompts=6,
    )
    lines = [line for line in read_metrics(folder) if "eval/score" in line]
    assert any(0 < line["eval/eos_rate"] < 1 for line in lines)
    for line in lines:
        expected = line["eval/score"] - 100.0 * (1 - line["eval/eos_rate"]) - 0.5 * line["eval/length"]
        assert line["eval/penalised_score"] == pytest.approx(expected, rel=1e-5)
    saved = [line for line in lines if line["step"] > 0]
    best = max(saved, key=lambda line: line["eval/penalised_score"])
    assert json.loads((folder / "summary.json").read_text())["best_value"] == pytest.approx(best["eval/penalised_score"])


def test_evaluation_tells_the_reward_which_answers_did_not_end(run: Any, tmp_path: Path) -> None:
    (tmp_path / "ended.py").write_text("def reward(responses, ended):\n    return [float(end) for end in ended]\n")
    part = {"type": "function", "name": "ended", "path": f"{tmp_path / 'ended.py'}:reward"}
    folder = run(reward_config={"pipeline": part}, generation_config__eos_token_id=[1, *range(20, 60)], evaluation__num_prompts=6)
    lines = [line for line in read_metrics(folder) if "eval/score" in line]
    assert any(0 < line["eval/eos_rate"] < 1 for line in lines)
    assert all(line["eval/score"] == line["eval/reward/ended"] == pytest.approx(line["eval/eos_rate"]) for line in lines)


def test_low_precision_trains_adapters_alone(run: Any) -> None:
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(UserError, match=f"model_dtype: got {dtype}, .* use float32, or {dtype} with lora"):
            run(ppo_config__model_dtype=dtype)
    folder = run(ppo_config__model_dtype="bfloat16", ppo_config__lora={"r": 2}, desc="adapters")
    assert AutoModelForCausalLM.from_pretrained(folder / "best", dtype="auto").dtype == torch.bfloat16


def test_texts_too_long_for_a_judge_are_foretold_and_counted(
    run: Any, tmp_path: Path, make_model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--validate")
    assert "judge cut texts" not in capsys.readouterr().out  # 40 + 6 tokens, the judge reads 64
    short = tmp_path / "short"
    model = RewardModel.from_backbone(make_model("gpt_neo", 2).transformer, seed=3)
    save_model_directory(short, model, tokenizer, new_manifest("reward_classification", tokenizer, max_length=12))
    folder = run(reward_config__reward_model_name=str(short), desc="short")
    assert f"{short} reads 12 tokens, a prompt of 40 and an answer of 6 have more" in capsys.readouterr().out
    cuts = [line["train/judge_texts_cut"] for line in read_metrics(folder) if "train/judge_texts_cut" in line]
    assert len(cuts) == 2 and all(8 <= cut <= 16 for cut in cuts)


def test_a_column_that_no_row_has_is_missed_before_anything_is_loaded(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "rewards.py"
    source.write_text("def by_score(responses, Score):\n    return Score\n\ndef by_topic(responses, topic):\n    return topic\n")
    for arguments in ((), ("--validate",)):
        with pytest.raises(UserError, match=r"rewards\.py:by_score: asks for Score, there are topic, prompts, contexts, ended, responses"):
            run(*arguments, reward_config={"pipeline": {"type": "function", "path": f"{source}:by_score"}})
    assert not (tmp_path / "models").exists()
    run("--validate", reward_config={"pipeline": {"type": "function", "path": f"{source}:by_topic"}})


def test_a_column_that_some_rows_lack_is_none_there(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "topic": 1}, {"prompt": "b?"}]
    (tmp_path / "prompts.json").write_text(json.dumps({"train": rows, "val": rows}))
    data = PPOData(data_file_path=str(tmp_path / "prompts.json"))
    config = PPORunConfig(data_config=data, ppo_config=PPOParams(model_name="m"), reward_config=RewardSettings(reward_model_name="r"))
    assert [record.columns["topic"] for record in read_prompts(config).train] == [1, None]


def test_a_run_that_fails_before_its_first_step_leaves_no_directory(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "rewards.py"
    source.write_text("def reward(responses):\n    raise RuntimeError('no')\n")
    with pytest.raises(UserError, match="RuntimeError: no"):
        run(reward_config={"pipeline": {"type": "function", "path": f"{source}:reward"}})
    assert list((tmp_path / "models").iterdir()) == []


def test_a_signal_saves_and_leaves_with_its_code(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = PPOTrainer.step

    def interrupted(self: PPOTrainer, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **options)

    monkeypatch.setattr(PPOTrainer, "step", interrupted)
    with pytest.raises(Stopped) as stopped:
        run(save_config__save_interval=2, evaluation__every_n_steps=50)
    assert stopped.value.code == 143
    [folder] = (tmp_path / "models").glob("desc-*")
    assert verify_directory(folder / "last") == [] and (folder / "last").resolve().name == "step-000001"
    assert not (tmp_path / "models" / "latest").exists()
    assert "to go on: the same command with --resume" in capsys.readouterr().err


def test_a_policy_of_which_nothing_trains_is_refused(run: Any, tmp_path: Path) -> None:
    everything = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")}
    with pytest.raises(UserError, match="freeze_config: nothing of the policy is left to train"):
        run(freeze_config=everything)
    assert not (tmp_path / "models").exists()


def test_35_prompt_and_answer_must_fit_the_positions(run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_prompt_length 40 \+ generation_config.max_new_tokens 30 = 70 exceeds the 64 positions"):
        run(generation_config__max_new_tokens=30)
    assert not (tmp_path / "models").exists()


def test_models_in_the_wrong_place_and_unknown_options_are_told_together(run: Any, policy_dir: Path, reward_dir: Path) -> None:
    with pytest.raises(UserError) as error:
        run(
            ppo_config__model_name=str(reward_dir),
            reward_config__reward_model_name=str(policy_dir),
            generation_config__num_beams=4,
            generation_config__do_sample=False,
        )
    text = "\n".join(error.value.problems)
    for part in ("is a reward model", "has no reward head", "num_beams", "do_sample: got false"):
        assert part in text


def test_too_few_prompts_for_a_batch_are_refused(run: Any) -> None:
    with pytest.raises(UserError, match="14 prompts x global_epochs 2 make no batch of 64"):
        run(ppo_config__batch_size=64)
    with pytest.raises(UserError, match=r"14 prompts x global_epochs 2 make no batch of 32 \(4 answers to each\)"):
        run(ppo_config__batch_size=128, ppo_config__mini_batch_size=8, ppo_config__samples_per_prompt=4)


def test_a_batch_larger_than_the_prompts_is_told(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"ppo_config__batch_size": 16, "ppo_config__mini_batch_size": 8}
    run("--validate", **changes)
    assert "note: ppo_config.batch_size 16 exceeds the 14 training prompts: within a batch prompts repeat" in capsys.readouterr().out
    run("--validate", **changes, ppo_config__samples_per_prompt=2)
    assert "repeat" not in capsys.readouterr().out
    run("--validate", ppo_config__batch_size=32, ppo_config__samples_per_prompt=2, global_epochs=3)
    assert "note: ppo_config.batch_size 32 / samples_per_prompt 2 exceeds the 14 training prompts" in capsys.readouterr().out
    run("--validate")
    assert "repeat" not in capsys.readouterr().out


def test_validate_trains_nothing(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--validate")
    assert "14 training prompts, 6 val; 2 PPO steps" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


def test_settings_that_never_act_are_told_in_a_line_each(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def notes(**changes: Any) -> str:
        run("--validate", **changes)
        return capsys.readouterr().out

    assert "no effect" not in notes(ppo_config__adap_kl_ctrl=False)
    text = notes(
        ppo_config__adap_kl_ctrl=False,
        ppo_config__target=3.0,
        ppo_config__horizon=10.0,
        ppo_config__target_kl=0.5,
        ppo_config__lora={"lora_dropout": 0.1},
        ppo_config__tracker_project_name="x",
        reward_config__offload=True,
        ppo_config__tracker_kwargs={"name": "x"},
        wandb={"project_name": "x", "mode": "offline"},
    )
    assert "ppo_config.target, ppo_config.horizon have no effect: adap_kl_ctrl is false" in text
    assert "ppo_config.target_kl has no effect: early_stopping is false" in text
    assert "ppo_config.lora.lora_dropout has no effect" in text
    if gpus_at_most() == 0:
        assert "reward_config.offload has no effect: there is no GPU here" in text
    trackers = "ppo_config.tracker_project_name, ppo_config.tracker_kwargs, wandb.project_name, wandb.mode"
    assert f"{trackers} have no effect: ppo_config.log_with is null, not wandb" in text
    text = notes(ppo_config__init_kl_coef=0.0, ppo_config__critic="model", freeze_config={"freeze_emb": True}, ppo_config__log_with="wandb")
    assert "ppo_config.adap_kl_ctrl has no effect" in text and "freeze_config freezes the policy alone" in text
    grouped = {"ppo_config__samples_per_prompt": 2, "ppo_config__use_score_scaling": True, "ppo_config__use_score_norm": True}
    text = notes(ppo_config__advantage_estimator="rloo", ppo_config__lam=0.95, ppo_config__vf_coef=0.1, **grouped)
    assert "ppo_config.lam, ppo_config.vf_coef have no effect: advantage_estimator rloo trains no value" in text
    assert "ppo_config.use_score_norm has no effect: it cancels where rloo compares" in text
    text = notes(ppo_config__advantage_estimator="grpo", **grouped)
    assert "ppo_config.use_score_scaling, ppo_config.use_score_norm have no effect: they cancel where grpo compares" in text
    assert "no effect" not in notes(ppo_config__advantage_estimator="grpo", ppo_config__score_clip=2.0, **grouped)
    with pytest.raises(UserError, match="critic_warmup_steps 2 leaves none of the run's 2 PPO steps"):
        run(ppo_config__critic_warmup_steps=2)


def test_a_critic_without_a_reward_model_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match="no reward model to start it from"):
        run(ppo_config__critic="model", reward_config={"pipeline": {"type": "repetition"}})


def test_prompt_order_uses_each_prompt_once_a_pass() -> None:
    order = PromptOrder(7, 4, seed=1)
    stream = [row for step in range(14) for row in order.batch(step)]  # 56 = 8 passes
    passes = [stream[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(part) == list(range(7)) for part in passes)
    assert len({tuple(part) for part in passes}) == 8
    assert PromptOrder(7, 4, seed=1).batch(9) == order.batch(9)


def test_prompt_order_keeps_the_answers_to_a_prompt_together() -> None:
    prompts = PromptOrder(7, 12, seed=1, samples=3).batch(5)
    assert prompts == [prompt for prompt in PromptOrder(7, 4, seed=1).batch(5) for _ in range(3)]


def test_updates_that_end_early_or_are_skipped_are_told_with_their_step(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(desc="stop", ppo_config__early_stopping=True, ppo_config__target_kl=1e-9, ppo_config__learning_rate=0.01)
    stopped = [line["step"] for line in read_metrics(folder) if line.get("ppo/early_stopped")]
    told = re.findall(r"^step (\d+): early stop, an update moved \S+ nats per token \(1.5 x target_kl = 1.5e-09\)$", errors(capsys), re.M)
    assert stopped and [int(step) for step in told] == stopped
    run(desc="skip", ppo_config__ratio_threshold=0.5)
    skipped = [line for line in errors(capsys).splitlines() if "skipped" in line]
    assert skipped == [f"step {step}: 4 updates skipped, their ratio exceeded the threshold" for step in (1, 2)]
    run(desc="usual")
    assert not re.search("early stop|skipped", errors(capsys))


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_01_04_05_the_reward_model_reads_prompt_and_answer_and_no_batch(reward_dir: Path) -> None:
    scorer = RewardScorer(reward_dir, batch_size=4)
    prompts = [Prompt(question) for question in QUESTIONS[:4]]
    answers = ["Yes.", "No, it is not at all.", "<pad> maybe <pad>", ""]
    together = scorer.score(prompts, answers)
    alone = [scorer.score([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer.score(prompts[::-1], answers[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert abs(scorer.score([Prompt("Is water wet?")], answers[:1])[0] - together[0]) > 1e-4
    assert abs(scorer.score(prompts[:1], ["Yes"])[0] - together[0]) > 1e-4


def test_14_penalties_reach_the_scores_that_are_trained_on(run: Any) -> None:
    folder = run(ppo_config__missing_eos_penalty=100.0, ppo_config__length_penalty=0.5, generation_config__eos_token_id=[1, *range(20, 60)])
    for line in [line for line in read_metrics(folder) if "objective/kl" in line]:
        assert 0.0 < line["train/eos_rate"] < 1.0
        expected = line["train/score"] - 100.0 * (1 - line["train/eos_rate"]) - 0.5 * line["tokens/responses_len_mean"]
        assert line["ppo/mean_scores"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["none", "standardize", "log1p"])
def test_a_critics_start_undoes_the_score_transform_where_it_is_linear(name: Any, make_model: Any, tokenizer: Any) -> None:
    reward = RewardModel.from_backbone(make_model("gpt_neo", 2).transformer, seed=3).eval()
    transform = ScoreTransform.fit(name, [1.0, 5.0])  # standardize: mean 3, standard deviation 2
    manifest = new_manifest("reward_regression", tokenizer, max_length=64, score_mean=0.5, score_scale=4.0, score_transform=transform)
    scorer = RewardScorer(reward, tokenizer=tokenizer, manifest=manifest)
    pipeline = RewardPipeline(TrainedRewardModel("model", scorer))
    critic = start_critic(with_value_head(make_model()), tokenizer, pipeline)
    encoded = scorer.encoder.pair(Prompt("Is water wet?"), "Yes")
    ids = torch.tensor([[*encoded.prompt_ids, *encoded.answer_ids]])
    with torch.no_grad():
        raw, value = float(reward(ids, torch.ones_like(ids))), float(critic.v_head(critic.trunk(ids).last_hidden_state[0, -1]))
    [score] = pipeline(["Is water wet?"], ["Yes"])
    assert value == pytest.approx(raw if name == "log1p" else score, abs=1e-5)


def test_a_judge_with_a_padding_token_of_its_own_may_still_be_the_critic_but_not_one_with_another_vocabulary(
    run: Any, tmp_path: Path, make_model: Any, tokenizer: Any
) -> None:
    """Ids of text mean the same in both, which is all that a critic needs."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    for name, own in (("padded", padded), ("other", train_tokenizer(["Other words make other ids."] * 3, 280))):
        generator = make_model("gpt_neo", 2)
        generator.resize_token_embeddings(len(own), mean_resizing=False)
        model = RewardModel.from_backbone(generator.transformer, seed=3)
        save_model_directory(tmp_path / name, model, own, new_manifest("reward_classification", own, max_length=64))
    run(ppo_config__critic="model", reward_config__reward_model_name=str(tmp_path / "padded"), ppo_config__steps=1)
    with pytest.raises(UserError, match="has another vocabulary than"):
        run(ppo_config__critic="model", reward_config__reward_model_name=str(tmp_path / "other"))


# --- going on ----------------------------------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    stop_at(monkeypatch, PPOTrainer, "step", lambda trainer: trainer.steps_done + 1 == step, signal.SIGINT)


SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive": {
        "ppo_config__adap_kl_ctrl": True,
        "ppo_config__target": 0.1,
        "ppo_config__use_score_scaling": True,
        "ppo_config__use_score_norm": True,
        "ppo_config__lr_schedule": "linear",
    },
    "lora": {"ppo_config__lora": {"r": 2}},
    "critic": {"ppo_config__critic": "model", "ppo_config__critic_warmup_steps": 1},
    "grpo": {"ppo_config__advantage_estimator": "grpo", "ppo_config__samples_per_prompt": 2},
    "adafactor": {"ppo_config__optimizer": "Adafactor", "ppo_config__lr_schedule": "cosine", "ppo_config__warmup_steps_per_cent": 0.5},
    "sgd": {"ppo_config__optimizer": "SGD", "ppo_config__momentum": 0.9},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_goes_on_with_the_same_bits(run: Any, reward_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of an epoch: 14 prompts in batches of 8 (4 with two answers each)."""
    settings = {
        **SETTINGS[name],
        "global_epochs": 6,
        "ppo_config__steps": 4,
        "evaluation__every_n_steps": 2,
        "save_config__save_interval": 3,
    }
    if name == "adaptive":
        judge = {"type": "model", "model_name": str(reward_dir), "normalise": "reference"}
        settings["reward_config"] = {"pipeline": judge}
    expected = left_by(run(desc="whole", **settings))
    for step in (1, 2, 3, 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            stop_after(patch, step)
            run(desc=f"stopped-{step}", **settings)
        assert left.value.code == 130
        assert left_by(run("--resume", desc=f"stopped-{step}", **settings)) == expected, step


def test_a_run_that_was_killed_goes_on_from_its_last_save_twice(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    settings: dict[str, Any] = {
        "global_epochs": 6,
        "ppo_config__steps": 5,
        "evaluation__every_n_steps": 10,
        "save_config__save_interval": 2,
    }
    expected = left_by(run(desc="whole", **settings))
    for step, arguments in ((4, ()), (5, ("--resume",))):

        def killed(trainer: PPOTrainer, *given: Any, step: int = step, original: Any = PPOTrainer.step, **options: Any) -> Any:
            if trainer.steps_done + 1 == step:
                raise Killed
            return original(trainer, *given, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(PPOTrainer, "step", killed)
            run(*arguments, desc="killed", **settings)
    assert left_by(run("--resume", desc="killed", **settings)) == expected
