"""Which checkpoints a run keeps, and when it writes them. The stage says how one is written; this says where, when and what may go."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from common.runs import CHECKPOINTS_FOLDER, replace_symlink
from common.schema import CheckpointSettings, resolve_monitor

SaveFn = Callable[[Path, dict[str, float], int], None]
"""`save(directory, metrics, step)` writes a complete model directory at a path that does not exist yet, all or nothing."""

BEST, LAST = "best", "last"
_STEP_NAME = re.compile(r"step-(\d+)")


class CheckpointKeeper:
    """The checkpoints of one run: `checkpoints/step-000100/`, the links `best` and `last`, and the removal of older ones.

    An old checkpoint goes only after the new one is complete, so there is always a good one. A monitored value that is not finite is
    never the best.
    """

    def __init__(self, run_dir: Path, save: SaveFn, *, monitor: str, mode: str, keep_last: int) -> None:
        assert mode in ("min", "max") and keep_last >= 1
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / CHECKPOINTS_FOLDER
        self.monitor, self.mode, self.keep_last = monitor, mode, keep_last
        self._save = save
        self.best: Path | None = None
        self.best_value: float | None = None
        self.best_metrics: dict[str, float] = {}
        self.last: Path | None = None

    @classmethod
    def from_settings(cls, run_dir: Path, save: SaveFn, settings: CheckpointSettings, choices: Iterable[str]) -> CheckpointKeeper:
        """Raises ValueError for a monitor that is not among `choices`."""
        return cls(run_dir, save, monitor=resolve_monitor(settings.monitor, choices), mode=settings.mode, keep_last=settings.keep_last)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether these figures beat the best so far (equal ones do not)."""
        value = metrics.get(self.monitor)
        if value is None or not math.isfinite(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if self.mode == "min" else value > self.best_value

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, metrics: Mapping[str, float] | None = None) -> Path:
        """Write the checkpoint of `step` (unless it is there), move the links, then remove what is kept no longer.

        `metrics` are the validation figures of this very state; None where it was not validated.
        """
        figures = dict(metrics or {})
        path = self.path(step)
        if self.last != path:
            self._save(path, figures, step)
            replace_symlink(self.run_dir / LAST, path)
            self.last = path
        if self.improves(figures):
            self.best, self.best_value, self.best_metrics = path, figures[self.monitor], figures
            replace_symlink(self.run_dir / BEST, path)
        self._remove_old()
        return path

    def close(self) -> None:
        """At the end of training: a run without any finite monitored value calls its last checkpoint the best."""
        if self.best is None and self.last is not None:
            self.best = self.last
            replace_symlink(self.run_dir / BEST, self.last)

    def _remove_old(self) -> None:
        numbered = sorted((int(match[1]), path) for path in self.folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name)))
        newest = {path for _, path in numbered[-self.keep_last :]}
        for _, path in numbered:
            if path not in newest and path not in (self.best, self.last):
                # Renamed first: a removal that is interrupted leaves nothing that looks like a checkpoint.
                doomed = path.with_name(f".{path.name}.removed")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
