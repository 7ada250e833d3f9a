"""The process that starts Ray workers: it hands them the script, relays their words and the signals, and starts them again after a loss."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import UserError
from common.launch.ray_mailbox import Mailbox
from common.launch.ray_worker import MeetingConfig, Order, WorkerFailed, work
from common.launch.signals import StopSignals
from common.notes import take_notes
from common.run_lock import hold, refuse_locked, release, remove_if_left
from common.runs import CHECKPOINTS_FOLDER, checkpoints_in
from common.schema import LaunchSettings, WorkerResources

_LOOK_EVERY_S = 0.2
_UNLOCK_TIMEOUT_S = 60.0
_MARKER = ".ray-"
_ROOM_LATER = "start it when others have ended, or let it wait longer (RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)"
# Settings that the scripts and their libraries read from the environment; keys and tokens stay where they are.
_PASSED_ON = re.compile(r"(HF_|TRANSFORMERS_|WANDB_|NCCL_|TORCH_|PYTORCH_)\w+|RESULTS_ROOT_DIR|TOKENIZERS_PARALLELISM")
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS_)|SECRET|PASSWORD")


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Without two processes of Ray's.

    One hands out its data sets: the scripts read files. The other frees what a killed controller held, and asks the dashboard whether that
    lives: where there is none it does neither, and outlives a script that is killed.
    """

    def _create_default_callbacks(self) -> list[Any]:
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, left_out)]


@dataclass
class _Attempt:
    """What came of one start of all workers. `lost`: why a worker is gone; `problems`: what the user can mend."""

    code: int = 0
    problems: tuple[str, ...] = ()
    lost: str | None = None
    error: BaseException | None = None


@dataclass
class _Relay:
    """Prints what the workers' leader prints, but for notes that this process has given already; knows its run."""

    run_dir: Path | None
    said: set[str] = field(default_factory=lambda: {f"note: {note}\n" for note in take_notes()})

    def take(self, kind: str, text: str) -> None:
        if kind == "run":
            self.run_dir = Path(text)
            return
        stream = sys.stdout if kind == "stdout" else sys.stderr
        stream.write("".join(line for line in text.splitlines(keepends=True) if line not in self.said))
        stream.flush()


def train(
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    launch: LaunchSettings,
    signals: StopSignals,
    scratch: Path,
    *,
    root: Path,
    resumed: Path | None,
    timeout_s: float,
) -> int:
    """As `common.launch.ray.train_on_ray`, in a process that is connected to the cluster. scratch: a folder for Ray's own files."""
    relay = _Relay(resumed)
    before = () if resumed is None else _checkpoints(resumed)
    check_room(launch)
    print(f"launch: {_words(launch)} on {launch.address or 'a cluster of this machine'}", flush=True)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    with _marker(root) as marker:
        for failures in range(launch.max_failures + 1):
            again = () if failures == 0 else _going_on(relay, before)
            if signals.received:
                return signals.exit_code
            mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
            order = Order(main, (*argv, *again), Path.cwd(), _environment(), launch.resources_per_worker.CPU, marker, mailbox)
            try:
                attempt = _run(launch, order, scratch, relay, signals, timeout_s)
            except RayError as error:
                raise UserError(f"the Ray cluster was lost ({_line(error)}); --resume goes on from the last checkpoint") from error
            if attempt.lost is None or signals.received:
                break
            if failures < launch.max_failures:
                print(f"note: {attempt.lost}; starting again ({failures + 1} of {launch.max_failures} times)", flush=True)
    if attempt.error is not None:
        raise attempt.error
    if attempt.problems:
        raise UserError(*attempt.problems)
    if attempt.lost is not None and signals.received:
        print(f"{attempt.lost} before it stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return signals.exit_code
    if attempt.lost is not None:
        raise UserError(f"{attempt.lost}; --resume goes on from the last checkpoint (launch.max_failures lets Ray do it)")
    return attempt.code


def _run(launch: LaunchSettings, order: Order, scratch: Path, relay: _Relay, signals: StopSignals, timeout_s: float) -> _Attempt:
    """Start the workers once, and relay words and signals until all of them have ended."""
    resources = launch.resources_per_worker
    trainer = _Trainer(
        work,
        train_loop_config={"order": order},
        torch_config=MeetingConfig(timeout_s=round(timeout_s), gpu=resources.GPU > 0),
        scaling_config=ScalingConfig(
            num_workers=launch.num_training_workers, use_gpu=resources.GPU > 0, resources_per_worker=resources.model_dump()
        ),
        # A name of its own: Ray would silently go on with an earlier run of the same one.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(scratch / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    ended: list[_Attempt] = []
    thread = threading.Thread(target=lambda: ended.append(_outcome(trainer, launch)), daemon=True)
    thread.start()
    waiting, told = order.mailbox.receive.remote(), False
    while thread.is_alive():
        if signals.received and not told:
            order.mailbox.stop.remote(int(signals.received))
            told = True
        waiting = _relay_what_came(order.mailbox, waiting, relay, _LOOK_EVERY_S)
    while (later := _relay_what_came(order.mailbox, waiting, relay, _LOOK_EVERY_S)) is not waiting:
        waiting = later
    return ended[0]


def _relay_what_came(mailbox: Any, waiting: Any, relay: _Relay, timeout_s: float) -> Any:
    """Hand on what comes in time; returns what to wait for next, the same as before where nothing came."""
    done, _ = ray.wait([waiting], timeout=timeout_s)
    if not done:
        return waiting
    for kind, text in ray.get(waiting):
        relay.take(kind, text)
    return mailbox.receive.remote()


def _outcome(trainer: TorchTrainer, launch: LaunchSettings) -> _Attempt:
    try:
        return _Attempt(code=trainer.fit().return_value)
    except ControllerError as error:
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return _Attempt(problems=(f"launch: the cluster had no room for {_words(launch)} in time; {_ROOM_LATER}",))
        return _Attempt(lost=f"the workers could not be started ({_line(error.controller_failure)})")
    except WorkerGroupError as error:
        failures = {
            rank: failure._base_exc if isinstance(failure, UserExceptionWithTraceback) else failure
            for rank, failure in sorted(error.worker_failures.items())
        }
        refused = [failure for failure in failures.values() if isinstance(failure, WorkerFailed) and not failure.lost]
        problems = [problem for failure in refused for problem in failure.problems]
        if problems:
            return _Attempt(problems=tuple(dict.fromkeys(problems)))
        gone = (RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
        bugs = [rank for rank, failure in failures.items() if not isinstance(failure, (WorkerFailed, *gone))]
        if bugs:
            return _Attempt(error=RuntimeError(f"worker {bugs[0]}:\n{error.worker_failures[bugs[0]]}"))
        dead = [rank for rank, failure in failures.items() if isinstance(failure, gone)]
        rank = (dead or list(failures))[0]
        why = " (its machine was low on memory)" if "low on memory" in str(error.worker_failures[rank]) else ""
        return _Attempt(lost=f"worker {rank} of {launch.num_training_workers} was lost{why}")
    except TrainingFailedError as error:
        return _Attempt(lost=f"the workers were lost ({_line(error)})")
    except RayActorError:
        with contextlib.suppress(RayError):
            _free_places()
        return _Attempt(lost="the process that watches the workers was lost")
    except BaseException as error:
        return _Attempt(error=error)


def _free_places() -> None:
    """Give back the places of workers whose controller is gone, and end them: Ray does so only when this process ends, too."""
    job = ray.get_runtime_context().get_job_id()
    for number, place in placement_group_table().items():
        if number.endswith(job) and place["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _checkpoints(run_dir: Path) -> tuple[Path, ...]:
    return tuple(checkpoints_in(run_dir / CHECKPOINTS_FOLDER))


def _going_on(relay: _Relay, before: Sequence[Path]) -> Sequence[str]:
    """What the command line of a new start has more; a run that has no checkpoint yet starts anew, in the same place.

    before: the checkpoints when a resumed run was to go on. While it has these, it still goes on from the one that was asked for, which
    may be an earlier one.
    """
    run_dir = relay.run_dir
    if run_dir is None:
        return ()
    until = time.monotonic() + _UNLOCK_TIMEOUT_S
    while True:  # workers that are still ending may hold it
        try:
            refuse_locked(run_dir)
            break
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(_LOOK_EVERY_S)
    if found := _checkpoints(run_dir):
        return () if found == tuple(before) else ("--resume", str(run_dir))
    shutil.rmtree(run_dir, ignore_errors=True)
    return ()


def check_room(launch: LaunchSettings) -> None:
    """Raise UserError where the machines of the cluster have not what all workers need, even if nothing else used them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {name: amount for name, amount in launch.resources_per_worker.model_dump().items() if amount}
    places = sum(min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes)
    wanted = launch.num_training_workers or 1
    if places < wanted:
        machines = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU") if node.get(name)) for node in nodes)
        raise UserError(f"launch.num_training_workers: got {wanted}, but the cluster has room for {places} of {_each(launch)} ({machines})")


def _words(launch: LaunchSettings) -> str:
    count = launch.num_training_workers
    return f"{count} worker{'s' if count != 1 else ''} of {_each(launch)}"


def _each(launch: LaunchSettings) -> str:
    resources: WorkerResources = launch.resources_per_worker
    return f"{resources.CPU} CPU" + (f" and {resources.GPU} GPU" if resources.GPU else "")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name) and not _SECRET.search(name)}


@contextlib.contextmanager
def _marker(root: Path) -> Iterator[Path]:
    """A file in the folder of runs, by which workers tell that they see the same folder."""
    path = root / f"{_MARKER}{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = hold(path)
        for left in root.glob(f"{_MARKER}*"):
            remove_if_left(left, left, Path.unlink)
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror}; choose another folder (launch.storage_path)") from None
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        release(held)
