"""The PPO benchmark runs the public trainer on what its options say, and prints the line that a runner reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ppo import build_reward_model, build_trainer, judge, main, measure, parse, trainer_config
from benchmarks.synthetic import build_judge, build_prompts, build_tokenizer
from common.checkpoint import new_manifest
from common.models.fused import FusedNewGELU
from common.models.reward import RewardScorer
from rlhf.ppo.rollout import Rollout

TINY = [
    "--size", "xs", "--batch", "4", "--minibatch", "2", "--epochs", "1", "--new-tokens", "6", "--threads", str(torch.get_num_threads()),
]  # fmt: skip


def test_it_prints_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--iters", "2", "--warmup", "1", "--eos-hazard", "0.2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line.removeprefix("RESULT "))
    assert (found["name"], found["size"], len(found["iters"]), found["params"]) == ("ours", "xs", 2, 985_985)
    median = found["median"]
    assert median["total"] == pytest.approx(median["generate"] + median["score"] + median["train"], rel=0.5)
    assert 100 < found["start_rss_mb"] <= found["peak_rss_mb"]
    assert found["episodes_per_s"] == pytest.approx(4 / median["total"], rel=0.01)


def test_it_runs_from_another_folder(root: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, str(root / "benchmarks/ppo.py"), *TINY, "--iters", "1", "--warmup", "0"]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.startswith("RESULT {")
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_logged_for_every_iteration(tmp_path: Path) -> None:
    iterations, lengths, *_ = measure(parse([*TINY, "--iters", "1", "--warmup", "1"]), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all("ppo/loss/total" in line and "train/score" in line for line in lines)
    assert len(iterations) == 1 and sum(answer for _, answer in lengths[0]) == iterations[0]["resp_tokens"]
    assert [prompt for prompt, _ in lengths[0]] == [len(prompt) for prompt in build_prompts(8)[4:]]


def test_settings_are_those_of_the_plain_loop() -> None:
    config = trainer_config(parse([]))
    assert (config.batch_size, config.mini_batch_size, config.ppo_epochs, config.learning_rate) == (64, 16, 4, 1e-6)
    assert (config.init_kl_coef, config.adap_kl_ctrl, config.gamma, config.lam, config.vf_coef) == (0.05, False, 1.0, 0.95, 0.1)
    assert (config.weight_decay, config.max_grad_norm, config.cliprange, config.cliprange_value) == (0.01, None, 0.2, 0.2)


def test_other_fields_of_the_trainer_can_be_set() -> None:
    assert trainer_config(parse(["--set", "dual_clip=3.0", "early_stopping=true"])).dual_clip == 3.0
    with pytest.raises(SystemExit, match="no such field"):
        trainer_config(parse(["--set", "no_such=1"]))


def test_top_trains_upper_layers_final_norm_and_head() -> None:
    trainer = build_trainer(parse([*TINY, "--top", "1"]), build_tokenizer())
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    kept = ("pretrained_model.transformer.h.1.", "pretrained_model.transformer.ln_f.", "v_head.")
    assert trained == {name for name, _ in trainer.model.named_parameters() if name.startswith(kept)}


def test_a_critic_trains_in_place_of_the_value_head() -> None:
    trainer = build_trainer(parse([*TINY, "--critic"]), build_tokenizer())
    assert trainer.critic is not None
    assert torch.equal(trainer.critic.v_head.summary.weight, build_judge("xs", seed=2).score.weight)


@pytest.mark.parametrize(("arguments", "expected"), [([], 2), (["--without", "fused"], 0)])
def test_fast_parts_can_be_left_out(arguments: list[str], expected: int) -> None:
    options = parse([*TINY, *arguments])
    for model in (build_trainer(options, build_tokenizer()).model, build_reward_model(options)):
        assert [type(module) for module in model.modules()].count(FusedNewGELU) == expected


def test_scores_are_the_classifiers() -> None:
    tokenizer = build_tokenizer()
    manifest = new_manifest("reward_classification", tokenizer, readout={"name": "last_token"})
    scorer = RewardScorer(build_reward_model(parse(TINY)), tokenizer=tokenizer, manifest=manifest)
    queries, responses = build_prompts(2), [[5, 6], [7]]
    rollout = Rollout(queries, responses, ["", ""], [False, False], torch.zeros(2, 2), None)
    with torch.no_grad():
        expected = [
            float(build_judge("xs").eval()(torch.tensor([query + response])).logits)
            for query, response in zip(queries, responses, strict=True)
        ]
    assert judge(scorer, rollout) == pytest.approx(expected, abs=1e-5)
