"""llm-on-ray's workflow with its files: SFT, reward model and PPO from their configs and data as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.checkpoint import new_manifest, save_model_directory
from common.models.load import build_generator, train_tokenizer
from common.records import read_splits
from common.schema import ModelInit
from common.tracking import read_metrics
from reward_model.classification.train_reward import main as train_reward
from rlhf.train_ppo import main as train_ppo
from sft.train_sft import main as train_sft

ROOT = Path(__file__).resolve().parents[1]
INIT = ModelInit(model_type="llama", config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of all three."""
    tokenizer = train_tokenizer(["Human: a question", "Assistant: an answer"], 280)
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_model_directory(folder, build_generator(INIT, tokenizer, 128, 0), tokenizer, new_manifest("sft", tokenizer, max_length=128))


def written(path: Path, general: dict[str, Any], train_file: Path, training: dict[str, Any], **ours: Any) -> str:
    """A config in their sections; in `ours` what they have no key for."""
    dataset = {"train_file": str(train_file), "validation_file": None, "validation_split_percentage": 10}
    path.write_text(yaml.safe_dump({"General": general, "Dataset": dataset, "Training": {"device": "CPU", **training}, **ours}))
    return str(path)


def few_rows(source: Path, folder: Path) -> Path:
    """The first twelve rows that are short, pretty-printed where the file is."""
    text = source.read_text(encoding="utf-8")
    decoder, rows, place = json.JSONDecoder(), [], 0
    while place < len(text.rstrip()) and len(rows) < 12:
        row, place = decoder.raw_decode(text, place + len(text[place:]) - len(text[place:].lstrip()))
        if len(json.dumps(row)) < 600:
            rows.append(row)
    indent = 4 if text.startswith("{\n") else None
    (folder / source.name).write_text("".join(json.dumps(row, indent=indent) + "\n" for row in rows), encoding="utf-8")
    return folder / source.name


SOURCES = {
    "samples": ("examples/data/sample_finetune_data.jsonl", "examples/data/sample_rm_data.jsonl", "examples/data/sample_ppo_data.jsonl"),
    "theirs": ("llm_on_ray_sft.jsonl", "llm_on_ray_rm.jsonl", "llm_on_ray_ppo.jsonl"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_three_stages_follow_one_another_as_in_their_workflow(
    source: str, base: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model_pretrain` and `rm_pretrain` are what the first two stages wrote, over the base model that all three name."""
    folder = ROOT if source == "samples" else request.getfixturevalue("shared") / "data"
    sft, pairs, prompts = (few_rows(folder / name, tmp_path) for name in SOURCES[source])
    training = {"optimizer": "AdamW", "batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-3, "lr_scheduler": "linear"}
    general = {"base_model": str(base), "output_dir": str(tmp_path / "sft")}
    finetune = written(tmp_path / "finetune.yaml", general, sft, training, data={"max_length": 128})
    assert train_sft(["--config_path", finetune]) == 0
    general = {"base_model": str(base), "output_dir": str(tmp_path / "rm")}
    reward = written(tmp_path / "reward.yaml", general, pairs, training, data={"max_length": 128})
    assert train_reward(["--config_path", reward]) == 0
    general = {
        "model_name": str(base),
        "model_pretrain": str(tmp_path / "sft/latest"),
        "rm_name": str(base),
        "rm_pretrain": str(tmp_path / "rm/latest"),
        "output_dir": str(tmp_path / "ppo"),
    }
    training = {"optimizer": "Adafactor", "experience_batch_size": 4, "training_iteration": 2, "learning_rate": 1e-3, "kl_coeff": 0.2}
    ours = {"generation_config": {"max_new_tokens": 4}, "evaluation": {"num_prompts": 1}}
    ppo = written(tmp_path / "ppo.yaml", general, prompts, training, **ours)
    assert train_ppo(["--config_path", ppo]) == 0
    steps = [line for line in read_metrics(tmp_path / "ppo/desc-run,index-0") if "objective/kl" in line]
    assert [line["objective/kl_coef"] for line in steps] == [0.2, 0.2]  # fixed
    assert ": Training.kl_coeff is read as ppo_config.init_kl_coef" in capsys.readouterr().out


def test_a_context_stands_between_question_and_answer(base: Path, tmp_path: Path) -> None:
    from common.prompts import render_prompt

    row = {"instruction": "Who came?", "context": "Ann came.", "response": "Ann."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "context": ""}) + "\n")
    records = read_splits(str(tmp_path / "rows.jsonl"), "sft", validation_split_percentage=0).train
    assert [render_prompt(record.prompt) for record in records] == [
        "Question: Who came?\nContext: Ann came.\nAnswer:",
        "Question: Who came?\nAnswer:",
    ]
