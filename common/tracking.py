"""Metrics of a run: `metrics.jsonl` is the truth, `metrics.csv` is written from it, wandb and TensorBoard come on top.

Nothing a tracker does may end a training: whatever wandb or TensorBoard raise becomes one warning, and the run goes on without them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from common.errors import UserError
from common.runs import write_summary, write_text_atomically
from common.schema import API_PLACEHOLDERS, WandbSettings

METRICS_JSONL = "metrics.jsonl"
METRICS_CSV = "metrics.csv"
TABLES_FOLDER = "tables"
WANDB_FOLDER = "wandb"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_KEY_VARIABLE = "WANDB_API_KEY"

# Arguments of `wandb.init` that decide where a run's files lie, what it is called there and that it never fails.
RESERVED_INIT_ARGUMENTS = frozenset({"config", "dir", "id", "resume", "settings"})

# Keys of a line that are no metrics.
STEP, TIME = "step", "time"

_NO_METRICS = "its lines are no metrics any more; put back what the run wrote"

Best = Literal["min", "max"]
EVALUATION_PREFIXES = frozenset({"val", "eval", "test"})
# Whether less or more of a metric is better, by the end of its name; what matches nothing has no best value.
_BETTER: tuple[tuple[str, Best], ...] = (
    (r"(loss|perplexity|mse|mae)$", "min"),
    (r"(accuracy\w*|bleu|rouge\w+_fmeasure|pearson|spearman|r2|margin|score|eos_rate)$", "max"),
)


def better(metric: str) -> Best | None:
    """`min` or `max` where one direction is better, None where neither is; only evaluations (`val/`, `eval/`) have a best."""
    if metric.split("/")[0] not in EVALUATION_PREFIXES:
        return None
    return next((direction for pattern, direction in _BETTER if re.search(pattern, metric)), None)


class Sink(Protocol):
    """Somewhere metrics also go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...
    def histogram(self, name: str, values: Sequence[float], step: int) -> None: ...
    def artifact(self, directory: Path, name: str) -> None: ...
    def go_back(self, step: int) -> None: ...
    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None: ...


class Tracker:
    """One run's metrics, tables and summary. Use it in a `with`; an exception inside ends the trackers as failed."""

    def __init__(self, run_dir: Path, *, stage: str = "", is_main: bool = True) -> None:
        """Metrics go to `run_dir`; processes that are not main write nothing at all."""
        self.run_dir = Path(run_dir)
        self.stage = stage
        self.is_main = is_main
        self._sinks: dict[str, Sink] = {}
        self._finished = False
        self._log = (self.run_dir / METRICS_JSONL).open("a", encoding="utf-8") if is_main else None

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        stage: str,
        config: Mapping[str, Any],
        wandb: WandbSettings | None = None,
        tensorboard: bool = False,
        directions: Mapping[str, Best] | None = None,
        is_main: bool = True,
        init_arguments: Mapping[str, Any] | None = None,
    ) -> Tracker:
        """Open a run's metrics and, where asked for, wandb and TensorBoard.

        `config` is the resolved configuration without secrets. `directions` says for metrics (by full name) whether `min` or `max` is
        best, beside what `better` knows. `init_arguments` are further arguments of `wandb.init`.
        """
        tracker = cls(run_dir, stage=stage, is_main=is_main)
        if not is_main:
            return tracker
        if wandb is not None and wandb_mode(wandb) != "disabled":
            tracker._add(
                "wandb",
                lambda: WandbSink(run_dir, stage=stage, config=config, settings=wandb, directions=directions or {}, extra=init_arguments),
            )
        if tensorboard:
            tracker._add("TensorBoard", lambda: TensorBoardSink(run_dir / TENSORBOARD_FOLDER))
        return tracker

    @property
    def position(self) -> int:
        """Bytes of metrics that are on disk; 0 in a process that writes none."""
        if self._log is None:
            return 0
        os.fsync(self._log.fileno())  # a checkpoint will count on them
        return os.fstat(self._log.fileno()).st_size

    def go_back(self, position: int, step: int) -> None:
        """Take back the lines after `position`, where a run that goes on had got to after `step`: they are logged again.

        Raises UserError where lines before it are missing.
        """
        if self._log is None:
            return
        if self.position < position:
            path = self.run_dir / METRICS_JSONL
            raise UserError(f"{path}: holds {self.position} bytes, {position} when the checkpoint was saved; put back what was cut off")
        self._log.truncate(position)
        if position and not (self.run_dir / METRICS_JSONL).read_bytes().endswith(b"\n"):
            raise UserError(f"{self.run_dir / METRICS_JSONL}: {_NO_METRICS}")
        read_metrics(self.run_dir)
        self._each(lambda sink: sink.go_back(step))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        self.finish(exit_code=0 if error is None else code)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line: `{"step": ..., "time": ..., metrics}`, time in Unix seconds, a metric that is not finite as null."""
        if self._log is None or not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {STEP: int(step), TIME: round(time.time(), 3), **{name: _finite(value) for name, value in values.items()}}
        self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._log.flush()
        self._each(lambda sink: sink.log(values, int(step)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Write a table of samples to `tables/NAME-step-N.jsonl`, one object per row, and to the trackers."""
        if self._log is None:
            return
        folder = self.run_dir / TABLES_FOLDER
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str) for row in rows]
        write_text_atomically(folder / f"{_file_name(name)}-step-{step:06d}.jsonl", "".join(line + "\n" for line in lines))
        self._each(lambda sink: sink.table(name, columns, rows, int(step)))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """Hand the distribution of the finite ones of some numbers to the trackers; the files hold none."""
        if finite := [value for value in values if math.isfinite(value)]:
            self._each(lambda sink: sink.histogram(name, finite, int(step)))

    def artifact(self, directory: Path, name: str | None = None) -> None:
        """Hand a checkpoint directory to the trackers that store such things."""
        self._each(lambda sink: sink.artifact(Path(directory), name or f"{self.stage or 'model'}-{self.run_dir.name}"))

    def write_csv(self) -> None:
        """Rewrite `metrics.csv` from `metrics.jsonl`."""
        if self._log is not None:
            write_text_atomically(self.run_dir / METRICS_CSV, csv_text(read_metrics(self.run_dir)))

    def finish(self, summary: Mapping[str, Any] | None = None, *, exit_code: int = 0) -> None:
        """Write `metrics.csv` and, where given, `summary.json`, and close everything; a second call does nothing."""
        if self._log is None or self._finished:
            return
        self._finished = True
        self.write_csv()
        if summary is not None:
            write_summary(self.run_dir, summary)
        self._each(lambda sink: sink.finish(summary or {}, exit_code))
        self._log.close()

    def _add(self, name: str, make: Callable[[], Sink]) -> None:
        with self._failing_softly(name):
            self._sinks[name] = make()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._failing_softly(name):
                act(sink)

    @contextlib.contextmanager
    def _failing_softly(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, the training is worth more
            self._sinks.pop(name, None)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"warning: {name} failed ({reason}); going on without it, {METRICS_JSONL} has everything", file=sys.stderr)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "table"


# --- files -----------------------------------------------------------------------------------------------------------------------


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that a killed process left unfinished is passed over.

    Raises UserError where others cannot be read.
    """
    path = Path(run_dir) / METRICS_JSONL
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise UserError(f"{path}: {_NO_METRICS} ({error})") from None
    with contextlib.suppress(json.JSONDecodeError):
        if lines[-1]:
            records.append(json.loads(lines[-1]))
    return records


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """One row per step (what was logged at a step in several lines is joined, the later value wins), one column per metric."""
    rows: dict[int, dict[str, Any]] = {}
    columns = dict.fromkeys((STEP, TIME))
    for line in lines:
        rows.setdefault(line[STEP], {}).update(line)
        columns.update(dict.fromkeys(line))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue()


def best_values(lines: Sequence[Mapping[str, Any]], directions: Mapping[str, Best] | None = None) -> dict[str, dict[str, float]]:
    """Per metric that has a better direction: its best value and the step it was reached at (the first one)."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        for name, value in line.items():
            direction = (directions or {}).get(name) or better(name)
            if direction is None or value is None or name in (STEP, TIME):
                continue
            old = found.get(name)
            if old is None or (value < old["value"] if direction == "min" else value > old["value"]):
                found[name] = {"value": value, STEP: line[STEP]}
    return found


# --- wandb -----------------------------------------------------------------------------------------------------------------------


def wandb_mode(settings: WandbSettings) -> Literal["online", "offline", "disabled"]:
    """`auto`: what WANDB_MODE says, else online with a key in the environment, else offline. Online without a key: offline."""
    has_key = os.environ.get(WANDB_KEY_VARIABLE, "") not in API_PLACEHOLDERS
    wish = settings.mode
    if wish == "auto":
        wish = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}.get(os.environ.get("WANDB_MODE", ""), "online")  # type: ignore[assignment]
    return "offline" if wish == "online" and not has_key else wish  # type: ignore[return-value]


def init_argument_problems(arguments: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Key -> what is wrong with it, of arguments for `wandb.init` that stand flat or under `wandb`."""
    problems: dict[tuple[str, ...], str] = {}
    nested = arguments.get("wandb", {})
    if not isinstance(nested, Mapping):
        problems["wandb",] = "expected a mapping"
        nested = {}
    for place, names in (((), arguments), (("wandb",), nested)):
        problems |= {(*place, name): "set by the run itself; remove it" for name in names if name in RESERVED_INIT_ARGUMENTS}
    return problems


class WandbSink:
    """A wandb run whose files all lie in the run directory. Each prefix (`train/`, `val/`, …) has a step axis of its own."""

    INIT_TIMEOUT_S = 30.0

    def __init__(
        self,
        run_dir: Path,
        *,
        stage: str,
        config: Mapping[str, Any],
        settings: WandbSettings,
        directions: Mapping[str, Best],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        folder = (run_dir / WANDB_FOLDER).absolute()
        folder.mkdir(exist_ok=True)
        # Caches and staged artifacts belong to the run, not to the home folder; wandb reads these when it needs them.
        self._environment = {name: os.environ.get(name) for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")}
        for name, old in self._environment.items():
            os.environ[name] = old or str(folder / name.removeprefix("WANDB_").removesuffix("_DIR").lower())
        import wandb  # slow, and not needed by most runs

        self._wandb = wandb
        self._directions = directions
        self._defined: set[str] = set()
        arguments = {
            "project": settings.project,
            "group": settings.args.group,
            "job_type": settings.args.job_type or stage,
            "name": settings.args.name or run_dir.name,
            "config": dict(config),
            "mode": wandb_mode(settings),
            "id": _wandb_id(folder),
            "resume": "allow",
            **(extra or {}),
            "dir": str(run_dir.absolute()),
        }
        # Metadata holds the command line, and a key might stand in it; what ran is in the manifest and in config.yaml.
        quiet = wandb.Settings(silent=True, console="off", x_disable_meta=True, x_save_requirements=False, init_timeout=self.INIT_TIMEOUT_S)
        logging.getLogger("wandb").setLevel(logging.ERROR)
        try:
            self._run = wandb.init(**arguments, settings=quiet)
        except Exception as error:
            if arguments["mode"] != "online":
                raise
            reason = str(error).strip().partition("\n")[0]
            print(f"warning: wandb cannot be reached ({reason}); recording offline, `wandb sync` uploads it later", file=sys.stderr)
            self._run = wandb.init(**{**arguments, "mode": "offline"}, settings=quiet)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        axes: dict[str, int] = {}
        for name in metrics:
            axis = _step_axis(name)
            self._define(name, axis)
            axes[axis] = step
        self._run.log({**metrics, **axes})

    def _define(self, name: str, axis: str) -> None:
        if axis not in self._defined:
            self._run.define_metric(axis, hidden=True)
            self._defined.add(axis)
        if name not in self._defined:
            direction = self._directions.get(name) or better(name)
            self._run.define_metric(name, step_metric=axis, summary=f"{direction},last" if direction else "last")
            self._defined.add(name)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        axis = _step_axis(name)
        self._define(name, axis)
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows]), axis: step})

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        axis = _step_axis(name)
        self._define(name, axis)
        self._run.log({name: self._wandb.Histogram(values), axis: step})

    def artifact(self, directory: Path, name: str) -> None:
        artifact = self._wandb.Artifact(_file_name(name), type="model")
        artifact.add_dir(str(directory))
        self._run.log_artifact(artifact)

    def go_back(self, step: int) -> None:
        pass  # its curves are over steps of our own, and what is logged again has the same values

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        try:
            for name, value in summary.items():
                self._run.summary[name] = value
            self._run.finish(exit_code=exit_code)
        finally:
            for name, old in self._environment.items():
                if old is None:
                    os.environ.pop(name, None)


def _step_axis(metric: str) -> str:
    prefix, slash, _ = metric.rpartition("/")
    return f"{prefix.split('/')[0]}/step" if slash else "step"


def _wandb_id(folder: Path) -> str:
    """The id under which this run directory is known to wandb: made once, so that a resumed run continues its own curves."""
    path = folder / "run-id.txt"
    if not path.exists():
        write_text_atomically(path, os.urandom(8).hex() + "\n")
    return path.read_text(encoding="utf-8").strip()


# --- TensorBoard -----------------------------------------------------------------------------------------------------------------


class TensorBoardSink:
    """TensorBoard event files; tables become Markdown text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = self._open()

    def _open(self, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(self._folder), **options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._writer.add_text(name, markdown_table(columns, rows), step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        import numpy as np

        self._writer.add_histogram(name, np.asarray(values), step)

    def artifact(self, directory: Path, name: str) -> None:
        self._writer.add_text("checkpoint", str(directory))

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._writer.close()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; line breaks and bars inside cells cannot break it."""

    def cells(values: Sequence[Any]) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|").replace("\n", "<br>") for value in values) + " |"

    return "\n".join([cells(columns), "|" + "---|" * len(columns), *(cells(row) for row in rows)])
