"""What a script written for trl 0.11.4 asks of config, models and trainer. (`tests/rlhf/test_classic_script.py` runs whole scripts.)"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from common.errors import UserError
from common.launch.runtime import Runtime
from common.tracking import Tracker, read_metrics
from rlhf.ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from rlhf.ppo.classic_names import ELSEWHERE
from tests.rlhf.ppo.conftest import Batch

Build = Callable[..., PPOTrainer]
CLASSIC_FIELDS = frozenset(
    {
        "exp_name", "seed", "log_with", "task_name", "model_name", "query_dataset", "reward_model", "remove_unused_columns",
        "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "tracker_project_name", "push_to_hub_if_best_kwargs", "steps",
        "learning_rate", "adap_kl_ctrl", "init_kl_coef", "kl_penalty", "target", "horizon", "gamma", "lam", "cliprange",
        "cliprange_value", "vf_coef", "batch_size", "forward_batch_size", "mini_batch_size", "gradient_accumulation_steps", "world_size",
        "ppo_epochs", "max_grad_norm", "optimize_cuda_cache", "optimize_device_cache", "early_stopping", "target_kl", "compare_steps",
        "ratio_threshold", "use_score_scaling", "use_score_norm", "score_clip", "whiten_rewards", "gradient_checkpointing",
        "is_encoder_decoder", "is_peft_model", "backward_batch_size", "global_backward_batch_size", "global_batch_size",
        "dataset_num_proc",
    }
)  # fmt: skip
"""Of trl 0.11.4's `PPOConfig`."""

# --- settings -------------------------------------------------------------------------------------------------------------------------


def test_every_classic_setting_is_there_or_says_what_to_do_instead() -> None:
    ours = {field.name for field in dataclasses.fields(PPOConfig)}
    assert not ours & ELSEWHERE.keys()
    assert ours | ELSEWHERE.keys() >= CLASSIC_FIELDS
    with pytest.raises(UserError) as error:
        PPOConfig(optimize_cuda_cache=True, kl_coef=0.1, batch_size=4, mini_batch_size=4)  # type: ignore[call-arg]
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "PPOConfig has no optimize_cuda_cache",
        "PPOConfig has no kl_coef",
    ]


def test_the_defaults_of_shared_settings_are_the_classic_ones() -> None:
    classic = {"learning_rate": 1.41e-5, "batch_size": 128, "mini_batch_size": 128, "init_kl_coef": 0.2, "target": 6.0, "horizon": 10000.0}
    classic |= {"lam": 0.95, "cliprange": 0.2, "vf_coef": 0.1, "ppo_epochs": 4, "target_kl": 1.0, "ratio_threshold": 10.0, "seed": 0}
    config = PPOConfig()
    assert {name: getattr(config, name) for name in classic} == classic
    assert config.adap_kl_ctrl and not config.early_stopping and config.remove_unused_columns and config.log_with is None


def test_a_command_line_makes_a_config_as_classic_scripts_do() -> None:
    [config] = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--batch_size", "8", "--mini_batch_size", "4", "--log_with", "wandb"]
    )
    assert (config.batch_size, config.mini_batch_size, config.log_with) == (8, 4, "wandb")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"project_kwargs": {"total_limit": "3"}}, "project_kwargs: got total_limit, expected logging_dir or project_dir"),
        ({"mixed_precision": "fp16"}, "mixed_precision: got 'fp16', expected no or bf16"),
        ({"batch_size": 0}, "batch_size: got 0, expected a whole number >= 1"),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps: got 2.5, expected a whole number >= 1"),
        ({"learning_rate": "1e-5"}, "learning_rate: got '1e-5', expected a number >= 0"),
        ({"seed": None}, "seed: got None, expected a whole number >= 0"),
        ({"whiten_rewards": "yes"}, "whiten_rewards: got 'yes', expected True or False"),
        ({"score_clip": float("inf")}, "score_clip: got inf, expected a number > 0 or None"),
        ({"log_with": "comet_ml"}, "log_with: got 'comet_ml', expected wandb, tensorboard or None"),
    ],
)
def test_settings_that_could_not_act_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_all_wrong_values_and_names_are_told_at_once_each_with_what_was_meant() -> None:
    with pytest.raises(UserError) as error:
        PPOConfig(learning_rte=0.1, kl_coeff=0.1, colour="red")  # type: ignore[call-arg]
    assert error.value.problems == (
        "PPOConfig has no learning_rte; did you mean learning_rate?",
        "PPOConfig has no kl_coeff; did you mean kl_coef? kl_coef: use init_kl_coef, with adap_kl_ctrl=False for a fixed one",
        "PPOConfig has no colour",
    )
    with pytest.raises(UserError) as error:
        PPOConfig(batch_size=-4, gamma=1.5)
    assert error.value.problems == (
        "batch_size: got -4, expected a whole number >= 1",
        "gamma: got 1.5, expected a number >= 0 and <= 1",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64, "mini_batch_size": 24}, "= 24; batch_size 48 or 72 is, or mini_batch_size 16 or 32 divides it"),
        ({"batch_size": 4}, "= 128; batch_size 128 is, or mini_batch_size 4 divides it"),
        ({"batch_size": 9, "mini_batch_size": 2, "gradient_accumulation_steps": 2}, "= 4; batch_size 8 or 12 is$"),
        (
            {"batch_size": 6, "mini_batch_size": 2, "gradient_accumulation_steps": 2},
            "= 4; batch_size 4 or 8 is, or mini_batch_size 1 or 3 divides it$",
        ),
        (
            {"batch_size": 64, "mini_batch_size": 16, "samples_per_prompt": 7},
            "by samples_per_prompt 7; batch_size 112 is, or samples_per_prompt 4 or 8 divides it",
        ),
    ],
)
def test_numbers_that_do_not_divide_name_those_that_would(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_whole_and_numpys_numbers_are_taken_as_what_they_are() -> None:
    config = PPOConfig(batch_size=np.int64(8), mini_batch_size=4.0, vf_coef=1, lam=np.float32(0.5))  # type: ignore[arg-type]
    read = [config.batch_size, config.mini_batch_size, config.vf_coef, config.lam]
    assert read == [8, 4, 1.0, 0.5] and [type(value) for value in read] == [int, int, float, float]


def test_what_else_the_classic_config_had_says_what_to_read() -> None:
    config = PPOConfig()
    for name, message in (("world_size", "the trainer works it out"), ("to_dict", "dataclasses.asdict"), ("colour", "has no colour$")):
        with pytest.raises(AttributeError, match=message):
            getattr(config, name)
    assert not hasattr(config, "global_batch_size") and copy.deepcopy(config) == config


# --- the trainer's arguments --------------------------------------------------------------------------------------------------------


def test_the_arguments_have_the_classic_order() -> None:
    parameters = list(inspect.signature(PPOTrainer).parameters.values())
    names = "config model ref_model tokenizer dataset optimizer data_collator num_shared_layers lr_scheduler training_data_collator"
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()
    assert "reward" in [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def test_arguments_that_do_not_fit_say_what_would(make_model: Any, tokenizer: Any) -> None:
    bare, model = make_model(), AutoModelForCausalLMWithValueHead.from_pretrained(make_model())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": {"batch_size": 4}}, "config: got builtins.dict, expected rlhf.ppo.PPOConfig"),
        ({"model": bare}, "model: got GPTNeoForCausalLM, expected AutoModelForCausalLMWithValueHead.from_pretrained"),
        ({"tokenizer": None}, "needs a model with a value head and its tokenizer"),
        ({"ref_model": model}, "ref_model holds weights that model trains"),
        ({"ref_model": AutoModelForCausalLMWithValueHead.from_pretrained(model.pretrained_model)}, "ref_model holds weights that model"),
        ({"ref_model": bare, "num_shared_layers": 1}, "num_shared_layers shares layers with the copy that is made without ref_model"),
        ({"training_data_collator": list}, "training_data_collator has nothing to do here"),
        ({"dataset": [1, 2]}, "dataset: 2 rows make no batch of batch_size 128"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            PPOTrainer(**{"config": PPOConfig(), "model": model, "tokenizer": tokenizer, **changes})


def test_several_processes_are_refused_before_each_trains_alone(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but this trainer is alone"):
        Runtime.local()


def test_what_scripts_read_of_a_trainer_has_the_classic_meaning(build: Build, batch: Batch, make_model: Any) -> None:
    trainer = build(init_kl_coef=0.3, adap_kl_ctrl=True, horizon=100, use_score_scaling=True)
    assert (trainer.kl_ctl.value, trainer.current_step, trainer.is_peft_model, trainer.is_distributed) == (0.3, 0, False, False)
    stats = trainer.step(*batch)
    assert stats["objective/kl_coef"] == 0.3 and trainer.kl_ctl.value == trainer.kl_coef != 0.3
    assert trainer.current_step == 1 and trainer.running.std == pytest.approx(float(torch.tensor(batch.scores).std()))
    trainer.kl_ctl.value = 0.1
    assert trainer.step(*batch)["objective/kl_coef"] == 0.1
    record = trainer.record
    assert record is not None and record.kl.abs().max() > 0
    torch.testing.assert_close(record.non_score_rewards, -0.1 * record.kl)
    assert build(get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))).is_peft_model
    [first, *_] = trainer.prepare_dataloader([{"query": number} for number in range(9)], list)
    assert len(first) == 4


def test_an_attribute_that_is_nowhere_is_named_and_a_fault_inside_one_is_not_hidden(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build()
    with pytest.raises(AttributeError, match=r"PPOTrainer has no colour$"):
        trainer.colour  # type: ignore[attr-defined]  # noqa: B018
    monkeypatch.setattr("rlhf.ppo.logs.own_tracker", lambda config, is_main: config.colour)
    with pytest.raises(AttributeError, match="PPOConfig has no colour"):
        trainer.tracker  # noqa: B018


def test_the_accelerator_answers_what_scripts_ask(build: Build) -> None:
    trainer = build()
    accelerator = trainer.accelerator
    assert accelerator is trainer.accelerator and accelerator.device == trainer.current_device == torch.device("cpu")
    assert (accelerator.num_processes, accelerator.is_main_process) == (1, True)
    assert accelerator.unwrap_model(trainer.model) is trainer.model
    assert accelerator.state.deepspeed_plugin is None and not trainer.is_encoder_decoder
    accelerator.wait_for_everyone()


def test_the_dataloader_gives_whole_batches_in_an_order_of_the_seed(make_model: Any, tokenizer: Any) -> None:
    rows = {"input_ids": [[number] for number in range(7)], "query": list("abcdefg"), "review": ["long"] * 7, "label": [0] * 7}
    data = Dataset.from_dict(rows).with_format("torch")

    def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in rows] for key in rows[0]}

    def batches(**settings: Any) -> list[dict[str, Any]]:
        config = PPOConfig(batch_size=3, mini_batch_size=3, **settings)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(make_model())
        loader = PPOTrainer(config, model, None, tokenizer, data, None, collate).dataloader
        assert loader is not None
        return list(loader)

    first, again, other = batches(), batches(), batches(seed=1)
    assert [len(batch["query"]) for batch in first] == [3, 3]
    assert [batch["query"] for batch in first] == [batch["query"] for batch in again] != [batch["query"] for batch in other]
    assert set(first[0]) == {"input_ids", "query", "label"} and isinstance(first[0]["input_ids"][0], torch.Tensor)
    assert set(batches(remove_unused_columns=False)[0]) == set(rows)


def test_each_process_gets_its_own_rows_from_the_dataloader(build: Build) -> None:
    data = [{"query": number} for number in range(13)]
    alone = [[row["query"] for row in batch] for batch in build(batch_size=4).prepare_dataloader(data, list)]
    ranks = []
    for rank in range(2):
        trainer = build(batch_size=2, mini_batch_size=2)
        trainer.runtime = Runtime(trainer.model.device, rank=rank, world_size=2)
        ranks.append([[row["query"] for row in batch] for batch in trainer.prepare_dataloader(data, list)])
        with pytest.raises(ValueError, match="3 rows make no batch of batch_size 2 in each of 2 processes"):
            trainer.prepare_dataloader(data[:3], list)
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone and len(alone) == 3


# --- models ---------------------------------------------------------------------------------------------------------------------------


def test_adapters_come_from_a_peft_config(make_model: Any, policy_dir: Path, tmp_path: Path) -> None:
    for source in (policy_dir, str(policy_dir), make_model()):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(source, peft_config=config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all("lora_" in name or name.startswith("v_head") for name in trained)
    with pytest.raises(UserError, match="peft_config: got IA3Config, expected a LoraConfig"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_model(), peft_config=IA3Config(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="peft_config: got use_dora"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_model(), peft_config=LoraConfig(use_dora=True))
    other = get_peft_model(make_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="adapters of kind IA3: only LoRA's can be merged"):
        AutoModelForCausalLMWithValueHead.from_pretrained(other)
    model.pretrained_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an adapter without its model; load it with peft's AutoPeftModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_the_value_head_starts_as_asked_and_comes_back_from_a_directory(policy_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    usual = AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir)
    assert not any(parameter.any() for parameter in usual.v_head.parameters()) and usual.v_head.dropout.p == 0
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        policy_dir, v_head_init_strategy="normal", v_head_initializer_range=0.5, summary_dropout_prob=0.1
    )
    weight = model.v_head.summary.weight.detach()
    assert 0.25 < float(weight.std()) < 0.75 and model.v_head.dropout.p == 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).v_head.summary.weight, weight)
    weights = load_file(policy_dir / "model.safetensors")  # trl puts the head among them
    head = {f"v_head.{name}": tensor for name, tensor in model.v_head.state_dict().items() if name.startswith("summary")}
    (tmp_path / "value_head.safetensors").unlink()
    save_file({**weights, **head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).v_head.summary.weight, weight)
    with pytest.raises(UserError, match="v_head_init_strategy: got 'uniform'"):
        AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir, v_head_init_strategy="uniform")  # type: ignore[arg-type]


def test_weights_load_in_the_type_asked_for(policy_dir: Path) -> None:
    for asked in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir, **asked)  # type: ignore[arg-type]
        assert model.pretrained_model.dtype == torch.bfloat16 and model.v_head.summary.weight.dtype == torch.float32
    with pytest.raises(UserError, match="dtype: got auto, expected float32, bfloat16, float16"):
        AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir, torch_dtype="auto")  # type: ignore[arg-type]


def test_arguments_of_loading_that_cannot_act_say_what_to_do_instead(policy_dir: Path, make_model: Any) -> None:
    AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir, load_in_8bit=False, device_map=None)
    with pytest.raises(UserError) as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(policy_dir, load_in_8bit=True, device_map="auto", revision="main")
    text = "\n".join(error.value.problems)
    assert "load_in_8bit: weights are not quantised here" in text and "device_map: leave it out; PPOTrainer moves the model" in text
    assert "revision: is transformers' own; load the model with AutoModelForCausalLM.from_pretrained(…, revision=…)" in text
    with pytest.raises(UserError, match="no effect on a model that is loaded already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_model(), torch_dtype=torch.bfloat16)


def test_a_reference_shares_the_layers_that_are_frozen(make_model: Any) -> None:
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(make_model("t5"))
    whole = create_reference_model(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    assert all(ours is not theirs for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True))
    causal = AutoModelForCausalLMWithValueHead.from_pretrained(make_model())
    shared = create_reference_model(causal, num_shared_layers=1)
    theirs = dict(shared.named_parameters())
    for name, parameter in causal.named_parameters():
        below = ".h.0." in name or ".wte." in name or ".wpe." in name
        assert (parameter is theirs[name]) is below is not parameter.requires_grad, name


def test_a_reference_that_is_given_is_frozen_and_any_model(build: Build, make_model: Any, batch: Batch) -> None:
    for reference in (make_model("gpt_neo", 1), AutoModelForCausalLMWithValueHead.from_pretrained(make_model("gpt_neo", 1))):
        trainer = build(reference=reference.train())
        assert trainer.ref_model is reference and not reference.training
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        assert abs(trainer.step(*batch)["objective/kl"]) > 1e-3


# --- sampling -------------------------------------------------------------------------------------------------------------------------


def test_lengths_are_drawn_within_their_bounds_and_the_same_again() -> None:
    draws = [sampler() for sampler in [LengthSampler(4, 7)] for _ in range(100)]
    assert set(draws) == {4, 5, 6}
    assert draws == [sampler() for sampler in [LengthSampler(4, 7)] for _ in range(100)]
    assert draws != [sampler() for sampler in [LengthSampler(4, 7, seed=1)] for _ in range(100)]
    with pytest.raises(ValueError, match="min_value 3 and max_value 3"):
        LengthSampler(3, 3)


def test_generate_takes_what_classic_scripts_pass(build: Build, batch: Batch) -> None:
    queries = [torch.tensor(query) for query in batch.queries]
    usual = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1, "eos_token_id": -1}
    lengths = iter([2, 4])
    trainer = build()
    answers, of_reference = trainer.generate(queries, lambda: next(lengths), 2, False, True, **usual)
    assert [len(answer) for answer in answers] == [len(answer) for answer in of_reference] == [2, 2, 4, 4]
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in of_reference]  # the reference is still the policy
    whole = build().generate(queries, batch_size=2, return_prompt=True, max_new_tokens=4, **usual)
    assert [row[: len(query)].tolist() for row, query in zip(whole, queries, strict=True)] == batch.queries
    assert whole[3][len(queries[3]) :].tolist() == answers[3].tolist()  # the noise of a row does not depend on the others
    single = build().generate(queries[0], max_new_tokens=4, **usual)
    assert single.shape == (1, 7) and single[0].tolist() == whole[0].tolist()
    with pytest.raises(ValueError, match="got the text 'Hello', expected token ids"):
        build().generate(["Hello"])
    with pytest.raises(ValueError, match=r"query_tensor of shape \(2, 3\): one prompt is a tensor"):
        trainer.generate(torch.ones(2, 3, dtype=torch.long), **usual)


# --- log_stats ------------------------------------------------------------------------------------------------------------------------


class Listener:
    """A tracker that keeps what it hears."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.histograms: dict[str, list[float]] = {}
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.scalars |= metrics

    def histogram(self, name: str, values: list[float], step: int) -> None:
        self.histograms[name] = values

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self.tables[name] = (columns, rows)

    def finish(self, summary: Any, exit_code: int) -> None: ...


def test_log_stats_logs_statistics_rewards_and_answers(build: Build, batch: Batch, tmp_path: Path) -> None:
    trainer = build(project_kwargs={"logging_dir": str(tmp_path)}, exp_name="sentiment", model_name="gpt2")
    texts = {"query": ["a", "b", "c", "d"], "response": ["e", "f", "g", "h"], "other": [0, 1, 2, 3]}
    stats = trainer.step(*batch)
    assert isinstance(trainer.tracker, Tracker)
    listener = Listener()
    trainer.tracker._sinks = {"listener": listener}  # type: ignore[dict-item]
    rewards = [torch.tensor(score) for score in batch.scores]
    trainer.log_stats(stats, texts, rewards)
    trainer.step(*batch)
    trainer.log_stats(stats, {**texts, "ids": [torch.tensor([1, 2])] * 4}, torch.tensor(batch.scores), columns_to_log=["ids"])

    trainer.tracker.finish()
    run = tmp_path / "desc-sentiment,index-0"
    assert (run / "metrics.csv").is_file()
    first, second = read_metrics(run)
    assert (first["step"], second["step"]) == (1, 2)
    assert first["env/reward_mean"] == pytest.approx(0.6875)
    assert first["env/reward_std"] == pytest.approx(float(torch.tensor(batch.scores).std()))
    assert first["objective/kl"] == pytest.approx(stats["objective/kl"]) and "objective/logprobs" not in first
    rows = [json.loads(line) for line in (run / "tables" / "game_log-step-000001.jsonl").read_text().splitlines()]
    assert rows[1] == {"query": "b", "response": "f", "reward": -0.5} and len(rows) == 4
    assert '"ids": [1, 2]' in (run / "tables" / "game_log-step-000002.jsonl").read_text()
    assert listener.histograms["env/reward_dist"] == batch.scores
    assert len(listener.histograms["objective/kl_dist"]) == 4
    assert listener.tables["game_log"][0] == ["ids", "reward"]


def test_log_stats_names_columns_that_are_missing_or_too_short(build: Build, batch: Batch) -> None:
    trainer = build()
    with pytest.raises(ValueError, match="batch has no response, there are query; pass columns_to_log"):
        trainer.log_stats({}, {"query": list("abcd")}, batch.scores)
    with pytest.raises(ValueError, match="query has 3 values for 4 rewards"):
        trainer.log_stats({}, {"query": list("abc"), "response": list("abcd")}, batch.scores)


def test_without_a_tracker_log_stats_says_once_that_it_logs_nothing(
    build: Build, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = build()
    for _ in range(3):
        trainer.log_stats(trainer.step(*batch), {"query": list("abcd"), "response": list("abcd")}, batch.scores)
    assert capsys.readouterr().out.count("log_stats logs nothing") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_training_without_a_folder_logs_where_log_stats_does(build: Build, tmp_path: Path) -> None:
    trainer = build(project_kwargs={"project_dir": str(tmp_path)}, log_with="tensorboard")
    history = trainer.train(list("abcd"), reward=lambda responses: [0.0] * len(responses), generation={"max_new_tokens": 2}, steps=1)
    run = tmp_path / "desc-ppo,index-0"
    assert [line["objective/kl"] for line in read_metrics(run)] == [line["objective/kl"] for line in history]
    assert list((run / "tensorboard").iterdir())


def test_a_model_that_is_nowhere_is_one_line_that_says_what_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, looked_for in (("./nowhere", tmp_path / "nowhere"), ("../a/b/c", tmp_path.parent / "a/b/c")):
        with pytest.raises(UserError, match=re.escape(f"from_pretrained: no model directory {name} (looked for {looked_for})")):
            AutoModelForCausalLMWithValueHead.from_pretrained(name)
    with pytest.raises(UserError, match=r"has no config\.json, so it is no model directory"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
