"""Which checkpoints a run keeps, and when it writes them. The stage says how one is written; this says where, when and what may go."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from common.checkpoint import record_metrics
from common.fault_points import reached
from common.notes import say
from common.runs import CHECKPOINTS_FOLDER, SUMMARY_FILE, checkpoints_in, replace_symlink, step_of
from common.schema import CheckpointSettings, resolve_monitor
from common.training_state import write_training_state

SaveFn = Callable[[Path, dict[str, float], int, Callable[[Path], None]], None]
"""`save(directory, metrics, step, extra)` writes a complete model directory at a path that does not exist yet, all or nothing.

`extra(staging)` adds files before it is complete."""

BEST, LAST = "best", "last"


class CheckpointKeeper:
    """The checkpoints of one run: `checkpoints/step-000100/`, the links `best` and `last`, and the removal of older ones.

    `keep_last` of the newest stay, and `keep_best` by the monitored value. An old checkpoint goes only after the new one is complete, so
    there is always a good one; a monitored value that is not finite is never the best. Checkpoints that the state of a kept one names as
    the best stay, too, so that training can go on from it.
    """

    def __init__(self, run_dir: Path, save: SaveFn, *, monitor: str, mode: str, keep_last: int, keep_best: int = 1) -> None:
        assert mode in ("min", "max") and keep_last >= 1 and keep_best >= 1
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / CHECKPOINTS_FOLDER
        self.monitor, self.mode, self.keep_last, self.keep_best = monitor, mode, keep_last, keep_best
        self._save = save
        self.best_metrics: dict[str, float] = {}
        self.last: Path | None = None
        self._ranked: list[tuple[int, float]] = []  # (step, value), the best first
        self._named: dict[int, list[int]] = {}  # step -> steps that its state ranks

    @classmethod
    def from_settings(cls, run_dir: Path, save: SaveFn, settings: CheckpointSettings, choices: Iterable[str]) -> CheckpointKeeper:
        """Raises ValueError for a monitor that is not among `choices`."""
        return cls(
            run_dir,
            save,
            monitor=resolve_monitor(settings.monitor, choices),
            mode=settings.mode,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
        )

    @property
    def best(self) -> Path | None:
        """The best checkpoint; None where no monitored value was finite."""
        return self.path(self._ranked[0][0]) if self._ranked else None

    @property
    def best_value(self) -> float | None:
        return self._ranked[0][1] if self._ranked else None

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether these figures beat the best so far (equal ones do not)."""
        value = metrics.get(self.monitor)
        if value is None or not math.isfinite(value):
            return False
        return self.best_value is None or self._worth(value) > self._worth(self.best_value)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, metrics: Mapping[str, float] | None = None, state: Callable[[], dict[str, Any]] = dict) -> Path:
        """Write the checkpoint of `step` (unless it is there), move the links, then remove what is kept no longer.

        `metrics` are the validation figures of this very state; None where it was not validated. `state` is what training needs to go on.
        """
        figures = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}  # JSON has no word for others
        path = self.path(step)
        ranked, best_metrics = self._with(step, figures)
        if self.last != path:
            keeper = {"ranked": [list(entry) for entry in ranked], "best_metrics": best_metrics, "named": dict(self._named)}
            self._save(path, figures, step, lambda folder: write_training_state(folder, {**state(), "keeper": keeper}))
            reached("checkpoint complete")
            replace_symlink(self.run_dir / LAST, path)
            self.last = path
        elif figures:
            record_metrics(path, figures)  # a state that was saved before it was validated
        self._ranked, self.best_metrics = ranked, best_metrics
        self._named[step] = [ranked_step for ranked_step, _ in ranked]
        if self.best is not None:
            replace_symlink(self.run_dir / BEST, self.best)
        reached("links moved")
        self._remove_old()
        return path

    def close(self) -> Path:
        """At the end of training: the best checkpoint; where no monitored value was finite, the last one stands in for it."""
        assert self.last is not None, "nothing was saved"
        if self.best is None:
            replace_symlink(self.run_dir / BEST, self.last)
        return self.best or self.last

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from the checkpoint of `step`, whose state this is: the run is finished no longer, later checkpoints are set aside."""
        (self.run_dir / SUMMARY_FILE).unlink(missing_ok=True)
        for path in reversed(checkpoints_in(self.folder)):  # killed in between, the newest one left is what the run goes on from
            if step_of(path) > step:
                set_aside(path)
        there = {step_of(path) for path in checkpoints_in(self.folder)}
        self._ranked = [(ranked_step, value) for ranked_step, value in state["ranked"] if ranked_step in there]
        best_is_there = bool(self._ranked) and self._ranked[0][0] == state["ranked"][0][0]
        self.best_metrics = dict(state["best_metrics"]) if best_is_there else {}
        self._named = {kept: list(named) for kept, named in state["named"].items() if kept in there}
        self._named[step] = [ranked_step for ranked_step, _ in self._ranked]
        self.last = self.path(step)
        replace_symlink(self.run_dir / LAST, self.last)
        if self.best is not None:
            replace_symlink(self.run_dir / BEST, self.best)
        else:  # the best of all may have been set aside
            (self.run_dir / BEST).unlink(missing_ok=True)

    def _with(self, step: int, figures: dict[str, float]) -> tuple[list[tuple[int, float]], dict[str, float]]:
        """The ranking and the best's figures once those of `step` are among them."""
        value = figures.get(self.monitor)
        if value is None or not math.isfinite(value):
            return self._ranked, self.best_metrics
        ranked = sorted([*self._ranked, (step, value)], key=lambda entry: -self._worth(entry[1]))  # stable: an equal one is no better
        ranked = ranked[: self.keep_best]
        return ranked, figures if ranked[0][0] == step else self.best_metrics

    def _worth(self, value: float) -> float:
        return value if self.mode == "max" else -value

    def _remove_old(self) -> None:
        newest = checkpoints_in(self.folder)[-self.keep_last :]
        kept = {step_of(path) for path in newest}
        kept |= {step for step, _ in self._ranked} | {named for step in kept for named in self._named.get(step, ())}
        for path in checkpoints_in(self.folder):
            if step_of(path) not in kept and path != self.last:
                # Renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint.
                doomed = path.with_name(f".{path.name}.removed")
                path.rename(doomed)
                reached("old checkpoint renamed")
                shutil.rmtree(doomed, ignore_errors=True)
                self._named.pop(step_of(path), None)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is none any more, and stays."""
    aside = path.with_name(f"aside-{path.name}")
    for number in count(2):
        if not aside.exists():
            break
        aside = path.with_name(f"aside-{path.name}-{number}")
    path.rename(aside)
    say(f"{path} is {aside.name} now: training goes on from an earlier one")
    return aside
