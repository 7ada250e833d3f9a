"""One process against two: tokens per second of each stage's own script, start-up of each launcher, memory of each process.

    python benchmarks/scaling.py [--stages sft pairs ppo] [--launchers plain apart ddp torchrun accelerate fsdp ray]

Every line is a run of a stage's script on the same seeded random GPT-Neo, data and global batches; runs follow each other in turn, round
after round. `1 x 2` is one process with two threads, `2 x 1` two processes with a thread each and half of each batch, `1 x 1` one process
with one thread, `apart` two of those at once that know nothing of each other: what the machine has for two processes. Seconds are those
that the runs log for their steps, without the first; tokens are those of the same steps in one process.

    to 1 x 2     speed of two processes to that of one process on the same two cores
    efficiency   speed to the speed of `1 x 1` times the number of threads
    start        seconds from the command to the beginning of the first step; `over plain`: more than one process started plainly
    end          seconds from the last step's line to the end of the command: validation, saving, stopping what was started
    fsdp         PPO by `accelerate launch` with weights spread over the processes; `accelerate`: with everything in each
    empty        seconds from the command to the last process's beginning of an empty script, the quickest of some: the launcher alone
    MiB          peak of each process that trains; `others`: of all that a launcher runs beside them, together

A thread of `1 x 2` is bound to its core (OMP_PROC_BIND). Two processes are not: each would bind its thread to the same first core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.training import text, write_run
from common.tracking import markdown_table

PLAIN, APART = "plain", "apart"


@dataclass(frozen=True)
class Stage:
    """A script and how its run is made.

    write     (folder, size) -> the config to run with
    halved    settings of rows per step, which every process has its share of, and their values in one process
    seconds   what the seconds of a step are called in metrics.jsonl
    several   the launcher of the comparison of speeds
    """

    script: str
    write: Callable[[Path, str], Path]
    halved: Mapping[str, int]
    seconds: tuple[str, ...]
    several: str


@dataclass(frozen=True)
class Launcher:
    """What stands before a script and after its config, to run it in so many processes; `runs` of them at once."""

    processes: int
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    runs: int = 1


@dataclass(frozen=True)
class Found:
    """What one run showed. steps: seconds of each; tokens: of each, by the leading process; mib: peaks of all processes, largest first."""

    start: float
    end: float
    steps: list[float]
    tokens: list[float]
    mib: list[float]


# --- stages --------------------------------------------------------------------------------------------------------------------------


def write_sft(folder: Path, size: str) -> Path:
    from benchmarks.sft import build_rows, records
    from benchmarks.synthetic import build_policy

    rows = build_rows(48)
    return write_run(folder, build_policy(size), {"train": records(rows), "val": records(rows[:2])}, batch=8, log_every=1)


def write_pairs(folder: Path, size: str) -> Path:
    from benchmarks.reward import build_rows, pair_records
    from benchmarks.synthetic import build_judge

    rows = build_rows(40)
    return write_run(folder, build_judge(size), {"train": pair_records(rows), "val": pair_records(rows[:2])}, batch=8, log_every=1)


def write_ppo(folder: Path, size: str) -> Path:
    import yaml

    from benchmarks.synthetic import build_judge, build_policy, build_prompts, build_tokenizer

    for name, model in (("policy", build_policy(size)), ("judge", build_judge(size))):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    prompts = [{"prompt": text(ids)} for ids in build_prompts(32 * PPO_STEPS + 2)]
    (folder / "prompts.json").write_text(json.dumps({"train": prompts[2:], "val": prompts[:2]}))
    config = {
        "data_config": {"data_file_path": str(folder / "prompts.json"), "max_prompt_length": 96},
        "generation_config": {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "ppo_config": {"model_name": str(folder / "policy"), "steps": PPO_STEPS, "ppo_epochs": 1, "learning_rate": 1e-6},
        "reward_config": {"reward_model_name": str(folder / "judge")},
        "evaluation": {"num_prompts": 2, "every_n_steps": PPO_STEPS},
        "save_config": {"checkpoint_dir": str(folder / "runs")},
        "wandb": {"mode": "disabled"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


PPO_STEPS = 3
STAGES: dict[str, Stage] = {
    "sft": Stage("sft/train_sft.py", write_sft, {"data.batch_size": 8}, ("perf/step_seconds",), "ddp"),
    "pairs": Stage("reward_model/classification/train_reward.py", write_pairs, {"data.batch_size": 8}, ("perf/step_seconds",), "ddp"),
    "ppo": Stage(
        "rlhf/train_ppo.py",
        write_ppo,
        {"ppo_config.batch_size": 32, "ppo_config.mini_batch_size": 16},
        ("perf/rollout_seconds", "perf/reward_seconds", "perf/update_seconds"),
        "torchrun",
    ),
}


def accelerate(config: str) -> Launcher:
    """One of the shipped configs, which are for two processes."""
    return Launcher(2, ("-m", "accelerate.commands.launch", "--config_file", f"rlhf/configs/accelerate/{config}.yaml"))


LAUNCHERS: dict[str, Launcher] = {
    PLAIN: Launcher(1),
    APART: Launcher(1, runs=2),
    "ddp": Launcher(2, after=("trainer.params.devices=2",)),
    "torchrun": Launcher(2, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    "accelerate": accelerate("ddp"),
    "fsdp": accelerate("fsdp"),
    "ray": Launcher(2, after=("launch.engine=ray", "launch.num_training_workers=2", "launch.resources_per_worker={CPU: 1}")),
}
STARTS = {"sft": (PLAIN, "ddp", "torchrun", "ray"), "pairs": (PLAIN, "ddp"), "ppo": (PLAIN, "torchrun", "accelerate", "fsdp", "ray")}
"""Stage -> the launchers whose start is measured."""


# --- a run ---------------------------------------------------------------------------------------------------------------------------


class RunFailed(Exception):
    """A command that ended with an error; the end of what it said is the message."""


NEGLIGIBLE_MIB = 20
"""Such processes are commands that scripts ask something (git)."""


class Memory:
    """Peak memory of processes and all that they started, by process number, read while they run (Linux)."""

    def __init__(self, *pids: int) -> None:
        self.peaks: dict[int, float] = {}
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for pid in chain.from_iterable(map(family, self._pids)):
                peak = peak_mib(pid)
                if peak is not None and peak > NEGLIGIBLE_MIB:
                    self.peaks[pid] = peak


def family(pid: int) -> list[int]:
    """The numbers of a process and of all that it started, and they."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for children in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                waiting += map(int, children.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def peak_mib(pid: int) -> float | None:
    """The most memory that a process had resident; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def run(stage: Stage, launcher: Launcher, threads: int, config: Path, runs: Path) -> Found:
    """Run a stage's script and read what it logged. Raises RunFailed."""
    shares = [f"{key}={value // launcher.processes}" for key, value in stage.halved.items()]
    command = [sys.executable, *launcher.before, stage.script, "--config", str(config), *shares, *launcher.after]
    begun = time.time()
    with tempfile.TemporaryFile("w+") as said:
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment(launcher, threads), stdout=said, stderr=subprocess.STDOUT)
            for _ in range(launcher.runs)
        ]
        with Memory(*(process.pid for process in processes)) as memory:
            try:
                failed = [process.wait() for process in processes]
            except KeyboardInterrupt:
                for process in processes:
                    process.terminate()
                    process.wait()
                raise
        ended = time.time()
        said.seek(0)
        if any(failed):
            raise RunFailed(f"{' '.join(command)}\n{said.read()[-1500:]}")
    newest = max(runs.glob("desc-*"), key=lambda folder: folder.stat().st_mtime)
    lines = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    return read(lines, stage, begun, ended, sorted(memory.peaks.values(), reverse=True))


def environment(launcher: Launcher, threads: int) -> dict[str, str]:
    bound = "true" if launcher.processes * launcher.runs == 1 else "false"
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "OMP_PROC_BIND": bound}


def read(lines: Sequence[Mapping[str, Any]], stage: Stage, begun: float, ended: float, mib: list[float]) -> Found:
    """What the lines of metrics.jsonl say of the steps of a run between two moments."""
    steps = [line for line in lines if all(name in line for name in stage.seconds)]
    seconds = [sum(line[name] for name in stage.seconds) for line in steps]
    tokens = [line["perf/tokens_per_second"] * took for line, took in zip(steps, seconds, strict=True)]
    return Found(steps[0]["time"] - seconds[0] - begun, ended - steps[-1]["time"], seconds, tokens, mib)


# --- all of them ---------------------------------------------------------------------------------------------------------------------

Case = tuple[str, str, int]
"""Stage, launcher, threads of each process."""


def cases(stages: Sequence[str], launchers: Sequence[str]) -> tuple[list[Case], list[Case]]:
    """Those of the table of speeds, run in every round, and those that are started once besides."""
    speeds: list[Case] = []
    for stage in stages:
        several = [(stage, STAGES[stage].several, 1)] if STAGES[stage].several in launchers else []
        apart = [(stage, APART, 1)] if APART in launchers else []
        speeds += [(stage, PLAIN, 1), (stage, PLAIN, 2), *apart, *several]
    covered = {(stage, launcher) for stage, launcher, _ in speeds}
    once = [(stage, launcher, 1) for stage in stages for launcher in STARTS[stage] if launcher in launchers]
    return speeds, [case for case in once if case[:2] not in covered]


def measure(speeds: Sequence[Case], once: Sequence[Case], rounds: int, size: str) -> tuple[dict[Case, list[Found]], bool]:
    """All runs by case, and whether each of them ran. Ctrl-C ends it."""
    found: dict[Case, list[Found]] = {}
    whole = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs: dict[str, Path] = {}
        steps: dict[str, int] = {}
        for stage in dict.fromkeys(case[0] for case in (*speeds, *once)):
            (folder / stage).mkdir()
            configs[stage] = STAGES[stage].write(folder / stage, size)
        for case in [*(case for _ in range(rounds) for case in speeds), *once]:
            stage, launcher, threads = case
            try:
                result = run(STAGES[stage], LAUNCHERS[launcher], threads, configs[stage], folder / stage / "runs")
                expected = steps.setdefault(stage, len(result.steps))
                if len(result.steps) != expected:
                    raise RunFailed(f"made {len(result.steps)} steps instead of {expected}: its processes did not share the batches")
            except RunFailed as failure:
                print(f"left out: {stage}, {launcher}: {failure}", file=sys.stderr)
                whole = False
                continue
            except KeyboardInterrupt:
                print("interrupted; what was measured until now:", file=sys.stderr)
                return found, False
            found.setdefault(case, []).append(result)
            print(f"{stage} {launcher} x {threads}: {sum(result.steps[1:]):.2f} s, start {result.start:.1f} s", file=sys.stderr, flush=True)
    return found, whole


def empty_start(launcher: Launcher) -> float:
    """Seconds until all processes of a launcher have begun an empty script."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "empty.py"
        script.write_text("import os, time\nos.write(1, f'BEGUN {time.time()}\\n'.encode())\n")  # in one piece
        begun = time.time()
        command = [sys.executable, *launcher.before, str(script)]
        done = subprocess.run(command, cwd=ROOT, env=environment(launcher, 1), capture_output=True, text=True, check=True)
    moments = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("BEGUN")]
    assert len(moments) == launcher.processes, done.stdout
    return max(moments) - begun


def empty_rows(launchers: Sequence[str], tries: int) -> list[list[str]]:
    """Lines of the table of empty scripts, of the launchers that are commands of their own."""
    names = [name for name in launchers if name == PLAIN or LAUNCHERS[name].before]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(tries):
        for name in names:
            found[name].append(empty_start(LAUNCHERS[name]))
    return [[name, str(LAUNCHERS[name].processes), f"{min(seconds):.2f}"] for name, seconds in found.items()]


SPEED_HEAD = ("stage", "processes x threads", "launcher", "tokens/s", "to 1 x 2", "efficiency", "MiB of each", "seconds of the rounds")
START_HEAD = ("stage", "launcher", "processes", "start s", "over plain", "steps s", "end s", "MiB of each", "others, MiB")


def step_seconds(runs: Sequence[Found]) -> float:
    """Seconds of all steps but the first, the median over runs."""
    return statistics.median(sum(found.steps[1:]) for found in runs)


def speed_rows(found: Mapping[Case, Sequence[Found]]) -> list[list[str]]:
    rows = []
    for (stage, launcher, threads), runs in found.items():
        one, two = found.get((stage, PLAIN, 1)), found.get((stage, PLAIN, 2))
        if (threads, launcher) not in {(1, PLAIN), (2, PLAIN), (1, APART), (1, STAGES[stage].several)} or not one or not two:
            continue
        at_once = LAUNCHERS[launcher].runs
        processes = LAUNCHERS[launcher].processes * at_once
        seconds, cores = step_seconds(runs) / at_once, processes * threads
        speed = sum(two[0].tokens[1:]) / seconds
        relative = step_seconds(two) / seconds
        efficiency = step_seconds(one) / seconds / cores
        trainers = " ".join(f"{peak:.0f}" for peak in runs[-1].mib[:processes])
        cells = [f"{speed:.0f}", f"{relative:.2f}", f"{efficiency:.2f}", trainers, " ".join(f"{sum(run.steps[1:]):.2f}" for run in runs)]
        rows.append([stage, f"{processes} x {threads}", launcher, *cells])
    return rows


def start_rows(found: Mapping[Case, Sequence[Found]]) -> list[list[str]]:
    rows = []
    for (stage, launcher, threads), runs in found.items():
        if threads != 1 or launcher == APART:
            continue
        start, end = (statistics.median(values) for values in zip(*((run.start, run.end) for run in runs), strict=True))
        plain = found.get((stage, PLAIN, 1))
        over = f"{start - statistics.median(run.start for run in plain):+.1f}" if plain else ""
        processes = LAUNCHERS[launcher].processes
        others = runs[-1].mib[processes:]
        trainers = " ".join(f"{peak:.0f}" for peak in runs[-1].mib[:processes])
        cells = [f"{start:.1f}", over, f"{step_seconds(runs):.2f}", f"{end:.1f}", trainers, f"{sum(others):.0f} ({len(others)})"]
        rows.append([stage, launcher, str(processes), *cells])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each line of the table of speeds")
    parser.add_argument("--size", default="s", choices=("xs", "s", "m"))
    parser.add_argument("--empty", type=int, default=5, help="starts of an empty script by each launcher; 0: none")
    options = parser.parse_args(argv)
    speeds, once = cases(options.stages, options.launchers)
    found, whole = measure(speeds, once, options.rounds, options.size)
    print(markdown_table(SPEED_HEAD, speed_rows(found)))
    print()
    print(markdown_table(START_HEAD, start_rows(found)))
    if options.empty:
        print("\n" + markdown_table(("launcher", "processes", "empty, s"), empty_rows(options.launchers, options.empty)))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
