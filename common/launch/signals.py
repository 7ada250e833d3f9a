"""SIGTERM and SIGINT as a wish to stop at the next safe point: save, then exit with 128 + signal number (143, 130)."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


_requested: signal.Signals | None = None


def request_stop(number: int) -> None:
    """As if this signal had come: for processes that are told in another way, and trainings outside the main thread."""
    global _requested
    _requested = signal.Signals(number)


class Stopped(SystemExit):
    """A run that a signal ended, after it saved; left uncaught, the process exits with 143 or 130."""

    def __init__(self, code: int) -> None:
        super().__init__(code)


class StopSignals:
    """Catches both signals inside a `with`; the training loop asks `received` at each step and calls `stop()` once it has saved.

    A second SIGINT stops at once, without saving. Outside the main thread (a Ray worker, say) Python delivers no signals: `request_stop`
    stands in for them there.
    """

    def __init__(self, *, tells: bool = True) -> None:
        """`tells`: say that a signal came; in one of several processes is enough."""
        self.tells = tells
        self.insisted = False
        """Whether a second SIGINT came."""
        self._caught: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> signal.Signals | None:
        """The signal that wishes this process to stop."""
        return self._caught or _requested

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.getsignal(number)
        self.install()
        return self

    def install(self) -> None:
        """(Re)install the handlers, where a library took them in between."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        if self.received is not None and name is signal.SIGINT:
            self.insisted = True
            raise Stopped(EXIT_CODES[signal.SIGINT])
        if self.received is None:
            self._caught = name
            again = " (Ctrl-C again: at once, without saving)" if name is signal.SIGINT else ""
            if self.tells:  # not by print: the signal may have come in the middle of one
                os.write(2, f"{name.name}: saving after this step, then stopping{again}\n".encode())

    @property
    def exit_code(self) -> int:
        """Of the received signal; of SIGTERM where another process of this run received one."""
        return EXIT_CODES[self.received or signal.SIGTERM]

    def stop(self) -> NoReturn:
        """Leave with the exit code of the received signal."""
        raise Stopped(self.exit_code)
