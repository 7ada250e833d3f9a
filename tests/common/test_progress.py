from __future__ import annotations

import io
import os
import pty

import pytest

from common import progress
from common.progress import Progress, duration, format_figure


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (20, 20), (1000, 21), (1019, 21)])
def test_a_log_gets_few_lines_the_first_and_the_last_among_them(total: int, lines: int) -> None:
    stream = io.StringIO()
    bar = Progress(total, stream=stream)
    for step in range(1, total + 1):
        bar.update(step, {"train/loss": 0.5, "val/loss": 2.0})
    written = stream.getvalue().splitlines()
    assert len(written) == lines
    assert written[0].startswith(f"step 1/{total}  loss 0.5  val/loss 2  (")
    assert written[-1].startswith(f"step {total}/{total}  ") and "left" not in written[-1]


def test_a_log_gets_lines_of_what_is_counted_in_stretches() -> None:
    stream = io.StringIO()
    bar = Progress(1000, stream=stream)
    for done in (64, 128, 192, 200, 249, 448, 1000):  # no multiple of 50 but two
        bar.update(done, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [f"{n}/1000" for n in (64, 128, 192, 200, 448, 1000)]


def test_rate_and_time_left_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed at step 100 of 200 makes 50 steps in 25 s: 2 a second, and 25 s for the 50 that are left."""
    clock = [10.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    bar = Progress(200, done=100, stream=stream)
    clock[0] += 25.0
    bar.update(150, {"loss": 1.0})
    assert stream.getvalue() == "step 150/200  loss 1  (2 steps/s, 25 s left)\n"


def test_what_is_counted_has_its_own_name() -> None:
    stream = io.StringIO()
    Progress(3, stream=stream, label="caching", unit="answer").update(3, {})
    assert stream.getvalue().startswith("caching answer 3/3 ") and " answers/s)" in stream.getvalue()


def test_disabled_it_shows_notes_alone() -> None:
    stream = io.StringIO()
    bar = Progress(10, enabled=False, stream=stream)
    assert not bar.due(10)
    bar.update(10, {"loss": 1.0})
    bar.note("a note")
    bar.close()
    assert stream.getvalue() == "a note\n"


@pytest.mark.parametrize(("rows", "is_bar"), [(40, True), (0, False)])
def test_a_terminal_with_a_size_gets_a_bar(rows: int, is_bar: bool) -> None:
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100 if rows else 0, 0, 0))
    with os.fdopen(slave, "w") as stream:
        bar = Progress(4, stream=stream)
        assert bar.is_bar is is_bar
        bar.update(4, {"train/loss": 0.5})
        stream.flush()
        shown = ""
        while "4/4" not in shown or "0.5" not in shown:  # a pseudo-terminal may hand over what was written in parts
            shown += os.read(master, 10000).decode()
        bar.close()
    os.close(master)
    assert ("4/4" in shown) and ("loss=0.5" in shown) is is_bar and ("loss 0.5" in shown) is not is_bar


def test_durations_and_figures() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 200, 7500)] == ["0 s", "59 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
    assert [format_figure(value) for value in (3.0, 0.123456, 1.41e-5, float("nan"), 2e9)] == ["3", "0.1235", "1.41e-05", "nan", "2e+09"]
