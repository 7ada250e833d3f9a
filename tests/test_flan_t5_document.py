"""docs/migrating_from_flan_t5.md tells the truth: every setting it names exists, and its command is read as its table says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from common.config import load_config, parse_command_line
from common.lightning_arguments import ARGUMENTS
from common.readout_settings import ReadoutName
from common.schema_types import dotted, walk_fields
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/migrating_from_flan_t5.md").read_text(encoding="utf-8")
STAGE = ROOT / "reward_model/classification"
CONFIG = STAGE / "configs/flan_t5_hh_rlhf.yaml"
# Every setting of the configuration that the page is about, and its groups' choices.
THEIRS = frozenset(
    {
        "sim_name", "desc", "index", "extra_stuff", "output_dir_name", "sim_man", "seed", "device_name", "use_multi_gpu_if_available",
        "data.seed", "data.name", "data.subdir", "data.val_fraction", "data.max_tokens", "data.pretrain_batch_size_per_device",
        "model=NAME", "model.transformer_name", "model.train_transformer", "model.use_pretrained_output",
        "model.reward_model.n_blocks_to_use", "model.reward_model.pooling_output_dim", "model.reward_model.readout_additional_layers",
        "training.optimizer.type", "training.optimizer.init_lr", "training.optimizer.final_lr", "training.optimizer.weight_decay",
        "training.optimizer.correct_bias", "training.loop.max_non_optim_vals", "training.loop.train_batch_size",
        "training.loop.val_batch_size", "training.loop.n_val_data", "training.loop.n_epochs", "training.loop.n_batches",
        "training.loop.intervals.validation", "training.loop.intervals.train_status_update", "training.loop.intervals.progress_logging",
        "loggers", "RESULTS_ROOT_DIR",
    }
)  # fmt: skip
CHOICES = frozenset(
    {"layerwise_attention", "layerwise_weighted_attention", "full_attention_pooling", "decoder_output", "attention_pooled_encoder",
     "attention_pooled_decoder"}
)  # fmt: skip


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = re.search(r"((?:^\|.*\n)+)", TEXT[TEXT.index(f"\n## {heading}\n") :], flags=re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def half(sign: str) -> list[str]:
    """The words of the command before (`-`) or after (`+`) the change."""
    diff = re.search(r"^```diff\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert diff is not None
    return shlex.split("".join(line[1:] for line in diff[1].splitlines(keepends=True) if line[0] == sign).replace("\\\n", " "))


def test_every_setting_of_theirs_has_a_row() -> None:
    told = {name for row in rows("Settings") for name in names(row[0])}
    assert told == THEIRS


@pytest.mark.parametrize("schema", [ClassificationConfig, RegressionConfig])
def test_every_setting_of_ours_exists(schema: type[ClassificationConfig] | type[RegressionConfig]) -> None:
    known = {dotted(path) for path, _ in walk_fields(schema)} | {f"trainer.params.{name}" for name in ARGUMENTS} | {"readout=NAME"}
    ours = [name for row in rows("Settings") for name in names(row[1])]
    assert len(ours) > 25
    assert not set(ours) - known


def test_every_readout_of_theirs_is_one_of_ours() -> None:
    table = {name: names(row[1]) for row in rows("Readouts") for name in names(row[0])}
    assert table.keys() == CHOICES
    for [name] in table.values():
        assert name in get_args(ReadoutName) and (STAGE / "configs/readout" / f"{name}.yaml").is_file()


def test_the_command_is_read_and_says_what_theirs_said() -> None:
    theirs = dict(word.split("=") for word in half("-")[2:])
    words = half("+")
    assert (
        words[1] == "reward_model/classification/train_reward.py"
        and (ROOT / words[1]).is_file()
        and words[3] == str(CONFIG.relative_to(ROOT))
    )
    config = parse_command_line(ClassificationConfig, STAGE, ["--config_file", str(CONFIG), *words[4:]], description="").config
    gpus = 4
    assert (config.desc, str(config.index)) == (theirs["desc"], theirs["index"])
    assert config.model_params.readout.name == theirs["model"]
    assert config.model_params.freeze_backbone != (theirs["model.train_transformer"] == "True")
    assert str(config.use_multi_gpu_if_available) == theirs["use_multi_gpu_if_available"]
    assert gpus * config.data.batch_size == int(theirs["training.loop.train_batch_size"])
    assert gpus * (config.data.val_batch_size or 0) == int(theirs["training.loop.val_batch_size"])
    assert config.trainer.params["max_epochs"] == int(theirs["training.loop.n_epochs"])


def test_their_names_of_batch_sizes_are_read() -> None:
    invocation = parse_command_line(
        ClassificationConfig, STAGE, ["--config_file", str(CONFIG), "data.train_batch_size=7", "data.val_batch_size=9"], description=""
    )
    assert (invocation.config.data.batch_size, invocation.config.data.val_batch_size) == (7, 9)
    assert "override data.train_batch_size: train_batch_size is read as batch_size" in invocation.notes


def test_the_evaluation_command_is_read() -> None:
    [command] = re.findall(r"^```\n(python reward_model/.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert (ROOT / words[1]).is_file()
    config = load_config(RewardTestConfig, ROOT / words[3], words[4:])
    assert (config.data.data_dir, config.data.unusable_rows) == ("hf:Anthropic/hh-rlhf", "drop")
