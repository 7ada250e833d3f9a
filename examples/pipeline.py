"""The README's commands, run as a user runs them: as processes, from their stage folders, output streamed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """One command of the README: `cd FOLDER && COMMAND`."""

    name: str
    folder: str
    line: str
    trains: bool = True

    def argv(self, overrides: Sequence[str] = ()) -> list[str]:
        """`python` becomes the interpreter that runs this; overrides (`seed=1`) go to training commands only."""
        words = shlex.split(self.line)
        return [sys.executable if words[0] == "python" else words[0], *words[1:], *(overrides if self.trains else ())]


SFT = Command("sft", "sft", "python train_sft.py --config_file configs/trainer_config.yaml")
CLASSIFICATION = Command(
    "classification", "reward_model/classification", "python train_reward.py --config_file configs/trainer_config.yaml"
)
REGRESSION = Command("regression", "reward_model/regression", "python train_reward.py --config_file configs/trainer_config.yaml")
PPO = Command("ppo", "rlhf", "python train_ppo.py --config configs/trainer_config.yaml")
TEST_SFT = Command("test sft", "sft", "python test_sft.py --config_file configs/test_config.yaml", trains=False)
TEST_CLASSIFICATION = Command(
    "test classification", "reward_model/classification", "python test_reward.py --config_file configs/test_config.yaml", trains=False
)
TEST_REGRESSION = Command(
    "test regression", "reward_model/regression", "python test_reward.py --config_file configs/test_config.yaml", trains=False
)
TEST_PPO = Command("test ppo", "rlhf", "python test_ppo.py --config configs/test_config.yaml", trains=False)

# Steps follow one another; the lanes of a step run at the same time, the commands of a lane in order.
Lane = tuple[Command, ...]
PLAN: tuple[tuple[Lane, ...], ...] = (
    ((SFT,),),
    ((CLASSIFICATION,), (TEST_SFT,)),
    ((PPO,), (REGRESSION, TEST_CLASSIFICATION, TEST_REGRESSION)),
    ((TEST_PPO,),),
)


class CommandFailed(Exception):
    """A command ended with an exit code other than 0."""

    def __init__(self, command: Command, code: int) -> None:
        super().__init__(f"{command.name} failed with exit code {code}: cd {command.folder} && {command.line}")
        self.code = code


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a process unless the user says otherwise: these models are too small for more, and two commands may run at once."""
    return {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", **(os.environ if base is None else base)}


def run_plan(plan: Sequence[Sequence[Lane]] = PLAN, overrides: Sequence[str] = (), root: Path = ROOT) -> None:
    """Run every step. Raises CommandFailed for the first command that fails, after stopping those beside it."""
    for lanes in plan:
        step = _Step(overrides, root)
        threads = [threading.Thread(target=step.run_lane, args=(lane,), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            step.stop()
            raise
        if step.failure:
            raise step.failure


class _Step:
    """Commands that run at the same time; the first failure stops the others."""

    def __init__(self, overrides: Sequence[str], root: Path) -> None:
        self.overrides, self.root = overrides, root
        self.failure: CommandFailed | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    def run_lane(self, lane: Lane) -> None:
        for command in lane:
            code = self._run(command)
            with self._lock:
                if code and self.failure is None:
                    self.failure = CommandFailed(command, code)
            if self.failure:
                self.stop()
                return

    def stop(self) -> None:
        with self._lock:
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()

    def _run(self, command: Command) -> int:
        with self._lock:
            if self.failure:
                return 0
            print(f"\n=== cd {command.folder} && {' '.join(['python', *command.argv(self.overrides)[1:]])}", flush=True)
            process = subprocess.Popen(
                command.argv(self.overrides),
                cwd=self.root / command.folder,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                print(f"[{command.name}] {line.rstrip()}", flush=True)
        return process.wait()
