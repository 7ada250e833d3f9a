"""A script as it was written for trl 0.11.4, from data set to a model that plain transformers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from common.tracking import read_metrics
from rlhf.ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)

TEXTS = ["Is water wet?", "Is the moon far away?", "Who is it?", "What is the time?", "Is it late?"]


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_a_classic_script_runs_from_data_set_to_saved_model(kind: str, policy_dir: Path, t5_dir: Path, tmp_path: Path) -> None:
    causal = kind == "causal"
    wrapped: Any = AutoModelForCausalLMWithValueHead if causal else AutoModelForSeq2SeqLMWithValueHead
    config = PPOConfig(
        model_name=str(policy_dir if causal else t5_dir),
        learning_rate=1e-3,
        batch_size=2,
        mini_batch_size=1,
        gradient_accumulation_steps=2,
        ppo_epochs=2,
        target_kl=0.1,
        early_stopping=True,
        log_with="tensorboard",
        project_kwargs={"logging_dir": str(tmp_path / "logs")},
    )
    model = wrapped.from_pretrained(config.model_name)
    ref_model = create_reference_model(model, num_shared_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.encode(row["text"]), "query": row["text"]}

    def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in rows] for key in rows[0]}

    dataset = Dataset.from_list([tokenize({"text": text}) for text in TEXTS]).with_format("torch")
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collate)
    assert ppo_trainer.is_encoder_decoder is not causal and ppo_trainer.accelerator.num_processes == 1
    length = LengthSampler(3, 6)
    generation = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
    assert ppo_trainer.dataloader is not None
    for batch in ppo_trainer.dataloader:
        queries = batch["input_ids"]
        responses, of_reference = ppo_trainer.generate(
            queries, return_prompt=False, generate_ref_response=True, length_sampler=length, **generation
        )
        batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
        batch["ref_response"] = tokenizer.batch_decode(of_reference, skip_special_tokens=True)
        rewards = [torch.tensor(float(len(response))) for response in batch["response"]]
        if not causal:  # answers sampled by transformers begin with the start token
            responses = [torch.cat([torch.tensor([model.config.decoder_start_token_id]), response]) for response in responses]
        stats = ppo_trainer.step(queries, responses, rewards)
        ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response"])
    ppo_trainer.save_pretrained(str(tmp_path / "model"))

    run = tmp_path / "logs" / "desc-ppo,index-0"
    first, second = read_metrics(run)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4) and abs(second["objective/kl"]) > 1e-4
    assert first["tokens/responses_len_mean"] <= 5
    [row, _] = [json.loads(line) for line in (run / "tables" / "game_log-step-000002.jsonl").read_text().splitlines()]
    assert row["query"] in TEXTS and set(row) == {"query", "response", "ref_response", "reward"}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    loaded = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(tmp_path / "model").eval()
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    if not causal:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        ours, _, values = model(**inputs)
        torch.testing.assert_close(loaded(**inputs).logits, ours, rtol=1e-5, atol=1e-5)
        again = wrapped.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(again(**inputs)[2], values, rtol=1e-5, atol=1e-5)
    assert bool(values.any()) and len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(tokenizer)
