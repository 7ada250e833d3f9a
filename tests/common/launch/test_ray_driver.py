"""What the process that starts Ray workers makes of losses and signals, without a cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

from common.errors import UserError
from common.launch.signals import StopSignals
from common.run_lock import hold, release
from common.schema import LaunchSettings

pytest.importorskip("ray", reason="requirements-ray.txt is not installed")

Run = Callable[[int, Any], Any]
"""`run(number, relay)`: what comes of the n-th start of the workers."""


def train(monkeypatch: pytest.MonkeyPatch, root: Path, run: Run, signals: StopSignals | None = None, resumed: Path | None = None) -> Any:
    """The command lines of all starts, and the exit code or the problems."""
    from common.launch import ray_driver

    orders: list[tuple[str, ...]] = []

    def start(launch: LaunchSettings, order: Any, scratch: Path, relay: Any, *_: Any) -> Any:
        orders.append(order.argv)
        return run(len(orders), relay)

    monkeypatch.setattr(ray_driver, "ray", MagicMock())
    monkeypatch.setattr(ray_driver, "check_room", lambda launch: None)
    monkeypatch.setattr(ray_driver, "NodeAffinitySchedulingStrategy", Mock())
    monkeypatch.setattr(ray_driver, "_run", start)
    launch = LaunchSettings(engine="ray", num_training_workers=2, max_failures=2)
    signals = signals or StopSignals()
    try:
        code = ray_driver.train(print, ["a=1"], launch, signals, root, root=root, resumed=resumed, timeout_s=1)  # type: ignore[arg-type]
    except UserError as error:
        return orders, error.problems
    return orders, code


def test_a_run_that_goes_on_from_an_earlier_checkpoint_does_so_again_after_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Until it has checkpoints of its own: later ones of the old course are not where it was."""
    from common.launch.ray_driver import _Attempt

    run_dir = tmp_path / "desc-run,index-0"
    for step in (5, 10):
        (run_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)

    def run(number: int, relay: Any) -> Any:
        if number == 2:
            (run_dir / "checkpoints" / "step-000010").rename(run_dir / "checkpoints" / "aside-step-000010")
        return _Attempt(lost="worker 1 of 2 was lost") if number < 3 else _Attempt()

    orders, code = train(monkeypatch, tmp_path, run, resumed=run_dir)
    assert (orders, code) == ([("a=1",), ("a=1",), ("a=1", "--resume", str(run_dir))], 0)


def test_a_signal_before_the_workers_start_ends_it_without_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with StopSignals(tells=False) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert train(monkeypatch, tmp_path, Mock(), signals) == ([], 143)


def test_a_worker_that_is_lost_before_it_saved_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.launch.ray_driver import _Attempt

    def run(number: int, relay: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return _Attempt(lost="worker 1 of 2 was lost")

    with StopSignals(tells=False) as signals:
        assert train(monkeypatch, tmp_path, run, signals) == ([("a=1",)], 143)
    assert capsys.readouterr().err == "worker 1 of 2 was lost before it stopped; --resume goes on from the last checkpoint\n"


def test_the_loss_of_what_watches_the_workers_is_a_loss_and_frees_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.launch import ray_driver

    job, other = "01000000", "02000000"
    places = {f"{number:028x}{owner}": state for number, owner, state in ((1, job, "CREATED"), (2, job, "REMOVED"), (3, other, "CREATED"))}
    monkeypatch.setattr(ray_driver, "ray", Mock(**{"get_runtime_context.return_value.get_job_id.return_value": job}))
    monkeypatch.setattr(ray_driver, "placement_group_table", lambda: {number: {"state": state} for number, state in places.items()})
    removed: list[str] = []
    monkeypatch.setattr(ray_driver, "remove_placement_group", lambda group: removed.append(group.id.hex()))
    attempt = ray_driver._outcome(Mock(fit=Mock(side_effect=ray_driver.RayActorError())), LaunchSettings())
    assert removed == [f"{1:028x}{job}"]
    assert (attempt.lost, attempt.error) == ("the process that watches the workers was lost", None)


def test_markers_of_processes_that_were_killed_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from common.launch.ray_driver import _Attempt

    left, held, new = (tmp_path / f".ray-{name}" for name in ("left", "held", "new"))
    for path in (left, held, new):
        path.touch()
    for path in (left, held):
        os.utime(path, (time.time() - 61,) * 2)
    lock = hold(held)
    assert train(monkeypatch, tmp_path, lambda *_: _Attempt())[1] == 0
    release(lock)
    assert {path.name for path in tmp_path.glob(".ray-*")} == {".ray-held", ".ray-new"}


def test_what_a_worker_prints_comes_in_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.launch import ray_worker

    sent: list[str] = []
    monkeypatch.setattr(ray_worker, "_SEND_EVERY_S", 0.01)
    monkeypatch.setattr(ray_worker.ray, "get", lambda text: sent.append(text))
    mailbox = Mock(**{"send.remote": lambda name, text: text})
    with ray_worker._Sender(mailbox, "stdout") as stream:
        stream.write("note: half")
        time.sleep(0.1)
        stream.write(" a line\nthe end")
    assert sent[0].startswith("note: half a line\n") and "".join(sent) == "note: half a line\nthe end"
