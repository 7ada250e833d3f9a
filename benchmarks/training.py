"""What the benchmarks of SFT and reward models share: contenders in turn, each in its own process, and a table of their speeds."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import try_contender

ROOT = Path(__file__).resolve().parents[1]
BARE_LOOPS = ROOT.parent / "shared" / "bench"
"""Loops with every exact trick and no trainer around them; no part of this repository."""


@dataclass
class Clock:
    """Wall and CPU seconds of training steps, from the start of the first to the end of the last one seen."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    @property
    def seconds(self) -> float:
        return self.marks[-1][0] - self.marks[0][0]

    @property
    def cpu_seconds(self) -> float:
        return self.marks[-1][1] - self.marks[0][1]


def watch(module: type) -> Clock:
    """A clock of the training steps that a LightningModule's class will make: loading of batches, loop and callbacks are in them."""
    clock = Clock()

    def on_train_epoch_start(self: Any) -> None:
        clock.mark()

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        clock.mark()

    module.on_train_epoch_start, module.on_train_batch_end = on_train_epoch_start, on_train_batch_end  # type: ignore[attr-defined]
    return clock


@dataclass(frozen=True)
class Bare:
    """A contender of the folder of bare loops: its module there, its name in it."""

    module: str
    name: str

    def __call__(self, options: argparse.Namespace, rows: Any) -> Clock:
        sys.path.insert(0, str(BARE_LOOPS))
        found, _ = importlib.import_module(self.module).CONTENDERS[self.name](options, rows)
        return Clock([(0.0, 0.0), (found.d["t"], found.d["cpu_t"])])


Run = Callable[[argparse.Namespace, Any], Clock]


def argument_parser(description: str | None, contenders: Mapping[str, Run], rows: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="s", choices=("xs", "s", "m"))
    parser.add_argument("--n", type=int, default=rows, help="training rows")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="contenders, separated by commas (default: all but those in bfloat16)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of our own runs, as on their command line")
    parser.add_argument("--python", default=sys.executable, help="interpreter of everything but our own runs")
    parser.add_argument("--contender", choices=contenders, help="measure this one here and print its figures")
    return parser


def measure(options: argparse.Namespace, run: Run, warm_up: Callable[[], object], rows: Any) -> None:
    """Measure one contender in this process, after a step that does not count, and print its figures."""
    from benchmarks.synthetic import peak_rss_mib, print_result, versions

    warm_up()
    clock = run(options, rows)
    print_result({"seconds": clock.seconds, "cpu": clock.cpu_seconds, "peak_rss_mb": round(peak_rss_mib()), "versions": versions()})


def compare(options: argparse.Namespace, script: str, contenders: Mapping[str, Run], amount: int, unit: str, first: str) -> int:
    """Run the contenders in turn, round after round, and print their speeds; ratios are to `first` where it runs."""
    chosen = options.only.split(",") if options.only else [name for name in contenders if not name.endswith("bf16")]
    if unknown := [name for name in chosen if name not in contenders]:
        raise SystemExit(f"--only {','.join(unknown)}: choose among {', '.join(contenders)}")
    for name in [name for name in chosen if isinstance(contenders[name], Bare) and not BARE_LOOPS.is_dir()]:
        print(f"left out: {name}, for lack of {BARE_LOOPS}")
        chosen.remove(name)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for name in chosen:
            figures = _run(options, script, name)
            if figures is not None:
                found.setdefault(name, []).append(figures)
                print(f"round {number + 1}: {name} {amount / figures['seconds']:.1f} {unit}/s", file=sys.stderr, flush=True)
    print(table(found, amount, unit, first))
    print("RESULT " + json.dumps({"size": options.size, "rows": options.n, unit: amount, "contenders": found}))
    return 0 if found.keys() == set(chosen) else 1


def _run(options: argparse.Namespace, script: str, name: str) -> dict[str, Any] | None:
    python = sys.executable if name.startswith("ours") else options.python
    command = [python, script, "--contender", name]
    for option in ("size", "n", "batch", "threads"):
        command += [f"--{option}", str(getattr(options, option))]
    if options.set:
        command += ["--set", *options.set]
    return try_contender(command)


def main(
    argv: Sequence[str] | None,
    description: str | None,
    script: str,
    contenders: Mapping[str, Run],
    build_rows: Callable[[int], list[Any]],
    *,
    rows: int,
    unit: str,
    amount: Callable[[list[Any]], int],
    about: Callable[[list[Any]], str],
) -> int:
    """A benchmark's command line: one contender here, or all of them in turn.

    build_rows    number of rows -> the rows; `rows`: how many unless the command line says otherwise
    unit, amount  what speeds count, and how much of it the rows have; `about`: what else is told of them
    """
    options = argument_parser(description, contenders, rows).parse_args(argv)
    built = build_rows(options.n)
    if options.contender is None:
        print(about(built))
        return compare(options, script, contenders, amount(built), unit, "trl")
    import torch

    torch.set_num_threads(options.threads)
    measure(options, contenders[options.contender], lambda: contenders["floor"](options, built[:1]), built)
    return 0


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], amount: int, unit: str, first: str) -> str:
    """Markdown: medians over rounds, the best round, and ratios to `first` by wall time, by its best round and by CPU time."""
    rows = [f"| contender | {unit}/s | best | to {first} | best | by CPU | peak MiB | seconds |", "|---|---|---|---|---|---|---|---|"]
    base = found.get(first) or next(iter(found.values()), [])
    for name, rounds in found.items():
        cells = [f"{amount / _median(rounds, 'seconds'):.1f}", f"{amount / _least(rounds):.1f}"]
        cells += [f"{_median(base, 'seconds') / _median(rounds, 'seconds'):.2f}", f"{_least(base) / _least(rounds):.2f}"]
        cells += [f"{_median(base, 'cpu') / _median(rounds, 'cpu'):.2f}", f"{_median(rounds, 'peak_rss_mb'):.0f}"]
        rows.append(f"| {name} | " + " | ".join(cells) + " | " + " ".join(f"{figures['seconds']:.1f}" for figures in rounds) + " |")
    return "\n".join(rows)


def _median(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def _least(rounds: Sequence[Mapping[str, Any]]) -> float:
    return min(float(figures["seconds"]) for figures in rounds)


# --- a plain loop and trl


def plain_loop(model: Any, rows: Sequence[Any], batch: int, loss: Callable[[Sequence[Any]], Any]) -> Clock:
    """An epoch of torch's AdamW over shuffled rows, gradients clipped to 1; `loss`: of the rows of a step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    clock = Clock()
    clock.mark()
    for start in range(0, len(order), batch):
        loss([rows[index] for index in order[start : start + batch]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
    return clock


def run_trl(trainer: Any, config: Any, settings: Mapping[str, Any], model: Any, data: Mapping[str, Any], batch: int) -> Clock:
    """An epoch of one of trl's trainers over tokenized columns."""
    from datasets import Dataset

    from benchmarks.synthetic import build_tokenizer

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=model,
            args=config(**{**trl_arguments(folder, batch), **settings}),
            train_dataset=Dataset.from_dict(data),
            processing_class=build_tokenizer(),
            callbacks=[trl_callback(clock)],
        ).train()
    return clock


def trl_arguments(folder: str, batch: int) -> dict[str, Any]:
    """What both of trl's trainers are told; everything else is their default."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "max_length": 512,
        "learning_rate": 1e-5,
        "disable_tqdm": True,
    }


def trl_callback(clock: Clock) -> Any:
    """Marks the start and the end of a trainer's steps."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    return Watch()


# --- our own training scripts ----------------------------------------------------------------------------------------------------


def run_script(
    main: Callable[[Sequence[str]], int], folder: Path, model: Any, data: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """One epoch of a stage's own script: a model directory, a data file and a config are written, then its `main` is called."""
    config = write_run(folder, model, data, batch=options.batch, log_every=10)
    assert main(["--config_file", str(config), *options.set]) == 0


def write_run(folder: Path, model: Any, data: Mapping[str, Any], *, batch: int, log_every: int) -> Path:
    """A model directory, a data file and the config of one epoch on them, on the CPU; `batch`: rows per step."""
    import yaml

    from benchmarks.synthetic import build_tokenizer

    model.save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    (folder / "data.json").write_text(json.dumps(data))
    config = {
        "model_name": str(folder / "model"),
        "data": {"data_dir": str(folder / "data.json"), "batch_size": batch, "max_length": 512},
        "model_params": {"learning_rate": 1e-5},
        "trainer": {
            "checkpoint": {"dirpath": str(folder / "runs")},
            "params": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "log_every_n_steps": log_every,
                "num_sanity_val_steps": 0,
            },
        },
        "wandb": {"mode": "disabled"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def text(ids: Sequence[int]) -> str:
    """Words that `build_tokenizer` reads as these ids. "Question:" and "Answer:", which it does not know, are a token each as well."""
    return " ".join(f"w{number}" for number in ids)
