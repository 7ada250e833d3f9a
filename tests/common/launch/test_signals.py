from __future__ import annotations

import os
import signal
import threading

import pytest

from common.launch.signals import Stopped, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_remembered_and_gives_the_exit_code(number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
        with pytest.raises(SystemExit) as left:
            stop.stop()
        assert left.value.code == code
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.startswith(f"{number.name}: saving after this step")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_interrupt_leaves_at_once(first: signal.Signals) -> None:
    with StopSignals(), pytest.raises(Stopped) as left:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 130


def test_a_second_sigterm_still_lets_it_save() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143


def test_handlers_that_a_library_took_can_be_taken_back() -> None:
    with StopSignals() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopSignals() as stop:
            seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
