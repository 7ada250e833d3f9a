"""The README's commands, run from their stage folders as written there, for two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.checkpoint import new_manifest, save_model_directory
from common.models.load import build_generator, train_tokenizer
from common.schema import ModelInit
from tests.processes import as_typed

KINDS = ("classification", "regression")


@pytest.fixture(scope="module")
def sft_model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 1 would hand over, untrained and tiny."""
    tokenizer = train_tokenizer([(root / "reward_model" / "regression" / "data" / "world_scores.json").read_text()[:100_000]], 512)
    config = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    generator = build_generator(ModelInit(model_type="gpt_neo", config=config), tokenizer, 256, seed=0)
    directory = tmp_path_factory.mktemp("sft") / "model"
    return save_model_directory(directory, generator, tokenizer, new_manifest("sft", tokenizer))


def command(root: Path, kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the repository on the path: a script finds it by itself.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root / "reward_model" / kind, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_of_the_readme_run_for_two_steps(kind: str, root: Path, sft_model: Path, tmp_path: Path) -> None:
    readme = (root / "reward_model" / kind / "README.md").read_text()
    train = "train_reward.py --config_file configs/trainer_config.yaml"
    test = "test_reward.py  --config_file configs/test_config.yaml"
    assert f"python {train}" in readme and f"python {test}" in readme
    short = ["trainer.params.max_steps=2", "trainer.params.limit_val_batches=2", "data.batch_size=4"]
    here = [f"model_name={sft_model}", f"trainer.checkpoint.dirpath={tmp_path / 'models'}"]
    code, printed = as_typed(root / "reward_model" / kind, [*train.split(), *here, *short], tmp_path / "printed")
    assert code == 0, printed
    assert "best val/" in printed and str(tmp_path / "models" / "latest") in printed
    here = [f"model_name={tmp_path / 'models' / 'latest'}", f"test_params.log_file={tmp_path / 'scores.csv'}"]
    words = [*test.split(), *here, "test_params.bootstrap_samples=20"]
    code, printed = as_typed(root / "reward_model" / kind, words, tmp_path / "printed")
    assert code == 0, printed
    assert "can it be trusted?" in printed
    assert (tmp_path / "scores.csv").is_file() and (tmp_path / "scores.summary.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_end_with_code_2_and_a_line_each(kind: str, root: Path, tmp_path: Path) -> None:
    mistakes = ("data.batch_size=0", "model_params.learning_rat=1", f"trainer.checkpoint.dirpath={tmp_path / 'models'}")
    failed = command(root, kind, "-X", "importtime", "train_reward.py", "--config_file", "configs/trainer_config.yaml", *mistakes)
    assert failed.returncode == 2
    lines = [line for line in failed.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert any("batch_size" in line for line in lines) and any("learning_rate" in line for line in lines)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in failed.stderr.splitlines()}
    assert not (tmp_path / "models").exists()
