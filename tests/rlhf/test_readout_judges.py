"""PPO with reward models of every readout as its judge, from their directories on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from common.checkpoint import new_manifest, save_model_directory
from common.models.load import build_backbone
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import READS, ReadoutName, ReadoutSettings
from common.schema import ModelInit
from common.tracking import read_metrics
from rlhf.train_ppo import main

JUDGES: dict[ReadoutName, str] = {
    "last_token": "t5",
    "mean_pool": "gpt_neo",
    "weighted_layers": "gpt_neo",
    "layerwise_attention": "t5",
    "full_attention_pooling": "bert",
    "attention_pooled_encoder": "t5",
    "attention_pooled_decoder": "t5",
    "decoder_output": "t5",
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4},
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2},
}
MEAN, SCALE = 0.25, 2.0


def test_every_readout_judges() -> None:
    assert set(JUDGES) == set(READS)


@pytest.mark.parametrize("name", JUDGES)
def test_ppo_is_rewarded_by_what_the_readout_scores(
    name: ReadoutName, tmp_path: Path, policy_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    backbone = build_backbone(ModelInit(model_type=JUDGES[name], config=MODELS[JUDGES[name]]), tokenizer, 64, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3, generator=generator)
    model = RewardModel.from_backbone(backbone, ReadoutSettings(name=name), seed=3)
    manifest = new_manifest("reward_classification", tokenizer, max_length=64, score_mean=MEAN, score_scale=SCALE)
    judge = save_model_directory(tmp_path / "judge", model, tokenizer, manifest)
    data = tmp_path / "prompts.json"
    data.write_text(json.dumps({split: [{"prompt": f"Is {n} a {split}?"} for n in range(4)] for split in ("train", "val")}))
    config = {
        "data_config": {"data_file_path": str(data), "max_prompt_length": 40},
        "generation_config": {"max_new_tokens": 6},
        "ppo_config": {"model_name": str(policy_dir), "batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "steps": 1},
        "reward_config": {"reward_model_name": str(judge)},
        "evaluation": {"num_prompts": 4, "num_samples_logged": 4},
        "save_config": {"checkpoint_dir": str(tmp_path / "models")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(tmp_path / "config.yaml")]) == 0
    folder = tmp_path / "models" / "desc-run,index-0"
    lines = read_metrics(folder)
    assert sum("ppo/loss/policy" in line or "objective/kl" in line for line in lines) == 1
    assert all(math.isfinite(value) for line in lines for value in line.values())
    samples = [json.loads(line) for line in next((folder / "tables").glob("eval_samples-*1.jsonl")).read_text().splitlines()]
    scorer = RewardScorer(judge, batch_size=1)
    ended = [sample["ended"] for sample in samples]
    scores = scorer.score([sample["prompt"] for sample in samples], [sample["answer"] for sample in samples], ended)
    assert [sample["score"] for sample in samples] == pytest.approx([(score - MEAN) / SCALE for score in scores], abs=6e-5)  # four decimals
    assert len({round(score, 4) for score in scores}) > 1
