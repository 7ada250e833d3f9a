"""What `--validate` finds out about a fresh model, and whether texts have room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.model_init import check_buildable, check_fresh_length, check_room
from common.model_source import check_model_source
from common.models.load import build_generator, train_tokenizer
from common.schema import ModelInit
from common.tokenization import Encoder

SIZE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("init", "length", "message"),
    [
        ({"config": {"max_position_embeddings": 128}}, 5000, "data.max_length 5000 exceeds the 128 positions of model_init.config"),
        ({"model_type": "gpt2", "config": {"n_positions": 32}}, 33, "data.max_length 33 exceeds the 32 positions of model_init.config"),
        ({}, 6, "data.max_length: got 6, expected at least 7: the prompt format alone takes 6 tokens"),
        ({"model_type": "t5"}, 5, "data.max_length: got 5, expected at least 6: the prompt format alone takes 6 tokens"),
    ],
)
def test_lengths_that_a_fresh_model_cannot_have(init: dict[str, Any], length: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_fresh_length(ModelInit(**init), length, "data.max_length")
    assert str(caught.value) == message


def test_the_frame_of_a_fresh_tokenizer_is_what_the_check_says(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Question: what is it?\nAnswer: it is that."] * 20, 400)
    with pytest.raises(UserError, match="got 6, expected at least 7: the prompt format alone takes 6 tokens"):
        Encoder(tokenizer, max_length=6)
    model = build_generator(ModelInit(config=SIZE), tokenizer, 64, 0)
    source = check_model_source(str(save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("sft", tokenizer))))
    with pytest.raises(UserError, match=r"data\.max_length: got 6, expected at least 7: the prompt format alone takes 6 tokens"):
        check_room(source, 6, "qa", "data.max_length")
    check_room(source, 7, "qa", "data.max_length")
    check_room(source, 6, "qa", "max_prompt_length", answer=False)


@pytest.mark.parametrize(
    ("init", "writes_text", "message"),
    [
        ({"config": {"num_head": 4}}, True, r"model_init\.config\.num_head: gpt_neo has no such setting; did you mean num_heads\?"),
        ({"model_type": "gpt9"}, True, r"model_init\.model_type: got gpt9; did you mean gpt"),
        ({"config": {**SIZE, "hidden_size": 0}}, True, r"model_init\.config\.hidden_size: got 0, expected a whole number >= 1"),
        ({"config": {**SIZE, "num_layers": "two"}}, True, r"model_init\.config\.num_layers: got two, expected a whole number >= 1"),
        ({"config": {**SIZE, "num_heads": 5}}, False, "cannot be built.*divisible"),
        ({"model_type": "bert"}, True, "writes no text"),
        ({"vocab_size": 100}, True, r"model_init\.vocab_size 100 is too small"),
    ],
)
def test_models_that_cannot_be_built(init: dict[str, Any], writes_text: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_buildable(ModelInit(**init), 64, writes_text=writes_text)


def test_a_model_of_any_size_is_checked_without_memory_for_it() -> None:
    large = {"hidden_size": 65536, "num_layers": 4, "num_heads": 64}  # a terabyte of weights
    check_buildable(ModelInit(config=large), 64, writes_text=True)
    check_buildable(ModelInit(model_type="bert"), 64, writes_text=False)


def test_lengths_are_checked_without_torch() -> None:
    code = "import sys, common.model_init; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
