"""A pickle runs code when it is loaded. One lies in the way of every load path here: none is run, and the error says what to do."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.models.load import load_backbone, load_generator, load_tokenizer
from common.models.reward import RewardScorer
from common.records import read_splits
from common.state_cache import Shard, StateCache, wider
from common.state_facts import StateFacts
from reward_model.classification.test_reward import main as evaluate_pairs
from reward_model.classification.train_reward import main as train_pairs
from reward_model.compare_readouts import main as compare_readouts
from reward_model.regression.test_reward import main as evaluate_scores
from reward_model.regression.train_reward import main as train_scores
from reward_model.score import main as score
from rlhf.ppo.models import AutoModelForCausalLMWithValueHead
from rlhf.test_ppo import main as evaluate_ppo
from rlhf.train_ppo import main as train_ppo
from sft.ask import main as ask
from sft.test_sft import main as evaluate_sft
from sft.train_sft import main as train_sft
from tests.security.conftest import Canary, Problem, pickle_weights, unlisted

WHAT_TO_DO = (
    "its pickle (.bin) holds more than weights, and was not run; take the model as safetensors, or convert it where you trust it: load it "
    "there and write it with save_pretrained"
)


# --- weights --------------------------------------------------------------------------------------------------------------------------


def in_a_zip(folder: Path, canary: Canary) -> None:
    pickle_weights(folder, canary.trap)


def in_the_older_format(folder: Path, canary: Canary) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"trap": canary.trap}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bare(folder: Path, canary: Canary) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(canary.pickled)


def in_a_tar(folder: Path, canary: Canary) -> None:
    """The oldest format, for which torch advises to switch its guard off."""
    (folder / "model.safetensors").unlink()
    with tarfile.open(folder / "pytorch_model.bin", "w") as tar:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(canary.pickled)
        tar.addfile(entry, io.BytesIO(canary.pickled))


def in_a_shard(folder: Path, canary: Canary) -> None:
    pickle_weights(folder, canary.trap)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model-1.bin", "trap": "pytorch_model-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("spoil", [in_a_zip, in_the_older_format, bare, in_a_tar, in_a_shard])
def test_weights_of_a_generator(spoil: Callable[[Path, Canary], None], generator: Path, canary: Canary, problem: Problem) -> None:
    spoil(unlisted(generator), canary)
    for load in (load_generator, load_backbone, AutoModelForCausalLMWithValueHead.from_pretrained):
        line = problem(lambda load=load: load(str(generator)))  # type: ignore[misc]
        assert line == f"no model can be loaded from {generator}: {WHAT_TO_DO}"


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02}q\x00."])
def test_a_pickle_that_is_broken_is_one_line_too(content: bytes, generator: Path, problem: Problem) -> None:
    (unlisted(generator) / "model.safetensors").unlink()
    (generator / "pytorch_model.bin").write_bytes(content)
    assert problem(lambda: load_generator(str(generator))).startswith(f"no model can be loaded from {generator}: ")


def test_plain_weights_in_a_pickle_are_read(generator: Path) -> None:
    """Without a trap the same file loads: the refusals above are about what is in it."""
    before = load_generator(str(generator)).state_dict()
    pickle_weights(unlisted(generator), torch.zeros(1))
    after = load_generator(str(generator)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pickles_beside_safetensors_are_not_touched(generator: Path, reward: Path, canary: Canary) -> None:
    """Other systems' names for weights, heads, optimizers, and training arguments."""
    names = ["pytorch_model.bin", "adapter_model.bin", "value_head.bin", "v_head.pt", "readout.pt", "optimizer.pt", "scheduler.pt"]
    names += ["training_args.bin", "rng_state.pth", "state.pt", "checkpoint.ckpt", "trainer_state.pkl", "embeddings.npy", "tokenizer.pkl"]
    for folder in (generator, reward):
        for name in names:
            (folder / name).write_bytes(canary.pickled)
    AutoModelForCausalLMWithValueHead.from_pretrained(generator)
    load_tokenizer(str(generator))
    RewardScorer(reward)


@pytest.mark.parametrize("name", ["model.safetensors", "value_head.safetensors"])
def test_a_pickle_named_safetensors_in_a_policy(name: str, generator: Path, canary: Canary, problem: Problem) -> None:
    (generator / name).write_bytes(canary.pickled)
    line = problem(lambda: AutoModelForCausalLMWithValueHead.from_pretrained(generator))
    assert str(generator) in line and "deserializing header" in line


@pytest.mark.parametrize("name", ["model.safetensors", "readout.safetensors"])
def test_a_pickle_named_safetensors_in_a_reward_model(name: str, reward: Path, canary: Canary, problem: Problem) -> None:
    (reward / name).write_bytes(canary.pickled)
    line = problem(lambda: RewardScorer(reward))
    assert str(reward) in line and "deserializing header" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "manifest.json", "generation_config.json"])
def test_a_pickle_named_as_a_file_of_json(name: str, generator: Path, canary: Canary, problem: Problem) -> None:
    (generator / name).write_bytes(canary.pickled)
    line = problem(lambda: (load_tokenizer(str(generator)), load_generator(str(generator))))
    assert str(generator) in line


def test_an_adapter_is_not_loaded_over_a_model(generator: Path, generator_dir: Path, canary: Canary, problem: Problem) -> None:
    """peft's pickle, and transformers' habit of taking the base model from wherever the adapter says."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(generator_dir), "r": 2, "target_modules": ["q_proj"]}
    (generator / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"trap": canary.trap}, generator / "adapter_model.bin")
    for load in (load_generator, load_backbone, AutoModelForCausalLMWithValueHead.from_pretrained):
        assert "merge the two, or move the adapter away" in problem(lambda load=load: load(str(generator)))  # type: ignore[misc]
    assert "merge the two, or move the adapter away" in problem(lambda: ask([str(generator), "Is it?"]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_adapter_s_pickle_is_not_run_by_peft(generator: Path, tmp_path: Path, canary: Canary) -> None:
    """The migration guide sends people with a bare adapter to peft."""
    from peft import PeftModel

    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(generator), "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(canary.pickled)
    with pytest.raises(Exception, match="Weights only load failed"):
        PeftModel.from_pretrained(load_generator(str(generator)), str(folder))


# --- commands -------------------------------------------------------------------------------------------------------------------------

ROW = {"Question": "Is it?", "Answer": "It is."}
ROWS = {
    "sft": [ROW],
    "pair": [{"Question": "Is it?", "Accepted_Answer": "It is.", "Answer": "No."}],
    "score": [{**ROW, "Score": 1.0}, {**ROW, "Answer": "No.", "Score": 0.0}],
}
COMMANDS: dict[str, tuple[Callable[[list[str]], Any], str, dict[str, Any]]] = {
    "train_sft": (train_sft, "sft", {"data": {"data_dir": "DATA"}, "model_name": "GENERATOR"}),
    "train_sft ckpt_path": (
        train_sft,
        "sft",
        {"data": {"data_dir": "DATA"}, "model_init": {"vocab_size": 270}, "trainer": {"ckpt_path": "GENERATOR"}},
    ),
    "test_sft": (evaluate_sft, "sft", {"data": {"data_dir": "DATA"}, "model_name": "GENERATOR", "test_params": {"log_file": "OUT.csv"}}),
    "test_ppo": (evaluate_ppo, "sft", {"data": {"data_dir": "DATA"}, "model_name": "GENERATOR", "test_params": {"log_file": "OUT.csv"}}),
    "train_classification": (train_pairs, "pair", {"data": {"data_dir": "DATA"}, "model_name": "GENERATOR"}),
    "train_regression ckpt_path": (
        train_scores,
        "score",
        {
            "data": {"data_dir": "DATA"},
            "model_name": "GENERATOR",
            "model_params": {"readout": {"name": "mean_pool"}},
            "trainer": {"ckpt_path": "REWARD"},
        },
    ),
    "compare_readouts": (compare_readouts, "pair", {"data": {"data_dir": "DATA"}, "model_name": "GENERATOR", "objective": "pairs"}),
    "test_classification": (
        evaluate_pairs,
        "pair",
        {"data": {"data_dir": "DATA"}, "model_name": "REWARD", "test_params": {"log_file": "OUT.csv"}},
    ),
    "test_regression": (
        evaluate_scores,
        "score",
        {"data": {"data_dir": "DATA"}, "model_name": "REWARD", "test_params": {"log_file": "OUT.csv"}},
    ),
    "train_ppo": (
        train_ppo,
        "sft",
        {
            "data_config": {"data_file_path": "DATA"},
            "ppo_config": {"model_name": "GENERATOR", "batch_size": 1},
            "reward_config": {"reward_model_name": "REWARD"},
        },
    ),
    "train_ppo reward": (
        train_ppo,
        "sft",
        {
            "data_config": {"data_file_path": "DATA"},
            "ppo_config": {"model_name": "WHOLE", "batch_size": 1},
            "reward_config": {"pipeline": {"type": "ensemble", "members": [{"type": "model", "model_name": "REWARD"}]}},
        },
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_takes_a_model(
    name: str, generator: Path, reward: Path, generator_dir: Path, tmp_path: Path, canary: Canary, problem: Problem
) -> None:
    for folder in (generator, reward):
        pickle_weights(unlisted(folder), canary.trap)
    main, kind, config = COMMANDS[name]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({split: ROWS[kind] for split in ("train", "val", "test")}))
    text = yaml.safe_dump({**config, "results_root": str(tmp_path / "runs")} if "test" not in name else config)
    places = {"DATA": data, "GENERATOR": generator, "REWARD": reward, "WHOLE": generator_dir, "OUT": tmp_path / "out"}
    for word, place in places.items():
        text = text.replace(word, str(place))
    (tmp_path / "config.yaml").write_text(text)
    assert WHAT_TO_DO in problem(lambda: main(["--config", str(tmp_path / "config.yaml")]))
    assert not list(tmp_path.glob("runs/*/*"))


def test_ask_and_score(generator: Path, reward: Path, tmp_path: Path, canary: Canary, problem: Problem) -> None:
    for folder in (generator, reward):
        pickle_weights(unlisted(folder), canary.trap)
    (tmp_path / "data.json").write_text(json.dumps([ROW]))
    assert WHAT_TO_DO in problem(lambda: ask([str(generator), "Is it?"]))
    assert WHAT_TO_DO in problem(lambda: score([str(reward), str(tmp_path / "data.json")]))


# --- rows and states ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.pkl", "train.npy", "train.npz", "train.pt", "train.json", "train.jsonl.gz", "train.parquet"])
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_pickle_among_data_files(
    name: str, prefix: str, tmp_path: Path, canary: Canary, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).write_bytes(canary.pickled)
    assert problem(lambda: read_splits(f"{prefix}{folder}", "sft")).startswith(f"{prefix}{folder}")
    if not prefix:
        problem(lambda: read_splits(str(folder / name), "sft"))


def test_a_data_set_s_loader_of_pickles_and_its_script_are_not_used(
    tmp_path: Path, canary: Canary, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "qa"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps([ROW]))
    (folder / "qa.py").write_text(canary.code)
    assert "Dataset scripts are no longer supported" in problem(lambda: read_splits(f"hf:{folder}", "sft"))
    (folder / "qa.py").rename(folder / "__init__.py")
    assert len(read_splits(f"hf:{folder}", "sft").train) == 1
    (folder / "train.json").unlink()
    (folder / "train.csv").write_bytes(canary.pickled)
    monkeypatch.chdir(folder)
    problem(lambda: read_splits("hf:pandas", "sft"))  # a name of `datasets` for a reader of pickles in the working directory


def test_states_on_disk_are_numbers_whatever_lies_there(tmp_path: Path, canary: Canary) -> None:
    facts = StateFacts(weights="w", config="{}", code="c", tokenizer="t", part="whole", token="all", layers=1, hidden_size=1)
    folder = StateCache(tmp_path, facts).folder
    folder.mkdir()
    trap = canary.pickled
    contents = {
        "shard-pickle": (trap, trap),
        "shard-array": (trap, json.dumps(asdict(Shard(1, 1, len(trap), zlib.crc32(trap)))).encode()),
        "shard-negative": (trap, json.dumps(asdict(Shard(1, -9, len(trap), zlib.crc32(trap)))).encode()),
        "shard-endless": (trap, json.dumps(asdict(Shard(10**30, 10**30, len(trap), zlib.crc32(trap)))).encode()),
    }
    for name, (states, manifest) in contents.items():
        (folder / f"{name}.states").write_bytes(states)
        (folder / f"{name}.json").write_bytes(manifest)
    (folder / "cache.json").write_bytes(trap)
    digests = np.zeros(1, dtype="S16")
    assert list(wider(tmp_path, facts, digests).missing(digests)) == [0]
    with StateCache(tmp_path, facts).writing():
        pass
    assert not list(folder.glob("shard-*"))  # what is damaged is removed, so that it is computed anew
