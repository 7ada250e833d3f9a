"""Two real runs, SFT and PPO, with wandb (offline) and TensorBoard, watched from outside: keys stay where they are, nothing listens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import torch
import yaml

from common.config import resolved_dict
from common.errors import UserError
from common.launch.lightning import build_trainer, fit
from common.launch.loopback import meeting_on_loopback
from common.schema import TrainerSettings
from common.tracking import Tracker
from rlhf.config import PPORunConfig
from rlhf.train_ppo import main as train_ppo
from sft.config import SFTConfig
from sft.train_sft import main as train_sft
from tests.security.conftest import Problem
from tests.security.watch import Watched, watch

IN_THE_CONFIG = "canary0config00000000000000000000000000a1"
IN_THE_ENVIRONMENT = "canary0environment000000000000000000000b2"
HUB_TOKEN = "hf_canary0hub0000000000000000000000000c3"
KEYS = (IN_THE_CONFIG, IN_THE_ENVIRONMENT, HUB_TOKEN)
ROWS = [{"Question": f"What is {number}?", "Answer": f"It is {number}."} for number in range(12)]


@dataclass
class Runs:
    """What the two runs were seen doing, by script, and where they wrote."""

    root: Path
    seen: dict[str, Watched]

    def files(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if path.is_file() and path.parent.name != "configs"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, generator_dir: Path, reward_dir: Path, root: Path) -> Runs:
    """SFT with a key in `wandb.api`, PPO with one in `tracker_kwargs` and one in WANDB_API_KEY; both with a hub token."""
    folder = tmp_path_factory.mktemp("runs")
    configs = folder / "configs"
    configs.mkdir()
    (configs / "data.json").write_text(json.dumps({"train": ROWS[:8], "val": ROWS[8:10], "test": ROWS[10:]}))
    wandb = {"mode": "offline", "log_model": True}
    sft = {
        "model_name": str(generator_dir),
        "data": {"data_dir": str(configs / "data.json"), "batch_size": 4, "max_length": 32},
        "model_params": {"do_compute_metrics": True},
        "evaluation": {"num_generated": 1, "generate_params": {"max_new_tokens": 4}},
        "trainer": {"checkpoint": {"dirpath": str(folder / "sft")}, "params": {"max_steps": 1, "accelerator": "cpu"}},
        "wandb": {**wandb, "api": IN_THE_CONFIG},
        "tensorboard": True,
    }
    ppo = {
        "data_config": {"data_file_path": str(configs / "data.json"), "max_prompt_length": 24},
        "generation_config": {"max_new_tokens": 4},
        "ppo_config": {
            "model_name": str(generator_dir),
            "batch_size": 4,
            "steps": 1,
            "log_with": "wandb",
            "tracker_kwargs": {"wandb": {"api_key": IN_THE_CONFIG}},
        },
        "reward_config": {"reward_model_name": str(reward_dir)},
        "evaluation": {"num_prompts": 2},
        "save_config": {"checkpoint_dir": str(folder / "rlhf")},
        "wandb": wandb,
        "tensorboard": True,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HF_TOKEN": HUB_TOKEN, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder / "home")}
    seen: dict[str, Watched] = {}

    def run(script: str, config: dict[str, Any], more: dict[str, str]) -> None:
        path = configs / f"{Path(script).stem}.yaml"
        path.write_text(yaml.safe_dump(config))
        seen[script] = watch([sys.executable, script, "--config", str(path)], cwd=root, env=environment | more)

    both = [
        threading.Thread(target=run, args=("sft/train_sft.py", sft, {})),
        threading.Thread(target=run, args=("rlhf/train_ppo.py", ppo, {"WANDB_API_KEY": IN_THE_ENVIRONMENT})),
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for script, watched in seen.items():
        assert watched.code == 0, f"{script}\n{watched.output}"
    return Runs(folder, seen)


def test_the_runs_did_what_is_watched(runs: Runs) -> None:
    """Checkpoints, model cards, tables, wandb's own files and TensorBoard's are there to be searched."""
    names = {path.name for path in runs.files()}
    assert {"config.yaml", "manifest.json", "README.md", "log.txt", "metrics.jsonl", "metrics.csv", "summary.json"} <= names
    for stage in ("sft", "rlhf"):
        run = runs.root / stage / "desc-run,index-0"
        assert list(run.glob("wandb/offline-run-*/run-*.wandb")) and list(run.glob("tensorboard/*"))
        assert any("wandb" in argument for argument in runs.seen[f"{stage}/train_{'ppo' if stage == 'rlhf' else 'sft'}.py"].arguments)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_in_no_file_no_line_and_no_argument(key: str, runs: Runs) -> None:
    holding = [path for path in runs.files() if key.encode() in path.read_bytes()]
    assert not holding
    for watched in runs.seen.values():
        assert key not in watched.output
        assert not any(key in argument for argument in watched.arguments)


def test_nothing_listens(runs: Runs) -> None:
    assert {script: watched.listening for script, watched in runs.seen.items()} == {script: set() for script in runs.seen}


def test_the_watcher_sees_what_listens_and_what_is_written_on_a_command_line(tmp_path: Path) -> None:
    """The tests above can fail: a child process that does both is seen."""
    child = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); time.sleep(0.6)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, '{KEYS[0]}'])"
    seen = watch([sys.executable, "-c", code], cwd=tmp_path, env=os.environ)
    assert seen.listening == {"127.0.0.1"} and KEYS[0] in seen.arguments


@pytest.mark.parametrize(
    "override",
    [
        "wandb.api={}",
        "wandb={{api: {}}}",
        "wandb={{api: '{}'}}",
        "wandb={{args: {{api_key: {}}}}}",
        "WANDB_API_KEY={}",
        "hf_token={}",
        "wandb.args.api_key={}",
    ],
)
def test_a_key_on_the_command_line_is_refused(override: str, tmp_path: Path, problem: Problem) -> None:
    """Other users of the machine could read it, and every process started with the same arguments would repeat it."""
    (tmp_path / "c.yaml").write_text("data: {data_dir: d.json}\nmodel_name: m\n")
    line = problem(lambda: train_sft(["--config", str(tmp_path / "c.yaml"), override.format(KEYS[0])]))
    assert "a key on the command line can be read by others" in line and KEYS[0] not in line


@pytest.mark.parametrize("override", ["{}.api_key={}", "{}={{api_key: {}}}", "{}.wandb={{api_key: {}}}", "{}={{wandb: {{key: {}}}}}"])
def test_a_key_among_arguments_of_the_tracker_is_refused_on_the_command_line(override: str, tmp_path: Path, problem: Problem) -> None:
    (tmp_path / "c.yaml").write_text(
        "data_config: {data_file_path: d.json}\nppo_config: {model_name: m}\nreward_config: {reward_model_name: m}\n"
    )
    text = override.format("ppo_config.tracker_kwargs", KEYS[0])
    line = problem(lambda: train_ppo(["--config", str(tmp_path / "c.yaml"), text]))
    assert "a key on the command line can be read by others" in line and KEYS[0] not in line


def test_placeholders_of_old_configs_are_no_keys(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {data_dir: d.json}\nmodel_name: m\n")
    for text in ("wandb.api=null", "wandb={api: YOUR_API_KEY}", "wandb.api=text", "wandb={api: null}"):
        with pytest.raises(UserError) as caught:
            train_sft(["--config", str(tmp_path / "c.yaml"), text])
        assert "a key on the command line" not in str(caught.value)


# --- several processes ----------------------------------------------------------------------------------------------------------------


def listening() -> set[str]:
    """Internet addresses that this process waits at."""
    return {place.laddr.ip for place in psutil.Process().net_connections("inet") if place.status == psutil.CONN_LISTEN}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method="env://", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_processes_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    with meeting_on_loopback(), process_group():
        assert listening() == {"127.0.0.1"}
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert os.environ == before
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with meeting_on_loopback():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"  # asked for
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_training_in_several_processes_meets_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    settings = TrainerSettings(params={"devices": 2, "accelerator": "cpu", "max_steps": 1})
    with Tracker(tmp_path) as tracker:
        trainer = build_trainer(
            settings, run_dir=tmp_path, tracker=tracker, seed=0, save=lambda *_: None, choices=["val/loss"], total_steps=1
        )
        monkeypatch.setattr(trainer, "fit", lambda *_: met.append((os.environ.get("MASTER_ADDR"), listening())))
        with pytest.raises(UserError, match="ended before its first step"):
            fit(trainer, pl.LightningModule(), [])  # type: ignore[arg-type]
    assert met == [("127.0.0.1", {"127.0.0.1"})]


def test_what_is_recorded_of_a_config_holds_no_key() -> None:
    sft = SFTConfig.model_validate({"data": {"data_dir": "d"}, "model_name": "m", "wandb": {"api": IN_THE_CONFIG}})
    ppo = PPORunConfig.model_validate(
        {
            "data_config": {"data_file_path": "d"},
            "ppo_config": {"model_name": "m", "tracker_kwargs": {"wandb": {"api_key": IN_THE_CONFIG}}},
            "reward_config": {"reward_model_name": "r"},
        }
    )
    for config in (sft, ppo):
        assert IN_THE_CONFIG not in repr(resolved_dict(config))
