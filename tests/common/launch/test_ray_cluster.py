"""What becomes of a cluster's folder and of how it ends, without a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from common.errors import UserError
from common.launch import ray_cluster, ray_watchdog
from common.launch.signals import Stopped, StopSignals
from common.run_lock import LOCK_FILE, hold, release
from common.schema import LaunchSettings

pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
LAUNCH = LaunchSettings(engine="ray", num_training_workers=2)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[mock.Mock]:
    """Ray that starts nothing."""
    import ray

    monkeypatch.setattr(ray_cluster, "scratch_folder", lambda: contextlib.nullcontext(Path(tempfile.mkdtemp(dir=tmp_path))))
    with mock.patch.dict(os.environ), mock.patch.multiple(ray, init=mock.DEFAULT, shutdown=mock.DEFAULT) as mocked:
        yield mock.Mock(**mocked)


def twice(signals: StopSignals) -> None:
    """Two SIGINTs, the second of which Ray turns into an end of its own, as it does inside its calls."""
    os.kill(os.getpid(), signal.SIGINT)
    with contextlib.suppress(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(1)


def test_a_second_interrupt_ends_it_with_130_wherever_it_comes(ray: mock.Mock) -> None:
    with StopSignals(tells=False) as signals, pytest.raises(Stopped) as left, ray_cluster.cluster(LAUNCH, signals):
        twice(signals)
    assert left.value.code == 130 and ray.shutdown.called
    ray.init.side_effect = lambda **_: twice(signals)
    with StopSignals(tells=False) as signals, pytest.raises(Stopped) as left, ray_cluster.cluster(LAUNCH, signals):
        pass
    assert left.value.code == 130


def test_a_sigterm_that_ray_answers_while_it_starts_ends_it_with_143(ray: mock.Mock) -> None:
    ray.init.side_effect = SystemExit(15)
    with StopSignals() as signals, pytest.raises(Stopped) as left, ray_cluster.cluster(LAUNCH, signals):
        pass
    assert left.value.code == 143


def test_whatever_keeps_ray_from_starting_is_one_line(ray: mock.Mock) -> None:
    ray.init.side_effect = Exception("The current node timed out\nduring startup.")
    with (
        StopSignals() as signals,
        pytest.raises(UserError, match=r"^launch: no Ray cluster: The current node timed out during startup"),
        ray_cluster.cluster(LAUNCH, signals),
    ):
        pass


def test_folders_that_others_have_left_go_and_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ray_cluster, "_LONGEST_BASE", 1000)
    left, held, new, bare = (tmp_path / f"rlhf-qa-ray-{name}" for name in ("left", "held", "new", "bare"))
    for folder in (left, held, new, bare):
        folder.mkdir()
    (left / LOCK_FILE).touch()
    lock = hold(held / LOCK_FILE)
    for folder in (left, held, bare):
        os.utime(folder, (time.time() - 61,) * 2)
    with ray_cluster.scratch_folder() as own:
        assert set(tmp_path.iterdir()) == {held, new, own}
    release(lock)
    assert set(tmp_path.iterdir()) == {held, new}


def test_its_processes_are_found_behind_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are known by the files that they write, whose names have no links."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "link"))
    monkeypatch.setattr(ray_cluster, "_LONGEST_BASE", 1000)
    code = "import sys, time; kept = open(sys.argv[1], 'a'); print('open', flush=True); time.sleep(60)"
    with ray_cluster.scratch_folder() as folder:
        writer = subprocess.Popen([sys.executable, "-c", code, str(folder / "log")], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "open\n"
        monkeypatch.setattr(ray_watchdog, "_ENDS_BY_ITSELF_S", 0.1)
    try:
        assert writer.poll() is not None and not folder.exists()
    finally:
        writer.kill()
        writer.communicate()


@pytest.mark.parametrize(("told", "said"), [(ray_watchdog.ENDED, ""), ("", "error: the script was ended, or Ray was; --resume goes on")])
def test_a_script_that_is_gone_is_told_by_who_is_left(told: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-I", ray_watchdog.__file__, str(folder)]
    ended = subprocess.run(command, input=told, stderr=subprocess.PIPE, text=True, check=True)
    assert ended.stderr.startswith(said) and bool(ended.stderr) is bool(said) and not folder.exists()
