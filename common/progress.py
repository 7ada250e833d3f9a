"""A training's progress: one bar on a terminal, a few lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

REDRAW_S = 0.2
LOG_LINES = 20


class Progress:
    """Steps (or what `unit` says) done of `total`, with the latest figures, rate and time left."""

    def __init__(
        self, total: int, *, done: int = 0, enabled: bool = True, stream: TextIO | None = None, label: str = "", unit: str = "step"
    ) -> None:
        """`done` steps were made before (a resumed run); a disabled one still prints notes."""
        self.total = total
        self.label, self.unit = label, unit
        self._stream = stream or sys.stderr
        self._enabled = enabled and total > 0
        self._terminal = self._enabled and _is_terminal(self._stream)
        self._every = max(1, -(-total // LOG_LINES))
        self._started, self._first, self._done = time.monotonic(), done, done
        self._drawn = -1.0
        self._bar: Any = None
        if self._terminal:
            from tqdm import tqdm

            # miniters and mininterval: this class decides when to draw
            self._bar = tqdm(
                total=total, initial=done, desc=label or None, file=self._stream, dynamic_ncols=True, leave=True, miniters=0, mininterval=0
            )

    @property
    def is_bar(self) -> bool:
        """Whether it is drawn on a terminal."""
        return self._bar is not None

    def due(self, done: int) -> bool:
        """Whether `update` would show anything now; figures that cost something to read are needed only then."""
        if not self._enabled:
            return False
        if self._terminal:
            return done >= self.total or time.monotonic() - self._drawn >= REDRAW_S
        return done != self._done and (done >= self.total or done // self._every > self._done // self._every or done == self._first + 1)

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that `done` steps are made, with these figures."""
        if not self.due(done):
            return
        self._drawn = time.monotonic()
        figures = {name.removeprefix("train/"): format_figure(value) for name, value in metrics.items()}
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(done - self._bar.n)
        else:
            elapsed = self._drawn - self._started
            rate = (done - self._first) / elapsed if elapsed > 0 else 0.0
            left = f", {duration((self.total - done) / rate)} left" if 0 < done < self.total and rate > 0 else ""
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            place = f"{self.label} {self.unit}".lstrip()
            self._write(f"{place} {done}/{self.total}  {shown}  ({rate:.3g} {self.unit}s/s{left})")
        self._done = done

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        self._write(text)
        if self._bar is not None:
            self._bar.refresh()

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._enabled = False


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn; some pseudo-terminals (of CI systems, say) have no size."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


def format_figure(value: float) -> str:
    """Four significant digits; whole numbers as such."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
