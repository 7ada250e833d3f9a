"""The classic step, reproduced: numbers of trl 0.11.4 (see golden/README.md) through `PPOTrainer.step`, within 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.launch.runtime import Runtime
from rlhf.ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

GOLDEN = Path(__file__).parent / "golden" / "ppo_step_trl_0_11_4"
CASES = sorted(path.stem.removeprefix("case_") for path in GOLDEN.glob("case_*.json"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return json.loads((GOLDEN / "inputs.json").read_text())


def make_trainer(config: dict[str, Any], **changes: Any) -> PPOTrainer:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "policy")
    model.v_head.summary.load_state_dict(load_file(GOLDEN / "value_head.safetensors"))
    reference = AutoModelForCausalLM.from_pretrained(GOLDEN / "reference", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "policy")
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    settings = PPOConfig(**{**config, **changes})
    return PPOTrainer(settings, model, reference, tokenizer, optimizer=optimizer, runtime=Runtime.local("cpu"))


def step(trainer: PPOTrainer, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    queries, responses = ([torch.tensor(row) for row in inputs[name]] for name in ("queries", "responses"))
    return trainer.step(queries, responses, [torch.tensor(score) for score in inputs["scores"]], **options)


def assert_parameters(trainer: PPOTrainer, expected: dict[str, Any]) -> None:
    names = {
        name.removeprefix("pretrained_model."): parameter for name, parameter in trainer.model.named_parameters(remove_duplicate=False)
    }
    assert names.keys() == {name.removeprefix("pretrained_model.") for name in expected}
    for name, figures in expected.items():
        parameter = names[name.removeprefix("pretrained_model.")].detach()
        torch.testing.assert_close(parameter.flatten()[:4], torch.tensor(figures["first"]), **CLOSE)
        size = max(1.0, parameter.numel() ** 0.5)
        assert float(parameter.double().sum()) == pytest.approx(figures["sum"], abs=1e-5 * size), name
        assert float(parameter.double().abs().sum()) == pytest.approx(figures["abs_sum"], abs=1e-5 * size), name


def test_all_twelve_cases_are_here() -> None:
    assert len(CASES) == 12


@pytest.mark.parametrize("name", CASES)
def test_golden_case(name: str, inputs: dict[str, Any]) -> None:
    case = json.loads((GOLDEN / f"case_{name}.json").read_text())
    trainer = make_trainer(case["config"])
    stats = step(trainer, inputs)
    assert trainer.record is not None
    ours = trainer.record.classic_layout()
    mask = torch.tensor(case["policy"]["mask"]).bool()
    assert torch.equal(ours["mask"].bool(), mask)
    theirs = {
        "logprobs": case["policy"]["logprobs"],
        "ref_logprobs": case["reference"]["logprobs"],
        "values": case["masked_values"],
        "kl": case["kls"],
        "rewards": case["rewards"],
        "non_score_rewards": case["non_score_reward"],
        "advantages": case["advantages"],
        "returns": case["returns"],
    }
    for key, numbers in theirs.items():
        torch.testing.assert_close(ours[key][mask], torch.tensor(numbers)[mask], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert stats["objective/kl"] == pytest.approx(case["objective_kl"], abs=1e-5)
    assert trainer.kl_coef == pytest.approx(case["kl_coef_after"], abs=1e-7)
    updates = case["losses_per_update"]
    assert stats["ppo/updates"] == len(updates)
    for key in updates[0]["stats"]:
        if updates[0]["stats"][key] is not None:
            expected = sum(update["stats"][key] for update in updates) / len(updates)
            assert stats[f"ppo/{key}"] == pytest.approx(expected, rel=1e-5, abs=1e-5), key
    assert_parameters(trainer, case["parameters_after"])
