"""Things that would do something if they were trusted: pickles, code, YAML tags. What they would do is to make the canary."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.models.load import build_generator, train_tokenizer
from common.models.reward import RewardModel
from common.readout_settings import ReadoutSettings
from common.schema import ModelInit
from rlhf.ppo.models import with_value_head

SIZE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4, "max_position_embeddings": 1024}
Problem = Callable[..., str]
MakeDirectory = Callable[[], Path]


class Canary:
    """`path` appears when one of these is trusted: unpickled, imported, constructed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self.trap)

    @property
    def trap(self) -> Any:
        """An object whose unpickling makes the canary."""
        return _Trap(str(self.path))

    @property
    def code(self) -> str:
        """Python that makes it when it is imported."""
        return f"import os\nos.makedirs({str(self.path)!r}, exist_ok=True)\n"

    @property
    def tag(self) -> str:
        """YAML that makes it when it is loaded unsafely."""
        return f"!!python/object/apply:os.mkdir ['{self.path}']"


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canary]:
    """Whatever a test does with it, it must not have appeared at the end."""
    canary = Canary(tmp_path_factory.mktemp("canary") / "appeared")
    yield canary
    assert not canary.path.exists(), "something was run that came with a file"


@pytest.fixture
def problem() -> Problem:
    """problem(call) -> the one line that `call` refuses with."""

    def of(call: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            call()
        (line,) = caught.value.problems
        assert "\n" not in line
        return line

    return of


# --- model directories, made once and copied ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["Question: Is it?\nAnswer: It is."], 270)


@pytest.fixture(scope="session")
def generator_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A policy with its value head, as PPO saves it."""
    model = build_generator(ModelInit(config=SIZE), tokenizer, 64, 0)
    head = with_value_head(model).v_head
    folder = tmp_path_factory.mktemp("models") / "generator"
    return save_model_directory(folder, model, tokenizer, new_manifest("ppo", tokenizer, max_length=64), extra=head.save)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A reward model with a readout of its own file."""
    backbone = build_generator(ModelInit(config=SIZE), tokenizer, 64, 1).transformer
    model = RewardModel.from_backbone(backbone, ReadoutSettings(name="mean_pool"))
    manifest = new_manifest("reward_classification", tokenizer, max_length=64, score_mean=0.0, score_scale=1.0)
    return save_model_directory(tmp_path_factory.mktemp("models") / "reward", model, tokenizer, manifest)


@pytest.fixture
def generator(generator_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(generator_dir, tmp_path / "generator"))


@pytest.fixture
def reward(reward_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(reward_dir, tmp_path / "reward"))


def unlisted(folder: Path) -> Path:
    """The directory as whoever spoils it would leave it: its manifest lists no files, so that nothing seems to be missing."""
    change_json(folder / "manifest.json", files={})
    return folder


def pickle_weights(folder: Path, trap: Any) -> Path:
    """The weights as a pickle, with a trap among them, where the safetensors were."""
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "trap": trap}, folder / "pytorch_model.bin")
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Merge keys into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
