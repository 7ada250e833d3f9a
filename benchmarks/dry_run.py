"""How far the forecasts of `--dry_run` are off: of a small SFT, reward and PPO run each, one after another on the sample world.

    OMP_WAIT_POLICY=passive python benchmarks/dry_run.py [--only sft reward ppo] [--set KEY=VALUE ...]

Each line is what a process with `--dry_run` said and what one without it then took: seconds of the training (with validations, without
loading and closing, as in its summary.json), peak memory of the process, size of a checkpoint. Reward model and PPO start from what the
stages before made, so those always run. Exit code 1 where anything is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.processes import THREADS, ContenderFailed
from common.tracking import markdown_table

TOLERANCE = 0.25
MODEL = "model_init.config={hidden_size: 256, num_layers: 4, num_heads: 8, intermediate_size: 1024, max_position_embeddings: 128}"
STEPS = ["trainer.params.max_steps=120", "trainer.params.val_check_interval=60", "trainer.params.check_val_every_n_epoch=1"]
PPO_STEPS = [
    "ppo_config.steps=12",
    "ppo_config.batch_size=64",
    "ppo_config.mini_batch_size=32",
    "evaluation.num_prompts=64",
    "evaluation.every_n_steps=6",
    "save_config.save_interval=6",
]
SECONDS = {"h": 3600, "min": 60, "s": 1}
BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Taken:
    """Seconds of a training, the most memory (GiB) of its process, bytes of a checkpoint."""

    seconds: float
    memory_gib: float
    checkpoint: float


def commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Stage -> script, and its config and overrides; runs lie in `folder/STAGE`."""
    sft, reward = folder / "sft" / "latest", folder / "reward" / "latest"
    pairs, ppo = "reward_model/classification", f"save_config.checkpoint_dir={folder / 'ppo'}"
    judged = [f"ppo_config.model_name={sft}", f"reward_config.reward_model_name={reward}", ppo]
    dirpath = "trainer.checkpoint.dirpath"
    return {
        "sft": ("sft/train_sft.py", ["--config", "sft/configs/trainer_config.yaml", MODEL, *STEPS, f"{dirpath}={folder / 'sft'}"]),
        "reward": (
            f"{pairs}/train_reward.py",
            ["--config", f"{pairs}/configs/trainer_config.yaml", f"model_name={sft}", *STEPS, f"{dirpath}={folder / 'reward'}"],
        ),
        "ppo": ("rlhf/train_ppo.py", ["--config", "rlhf/configs/trainer_config.yaml", *judged, *PPO_STEPS]),
    }


def run(command: Sequence[str]) -> tuple[str, float]:
    """What a command printed, and the most memory (GiB) of its process. Raises ContenderFailed where it failed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **THREADS}, stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise ContenderFailed(f"{' '.join(command)} failed:\n{errors.read()[-1500:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return out.read(), used.ru_maxrss * unit / 2**30


def forecast_in(printed: str) -> Taken:
    """What a dry run said."""
    [words] = re.findall(r"^time: about (.+?), steps", printed, flags=re.MULTILINE)
    seconds = sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+) (h|min|s)", words))
    [memory] = re.findall(r"^memory: ([\d.]+) GiB", printed, flags=re.MULTILINE)
    [(size, unit)] = re.findall(r"^disk: ([\d.]+) (\w+) a checkpoint", printed, flags=re.MULTILINE)
    return Taken(seconds, float(memory), float(size) * BYTES[unit])


def taken_by(run_dir: Path, memory_gib: float) -> Taken:
    """What a run took."""
    summary = json.loads((run_dir / "summary.json").read_text())
    files = (path for path in (run_dir / "last").resolve().rglob("*") if path.is_file())
    return Taken(summary["seconds"], memory_gib, sum(path.stat().st_size for path in files))


def measure(stage: str, folder: Path, settings: Sequence[str]) -> tuple[Taken, Taken]:
    """Forecast and truth."""
    script, arguments = commands(folder)[stage]
    command = [sys.executable, script, *arguments, *settings]
    forecast = forecast_in(run([*command, "--dry_run"])[0])
    _, memory = run(command)
    return forecast, taken_by(folder / stage / "desc-default,index-0", memory)


QUANTITIES: dict[str, Callable[[Taken], float]] = {
    "seconds": lambda taken: taken.seconds,
    "peak memory, MiB": lambda taken: taken.memory_gib * 1024,
    "a checkpoint, MiB": lambda taken: taken.checkpoint / 2**20,
}


def rows(stage: str, forecast: Taken, truth: Taken) -> list[list[str]]:
    """Lines of the table."""
    found = [(name, quantity(forecast), quantity(truth)) for name, quantity in QUANTITIES.items()]
    return [[stage, name, f"{said:.1f}", f"{took:.1f}", f"{off(said, took):+.0%}"] for name, said, took in found]


def off(said: float, took: float) -> float:
    """By what share of the truth a forecast is too high."""
    return said / took - 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["sft", "reward", "ppo"], choices=("sft", "reward", "ppo"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings, of all stages named")
    options = parser.parse_args(argv)
    lines: list[list[str]] = []
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        for stage in ("sft", "reward", "ppo"):
            settings = options.set if stage in options.only else []
            forecast, truth = measure(stage, Path(name), settings)
            if stage in options.only:
                lines += rows(stage, forecast, truth)
                worst = max(worst, *(abs(off(quantity(forecast), quantity(truth))) for quantity in QUANTITIES.values()))
                print(f"{stage}: {lines[-3:]}", file=sys.stderr, flush=True)
    print(markdown_table(("stage", "what", "forecast", "run", "off by"), lines))
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
