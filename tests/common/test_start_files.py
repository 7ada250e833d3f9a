"""Weights that are loaded over a base model: what is read from where, and what is refused before torch or after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.models.load import build_generator, load_generator, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit
from common.start_files import StartFiles, check_start_files, start_files

INIT = ModelInit(model_type="llama", config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model directories of one architecture with different weights: a base, and what was made of it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["some text"], 260)
    for seed, name in enumerate(("base", "tuned")):
        model = build_generator(INIT, tokenizer, 32, seed)
        save_model_directory(root / name, model, tokenizer, new_manifest("sft", tokenizer, max_length=32))
    return root / "base", root / "tuned"


def check(base: Path | str, pretrain: Path | str | None, role: Any = "generator") -> Any:
    return check_start_files(
        str(base),
        None if pretrain is None else str(pretrain),
        base_setting="ppo_config.model_name",
        setting="ppo_config.model_pretrain",
        role=role,
    )


def test_null_keeps_the_base(folders: tuple[Path, Path]) -> None:
    base = str(folders[0])
    assert start_files(base, None) == StartFiles(base, base)
    assert check(base, None).name == base


def test_a_whole_directory_stands_for_itself_even_where_the_base_is_not_here(folders: tuple[Path, Path]) -> None:
    tuned = str(folders[1])
    assert start_files("EleutherAI/gpt2", tuned) == StartFiles(tuned, tuned)
    source = check("EleutherAI/gpt2", tuned)
    assert (source.name, source.setting) == (tuned, "ppo_config.model_pretrain")


@pytest.mark.parametrize("form", ["file", "folder", "pickle", "without a tokenizer", "of a wrapped model"])
def test_bare_weights_are_read_over_the_base(folders: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    base, tuned = folders
    state = load_file(tuned / "model.safetensors")
    pretrain = tmp_path
    if form == "file":
        pretrain = tuned / "model.safetensors"
    elif form == "folder":
        shutil.copy(tuned / "model.safetensors", tmp_path)
    elif form == "pickle":
        torch.save(state, tmp_path / "model.pt")
    elif form == "of a wrapped model":
        save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    else:  # as save_pretrained of a model alone leaves it
        load_generator(str(tuned)).save_pretrained(tmp_path)
    files = start_files(str(base), str(pretrain))
    assert (files.model, files.tokenizer, len(files.weights)) == (str(base), str(base), 1)
    assert check(base, pretrain).name == str(base)
    loaded, expected = load_generator(files.model, weights=files.weights), load_generator(str(tuned))
    assert not loaded.training
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_of_another_model_are_refused_in_a_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    state = load_file(tuned / "model.safetensors")
    few, wide, other = tmp_path / "few.safetensors", tmp_path / "wide.safetensors", tmp_path / "text.pt"
    norm = "model.norm.weight"
    save_file({name: tensor for name, tensor in state.items() if name != norm}, few)
    save_file({**state, norm: torch.ones(17)}, wide)
    torch.save({"epoch": 3}, other)
    with pytest.raises(UserError, match=r"few.safetensors lacks weights that LlamaForCausalLM needs: model.norm.weight"):
        load_generator(str(base), weights=[few])
    with pytest.raises(UserError, match=r"wide.safetensors: model.norm.weight is \(17,\), but the base model has \(16,\)"):
        load_generator(str(base), weights=[wide])
    with pytest.raises(UserError, match=r"text.pt: got dict, expected names of weights and their tensors"):
        load_generator(str(base), weights=[other])
    other.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"text.pt: no weights can be read from it"):
        load_generator(str(base), weights=[other])


class Trap:
    """A pickle of it makes a file where it is read by a reader that runs what pickles hold."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_bare_weights_run_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "mark")}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: no weights can be read from it: its pickle \(.bin\) holds more than weights"):
        load_generator(str(folders[0]), weights=[tmp_path / "model.pt"])
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the trap is one
    assert (tmp_path / "mark").exists()


def test_a_directory_of_another_size_or_without_weights_is_refused_before_torch(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    shutil.copytree(tuned, tmp_path / "wide")
    config = json.loads((tuned / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(UserError, match=r"ppo_config.model_pretrain: .*wide has hidden_size 32, but the base model .*base has 16"):
        check(base, tmp_path / "wide")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"ppo_config.model_pretrain: .*empty holds no weights \(model.safetensors"):
        check(base, tmp_path / "empty")
    with pytest.raises(UserError, match=r"ppo_config.model_pretrain: no model directory .*nowhere"):
        check(base, tmp_path / "nowhere")


def test_a_reward_head_comes_with_its_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As llm-on-ray saves its reward models: the transformer's weights under their bare names, the head as `value_head`."""
    base, tuned = folders
    transformer = load_generator(str(tuned)).model
    state = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    head = torch.randn(1, 16)
    torch.save({**state, "value_head.weight": head, "value_head.bias": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="has no reward head"):
        check(base, None, role="reward")
    files = start_files(str(base), str(tmp_path))
    assert check(base, tmp_path, role="reward").name == str(base)
    model = RewardModel.load(files.model, weights=files.weights)
    assert torch.equal(model.readout.score.weight, head)  # type: ignore[union-attr]
    for name, tensor in state.items():
        assert torch.equal(model.backbone.state_dict()[name], tensor), name
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt lacks weights that LlamaForSequenceClassification needs: score.weight"):
        RewardModel.load(files.model, weights=files.weights)
