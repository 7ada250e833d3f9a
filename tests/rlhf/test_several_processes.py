"""`train_ppo.py` under torchrun: two processes are one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.errors import UserError
from common.tracking import read_metrics
from rlhf.ppo.trainer import NonFiniteError, PPOTrainer
from rlhf.train_ppo import main
from tests.processes import as_launched

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["Is it so?", "Why?", "What is the capital of Peru, and is it wet?", "Is water wet?", "Who asks?", "Is 5 a number?", "And 7?"]


def write_config(folder: Path, policy: Path, reward: Path, **ppo: Any) -> Path:
    data = {"train": [{"prompt": question} for question in QUESTIONS], "val": [{"prompt": f"{n}?"} for n in range(5)], "test": []}
    (folder / "prompts.json").write_text(json.dumps(data))
    config = {
        "seed": 3,
        "desc": "two",
        "data_config": {"data_file_path": str(folder / "prompts.json"), "max_prompt_length": 40},
        "generation_config": {"max_new_tokens": 6},
        "global_epochs": 9,
        "ppo_config": {"model_name": str(policy), "ppo_epochs": 2, "learning_rate": 1e-3, "steps": 4, "process_timeout_s": 60, **ppo},
        "reward_config": {"reward_model_name": str(reward)},
        "evaluation": {"num_prompts": 5, "every_n_steps": 2, "num_samples_logged": 3},
        "save_config": {"checkpoint_dir": str(folder / "models"), "save_interval": 2, "keep_last": 3},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def torchrun(*arguments: str, script: Path = ROOT / "rlhf" / "train_ppo.py") -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--nproc_per_node", "2", "--master_port", port, "--shutdown_timeout", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_are_one_run_that_goes_on_bit_for_bit(tmp_path: Path, policy_dir: Path, reward_dir: Path) -> None:
    batch = {"batch_size": 4, "mini_batch_size": 2}
    config = write_config(tmp_path, policy_dir, reward_dir, **batch)
    result = torchrun("--config", str(config))
    assert result.returncode == 0, result
    assert result.stdout.count("data: 7 train, 5 evaluation rows; 4 PPO steps of 8 answers of 2 processes") == 1
    assert result.stderr.count("PPO step 4/4") == 1
    [together] = (tmp_path / "models").glob("desc-two,*")

    (tmp_path / "alone").mkdir()
    main(["--config", str(write_config(tmp_path / "alone", policy_dir, reward_dir, batch_size=8, mini_batch_size=4))])
    alone = tmp_path / "alone" / "models" / "desc-two,index-0"
    for mine, expected in zip(read_metrics(together), read_metrics(alone), strict=True):
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith("perf/") and name != "time":
                assert mine[name] == pytest.approx(value, rel=0 if "loss" in name else 1e-4, abs=1e-5), name
    for name, tensor in weights(alone, 4).items():
        torch.testing.assert_close(weights(together, 4)[name], tensor, rtol=0, atol=1e-4)

    (tmp_path / "prompts.json").rename(tmp_path / "elsewhere.json")  # told before it is read
    with pytest.raises(UserError, match="--resume: 1 process now, 2 when the run began"):
        main(["--config", str(config), "--resume", str(together / "checkpoints" / "step-000002")])
    (tmp_path / "elsewhere.json").rename(tmp_path / "prompts.json")

    ended = weights(together, 4)
    argv = ["--config", str(config), "--resume", str(together / "checkpoints" / "step-000002")]
    codes, printed = as_launched(main, argv, tmp_path / "printed")
    assert codes == [0, 0], printed
    assert printed.count("PPO step 4/4") == 1 and printed.count("going on with") == 1
    for name, tensor in weights(together, 4).items():
        assert torch.equal(tensor, ended[name]), name


def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path, policy_dir: Path, reward_dir: Path) -> None:
    config = write_config(tmp_path, policy_dir, reward_dir, batch_size=64)
    result = torchrun("--config", str(config), "global_epochs=1")
    told = "7 prompts x global_epochs 1 make no batch of 128"
    assert result.returncode != 0 and result.stderr.count(told) == 1, result
    assert "exitcode  : 2" in result.stderr and not (tmp_path / "models").exists()


def test_what_all_find_in_a_step_is_told_once(tmp_path: Path, policy_dir: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOTrainer, "step", Mock(side_effect=NonFiniteError("PPO step 0: scores of rows 1, 5 are not finite")))
    config = write_config(tmp_path, policy_dir, reward_dir, batch_size=4)
    codes, printed = as_launched(main, ["--config", str(config)], tmp_path)
    assert codes == [2, 2] and printed.count("PPO step 0: scores of rows 1, 5 are not finite") == 1, printed


def test_fewer_processes_than_were_asked_for_are_refused(
    tmp_path: Path, policy_dir: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(tmp_path, policy_dir, reward_dir, batch_size=4))
    with pytest.raises(ValueError, match=r"launch\.num_training_workers: got 2, but 1 process trains"):
        main(["--config", config, "launch.num_training_workers=2"])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")  # so `accelerate launch --cpu --num_processes 2` starts its one process
    with pytest.raises(ValueError, match="accelerate launch was asked for several processes and started one"):
        main(["--config", config])


SCRIPT = """
import signal, sys

sys.path[0] = {root!r}
from pathlib import Path
from common.errors import run_main
from tests.rlhf.test_several_processes import main, send_in_the_fourth_step

send_in_the_fourth_step(signal.SIGSTOP, Path({folder!r}), setattr)
run_main(main)
"""


def send_in_the_fourth_step(number: signal.Signals, folder: Path, patch: Callable[[Any, str, Any], None]) -> None:
    """Let the second of two processes send itself a signal; each tells its id in `folder`."""
    original = PPOTrainer.step

    def step(trainer: PPOTrainer, *arguments: Any, **options: Any) -> Any:
        (folder / f"pid-{trainer.runtime.rank}").write_text(str(os.getpid()))
        if trainer.steps_done == 3 and trainer.runtime.rank == 1:
            os.kill(os.getpid(), number)
        return original(trainer, *arguments, **options)

    patch(PPOTrainer, "step", step)


def newest_save(folder: Path) -> str:
    [run] = (folder / "models").glob("desc-two,*")
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1]


def test_one_that_is_killed_ends_both(tmp_path: Path, policy_dir: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, policy_dir, reward_dir, batch_size=4, steps=6)
    send_in_the_fourth_step(signal.SIGKILL, tmp_path, monkeypatch.setattr)
    codes, printed = as_launched(main, ["--config", str(config)], tmp_path / "printed")
    assert codes == [2, -signal.SIGKILL], printed
    assert "a process of this training ended, or did not answer within 60 seconds" in printed
    assert newest_save(tmp_path) == "step-000002"


def test_one_that_is_asked_to_stop_stops_both(tmp_path: Path, policy_dir: Path, reward_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, policy_dir, reward_dir, batch_size=4, steps=6)
    send_in_the_fourth_step(signal.SIGTERM, tmp_path, monkeypatch.setattr)
    codes, printed = as_launched(main, ["--config", str(config)], tmp_path / "printed")
    assert codes == [143, 143] and printed.count("to go on: the same command with --resume") == 1, printed
    assert newest_save(tmp_path) == "step-000004"


@pytest.mark.slow
def test_one_that_stalls_ends_both(tmp_path: Path, policy_dir: Path, reward_dir: Path) -> None:
    """The other one gives up, and `torchrun` ends the one that stalls."""
    config = write_config(tmp_path, policy_dir, reward_dir, batch_size=4, steps=6, process_timeout_s=15)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path)))
    result = torchrun("--config", str(config), script=script)
    assert result.returncode != 0, result
    assert "a process of this training ended, or did not answer within 15 seconds" in result.stderr
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)
    assert newest_save(tmp_path) == "step-000002"
