"""Small trainings of every stage, each in a forked process of its own that may be killed, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import reward_model.classification.train_reward
import reward_model.regression.train_reward
import rlhf.train_ppo
import rlhf.training
import sft.train_sft
import sft.training
from common import fault_points
from common.checkpoint import verify_directory
from common.errors import run_main
from common.runs import checkpoints_in, step_of
from common.tracking import read_metrics
from reward_model.classification.module import PairModule
from reward_model.regression.module import ScoreModule
from rlhf.ppo.trainer import PPOTrainer
from sft.module import SFTModule
from tests import runs

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "sft": sft.train_sft.main,
    "classification": reward_model.classification.train_reward.main,
    "regression": reward_model.regression.train_reward.main,
    "ppo": rlhf.train_ppo.main,
}
POINTS = (
    "staging made",
    "weights written",
    "state written",
    "manifest written",
    "staging flushed",
    "renamed",
    "checkpoint complete",
    "links moved",
    "old checkpoint renamed",
)
INTERVAL = 2
"""Steps between two saves of these trainings."""
STEPS = 6

_NEO = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "window_size": 8, "max_position_embeddings": 64}
_QUESTIONS = [f"What is {a} and {b}?" for a in range(4) for b in range(4)]


@dataclass(frozen=True)
class Models:
    """What PPO starts from."""

    policy: Path
    reward: Path


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (minus the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nothing disturbs, and how long it takes."""

    left: dict[str, Any]
    seconds: float


def write_config(stage: str, folder: Path, models: Models, **changes: Any) -> Path:
    """A training of `STEPS` steps that saves every `INTERVAL`, in `folder`; `section__key=value` changes the config."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "sft": lambda row, question: {"Question": question, "Answer": f"It is {row}."},
        "classification": lambda row, question: {"Question": question, "Accepted_Answer": f"It is {row}.", "Answer": f"No {row}"},
        "regression": lambda row, question: {"Question": question, "Answer": f"It is {row}.", "Score": row % 3},
        "ppo": lambda row, question: {"prompt": question, "topic": row % 3},
    }
    rows = [kinds[stage](row, question) for row, question in enumerate(_QUESTIONS)]
    data = folder / "data.json"
    data.write_text(json.dumps({"train": rows[:12], "val": rows[12:], "test": []}))
    config: dict[str, Any] = {
        "data": {"data_dir": str(data), "batch_size": 4, "max_length": 48},
        "model_init": {"model_type": "gpt_neo", "vocab_size": 270, "config": _NEO},
        "model_params": {"learning_rate": 1e-2, "dropout": 0.1},
        "trainer": {
            "checkpoint": {"dirpath": str(folder / "models"), "every_n_train_steps": INTERVAL},
            "params": {
                "accelerator": "cpu",
                "max_epochs": STEPS // 3,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
            },
        },
        "wandb": {"mode": "disabled"},
    }
    if stage == "ppo":
        config = {
            "data_config": {"data_file_path": str(data), "max_prompt_length": 40},
            "generation_config": {"max_new_tokens": 4},
            "global_epochs": 9,
            "ppo_config": {
                "model_name": str(models.policy),
                "batch_size": 4,
                "ppo_epochs": 1,
                "learning_rate": 1e-3,
                "steps": STEPS,
                "use_score_scaling": True,
            },
            "reward_config": {"reward_model_name": str(models.reward)},
            "evaluation": {"num_prompts": 2, "every_n_steps": 3, "num_samples_logged": 1},
            "save_config": {"checkpoint_dir": str(folder / "models"), "save_interval": INTERVAL},
        }
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(stage: str, config: Path, *arguments: str, prepare: Callable[[], object] | None = None) -> int:
    """Fork a process that runs the stage's script; returns its id. `prepare()` is called in it first."""
    # Before the fork: a process that is killed at once has them, too.
    outputs = [os.open(config.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("out", "err")]
    pid = os.fork()
    if pid:
        for output in outputs:
            os.close(output)
        return pid
    code = 1
    try:
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["script", "--config", str(config), *arguments]
        if prepare is not None:
            prepare()
        run_main(MAINS[stage])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, config: Path, timeout: float = 120) -> Outcome:
    """Wait for a process of `start`."""
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"the run hangs; it said {(config.parent / 'err').read_text()}")
        time.sleep(0.005)
    return Outcome(os.waitstatus_to_exitcode(status), (config.parent / "out").read_text(), (config.parent / "err").read_text())


def run(stage: str, config: Path, *arguments: str, prepare: Callable[[], object] | None = None) -> Outcome:
    """Run a stage's script in a process of its own."""
    return ended(start(stage, config, *arguments, prepare=prepare), config)


def at_point(point: str, count: int, act: Callable[[], object]) -> Callable[[], None]:
    """A `prepare` that lets `act` happen when a save reaches this point for the `count`-th time."""

    def prepare() -> None:
        seen = 0

        def reached(name: str) -> None:
            nonlocal seen
            if name == point:
                seen += 1
                if seen == count:
                    act()

        fault_points.on_point = reached

    return prepare


_IN_STEP: dict[str, tuple[type, str, Callable[[Any], int]]] = {
    "sft": (SFTModule, "training_step", lambda module: int(module.trainer.global_step)),
    "classification": (PairModule, "training_step", lambda module: int(module.trainer.global_step)),
    "regression": (ScoreModule, "training_step", lambda module: int(module.trainer.global_step)),
    "ppo": (PPOTrainer, "step", lambda trainer: trainer.steps_done),
}


def in_step(stage: str, step: int, act: Callable[[], object]) -> Callable[[], None]:
    """A `prepare` that lets `act` happen in the training step after `step` of them."""

    def prepare() -> None:
        owner, name, done = _IN_STEP[stage]
        original = getattr(owner, name)

        def acting(subject: Any, *arguments: Any, **options: Any) -> Any:
            if done(subject) == step:
                act()
            return original(subject, *arguments, **options)

        setattr(owner, name, acting)

    return prepare


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_dir(config: Path) -> Path:
    return config.parent / "models" / "desc-run,index-0"


def left_by(config: Path) -> dict[str, Any]:
    """What a finished run leaves, without times and paths."""
    return runs.left_by(run_dir(config))


def steps_there(config: Path) -> list[int]:
    """Steps whose checkpoints can be seen."""
    return [step_of(path) for path in checkpoints_in(run_dir(config) / "checkpoints")]


def check_what_is_visible(config: Path) -> None:
    """Every checkpoint that can be seen is whole, and so is what the links name; no step further back than an interval is lost."""
    folder = run_dir(config)
    there = checkpoints_in(folder / "checkpoints")
    assert [problem for checkpoint in there for problem in verify_directory(checkpoint)] == []
    for name in ("best", "last"):
        if (folder / name).is_symlink():
            assert verify_directory(folder / name) == [], name
    made = max((line["step"] for line in read_metrics(folder)), default=0)
    newest = step_of(there[-1]) if there else 0
    assert made - newest <= INTERVAL


def goes_on(stage: str, config: Path, whole: dict[str, Any]) -> None:
    """What was killed is whole, and with `--resume` ends with the bits of `whole`; where nothing was saved yet, that is said."""
    check_what_is_visible(config)
    if not checkpoints_in(run_dir(config) / "checkpoints"):
        outcome = run(stage, config, "--resume")
        assert outcome.code == 2 and "to go on" in outcome.err, outcome
        return
    outcome = run(stage, config, "--resume")
    assert outcome.code == 0, outcome
    assert left_by(config) == whole
    check_what_is_visible(config)
    assert not list((run_dir(config) / "checkpoints").glob(".*"))
