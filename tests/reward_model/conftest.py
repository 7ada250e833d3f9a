"""A toy world in which one word tells good answers from bad ones, and configs that learn it in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Write = Callable[..., Path]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
    "t5": {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


def toy_rows(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Answers with "good" are preferred and score 2 to 3, those with "bad" -2 to -1; lengths vary on both sides."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question = f"What is thing {seed}-{number}?"
        good, bad = (f"{word} {'thing ' * draw.randint(1, 4)}{draw.randint(0, 9)}" for word in ("good", "bad"))
        if kind == "pair":
            rows.append({"Question": question, "Accepted_Answer": good, "Answer": bad})
        elif kind == "score":
            rows.append({"Question": question, "Answer": good, "Score": 2 + draw.random()})
            rows.append({"Question": question, "Answer": bad, "Score": -1 - draw.random()})
        else:
            rows.append({"Question": question, "Answer": good})
    return rows


@pytest.fixture
def write_data(tmp_path: Path) -> Write:
    """write_data(kind, train=32, val=6, test=8) -> path of a data file."""

    def write(kind: str, train: int = 32, val: int = 6, test: int = 8) -> Path:
        path = tmp_path / f"{kind}.json"
        splits = {"train": toy_rows(kind, train, 1), "val": toy_rows(kind, val, 2), "test": toy_rows(kind, test, 3)}
        path.write_text(json.dumps(splits))
        return path

    return write


@pytest.fixture
def write_config(tmp_path: Path, write_data: Write) -> Write:
    """write_config(kind, architecture="gpt_neo", **sections) -> path of a training config on toy data; sections are merged into it."""

    def write(kind: str, architecture: str = "gpt_neo", **sections: Any) -> Path:
        config: dict[str, Any] = {
            "desc": "toy",
            "model_init": {"model_type": architecture, "vocab_size": 270, "config": ARCHITECTURES[architecture]},
            "data": {"data_dir": str(write_data(kind)), "batch_size": 8, "max_length": 64},
            "model_params": {"learning_rate": 3e-3, "warmup_steps_per_cent": 0.1},
            "trainer": {
                "checkpoint": {"dirpath": str(tmp_path / "models"), "monitor": "val/loss"},
                "params": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            },
            "wandb": {"mode": "disabled"},
        }
        for section, values in sections.items():
            if isinstance(values, dict) and isinstance(config.get(section), dict):
                config[section] = merged(config[section], values)
            elif values is None:
                config.pop(section, None)
            else:
                config[section] = values
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, section by section."""
    out = dict(old)
    for key, value in new.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
