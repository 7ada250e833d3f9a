"""Training on the workers of a Ray cluster: what it gives, what a lost worker changes, who is let in, and what is left behind.

One cluster serves all tests here; the last one ends it as a crash would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import grpc
import psutil
import pytest
import yaml

import reward_model.regression.train_reward
import rlhf.train_ppo
from common.errors import UserError
from common.launch.ray_cluster import _checked_address
from common.launch.ray_watchdog import end, processes_of
from common.launch.signals import StopSignals
from common.schema import LaunchSettings
from common.tracking import read_metrics
from tests.processes import as_launched

pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 600.0  # for a cluster, on a machine that does much else
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 8, "max_position_embeddings": 64}


class Held:
    """The cluster that the tests share, and what the process that holds it has told."""

    def __init__(self, process: subprocess.Popen[str], told: dict[str, Any], folder: Path) -> None:
        self.process, self.told, self.folder = process, told, folder

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that joins the cluster; the last variable lets Ray take loopback for an address."""
        return {"RAY_AUTH_TOKEN_PATH": self.told["token"]["path"], "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def workers(self) -> list[psutil.Process]:
        return [process for process in psutil.Process(self.process.pid).children(recursive=True) if "RayTrainWorker" in process.name()]


def until(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `found` gives once it gives something, while a process runs."""
    latest = time.monotonic() + PATIENCE_S
    while not (result := found()):
        assert process.poll() is None and time.monotonic() < latest, "it came too late"
        time.sleep(0.02)
    return result


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    folder = tmp_path_factory.mktemp("held")
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "2", "RAY_ADDRESS": "of.another.cluster:6379"}
    process = subprocess.Popen([sys.executable, "-m", "tests.ray_holder", str(folder)], cwd=ROOT, env=environment, text=True)
    try:
        until((folder / "told.json").exists, process)
        yield Held(process, json.loads((folder / "told.json").read_text()), folder)
    finally:
        process.kill()
        process.wait()


def test_a_cluster_of_this_machine_listens_on_loopback_alone(held: Held) -> None:
    workers = [json.loads((held.folder / f"worker-{rank}.json").read_text())["listening"] for rank in range(2)]
    places = {place for found in (*held.told["listening"].values(), *workers) for place in found}
    assert all(workers) and places and {place.removeprefix("::ffff:") for place in places} == {"127.0.0.1"}


def test_its_token_is_in_a_closed_file_and_on_no_command_line(held: Held) -> None:
    assert (held.told["token"]["mode"], held.told["token"]["folder"]) == ("0o600", "0o700")
    assert held.told["showing the token"] == []
    assert len(held.told["processes"]) > 5  # which were looked at


def test_nothing_is_told_to_ray(held: Held) -> None:
    assert held.told["usage"] == []


def test_workers_know_who_they_are_and_stop_on_a_signal(held: Held) -> None:
    for rank in range(2):
        told = json.loads((held.folder / f"worker-{rank}.json").read_text())
        assert (told["sum"], told["who"]) == (3.0, [str(rank), "2", str(rank), "2"])
        assert (told["threads"], told["cwd"], told["wandb"]) == ([1, "1"], str(ROOT), "offline")
    stopped = held.told["stopped"]
    assert (stopped["code"], stopped["problems"]) == (143, [])
    assert stopped["out"] == "launch: 2 workers of 1 CPU on a cluster of this machine\nworker 0 waits\n"
    assert stopped["err"] == "worker 0 waits\n"


def test_a_cluster_without_room_is_told_before_anything_waits_for_it(held: Held) -> None:
    assert "launch.num_training_workers: got 1000, but the cluster has room for" in held.told["no room"]["problems"][0]
    assert "the cluster has room for 0 of 1000 CPU and 1 GPU" in held.told["no machine"]["problems"][0]


def outcome(failures: dict[int, Exception]) -> tuple[tuple[str, ...], str | None, BaseException | None]:
    """What the process that started three workers makes of how they failed: problems of the user's, a loss, an error of ours."""
    from common.launch import ray_driver

    error = ray_driver.WorkerGroupError("", {rank: ray_driver.UserExceptionWithTraceback(e, f"trace {e}") for rank, e in failures.items()})
    error.worker_failures |= {rank: e for rank, e in failures.items() if isinstance(e, ray_driver.RayActorError)}
    trainer = SimpleNamespace(fit=Mock(side_effect=error))
    attempt = ray_driver._outcome(trainer, LaunchSettings(engine="ray", num_training_workers=3))
    return attempt.problems, attempt.lost, attempt.error


def test_what_failed_first_is_told_apart_from_what_followed() -> None:
    from common.launch.ray_driver import RayActorError, WorkerFailed

    dead, followed, refused = (
        RayActorError(),
        WorkerFailed(["Connection closed by peer"], lost=True),
        WorkerFailed(["data: bad"], lost=False),
    )
    assert outcome({0: followed, 2: dead}) == ((), "worker 2 of 3 was lost", None)
    assert outcome({0: followed}) == ((), "worker 0 of 3 was lost", None)
    assert outcome({0: refused, 1: refused, 2: followed}) == (("data: bad",), None, None)
    problems, lost, error = outcome({0: followed, 1: KeyError("ours")})
    assert (problems, lost) == ((), None) and "worker 1:\ntrace 'ours'" in str(error)
    killed = RayActorError(error_msg="Task was killed due to the node running low on memory.")
    assert outcome({1: killed})[1] == "worker 1 of 3 was lost (its machine was low on memory)"


@pytest.mark.parametrize("saved", [True, False])
def test_after_a_loss_all_start_again_where_they_were(
    saved: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the run's checkpoint, or anew in its place; as often as they may, and not after Ray itself is gone."""
    from common.launch import ray_driver

    orders = []
    run_dir = tmp_path / "desc-run,index-0"

    def run(launch: LaunchSettings, order: Any, scratch: Path, relay: Any, *_: Any) -> Any:
        orders.append(order.argv)
        if launch.max_failures == 0:
            raise ray_driver.RayError("no answer")
        (run_dir / "checkpoints" / "step-000001" if saved else run_dir).mkdir(parents=True, exist_ok=saved)
        relay.take("run", str(run_dir))
        return ray_driver._Attempt(lost="worker 1 of 2 was lost")

    monkeypatch.setattr(ray_driver, "ray", MagicMock())
    monkeypatch.setattr(ray_driver, "check_room", lambda launch: None)
    monkeypatch.setattr(ray_driver, "NodeAffinitySchedulingStrategy", Mock())
    monkeypatch.setattr(ray_driver, "_run", run)

    def train(max_failures: int) -> None:
        launch = LaunchSettings(engine="ray", num_training_workers=2, max_failures=max_failures)
        ray_driver.train(print, ["a=1"], launch, StopSignals(), tmp_path, root=tmp_path, resumed=None, timeout_s=1)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"^worker 1 of 2 was lost; --resume goes on from the last checkpoint"):
        train(2)
    again = ("a=1", "--resume", str(run_dir)) if saved else ("a=1",)
    assert orders == [("a=1",), again, again]
    assert [line for line in capsys.readouterr().out.splitlines() if "starting again" in line] == [
        "note: worker 1 of 2 was lost; starting again (1 of 2 times)",
        "note: worker 1 of 2 was lost; starting again (2 of 2 times)",
    ]
    with pytest.raises(UserError, match=r"^the Ray cluster was lost \(no answer\); --resume goes on from the last checkpoint"):
        train(0)


def test_the_token_opens_the_cluster_and_no_other_one_does(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    address = held.told["address"]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", held.told["token"]["path"])
    assert _checked_address(address) == address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(UserError, match=f"the cluster at {address} has another token than this machine's"):
        _checked_address(address)


def test_a_cluster_that_answers_anyone_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    answer = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": answer}),))
    server.start()
    try:
        with pytest.raises(UserError, match=f"the cluster at 127.0.0.1:{port} answers anyone; start it with RAY_AUTH_MODE=token"):
            _checked_address(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    with pytest.raises(UserError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        _checked_address(f"127.0.0.1:{port}")


def figures(run_dir: Path, *names: str) -> dict[tuple[int, str], float]:
    return {(line["step"], name): value for line in read_metrics(run_dir) for name, value in line.items() if name in names}


def start(script: str, argv: Sequence[str], held: Held) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / script), *argv, "launch.engine=ray", f"launch.address={held.told['address']}"]
    return subprocess.Popen(
        [*command, "launch.num_training_workers=2"],
        cwd=ROOT,
        env=os.environ | held.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_loses_a_worker_ends_with_the_numbers_of_one_process(held: Held, tmp_path: Path) -> None:
    """Two workers, one of which is killed, against one process with batches of twice the size."""
    rows = [{"Question": f"What is {n}?", "Answer": f"good {'thing ' * (n % 4)}{n}", "Score": float(n % 5)} for n in range(90)]
    (tmp_path / "data.json").write_text(json.dumps({"train": rows[:80], "val": rows[80:]}))
    settings = {
        "desc": "lost",
        "index": 0,
        "data": {"data_dir": str(tmp_path / "data.json"), "max_length": 48, "batch_size": 2, "batching": "random"},
        "model_init": {"model_type": "gpt_neo", "vocab_size": 280, "config": NEO},
        "model_params": {"learning_rate": 1e-3, "dropout": 0.0},
        "trainer": {
            "checkpoint": {"keep_last": 100},
            "params": {"accelerator": "cpu", "max_epochs": 5, "val_check_interval": 5, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
        },
        "wandb": {"mode": "disabled"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    main, script = reward_model.regression.train_reward.main, "reward_model/regression/train_reward.py"
    argv = ["--config", str(tmp_path / "config.yaml")]

    def root(name: str) -> Path:
        return tmp_path / name / "reward_regression"

    codes, printed = as_launched(main, [*argv, f"results_root={tmp_path / 'one'}", "data.batch_size=4"], tmp_path / "printed", processes=1)
    assert codes == [0], printed

    process = start(script, [*argv, f"launch.storage_path={tmp_path / 'ray'}", "launch.max_failures=1"], held)
    run_dir = root("ray") / "desc-lost,index-0"
    until((run_dir / "checkpoints" / "step-000005").exists, process)
    held.workers()[-1].kill()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "of 2 was lost; starting again (1 of 1 times)" in out and f"going on with {run_dir} after step" in out
    assert "step 100/100" in err

    names = ("train/loss", "val/loss", "train/grad_norm")
    expected = figures(root("one") / "desc-lost,index-0", *names)
    assert len(expected) == 220
    assert figures(run_dir, *names) == pytest.approx(expected, rel=1e-5, abs=1e-5)

    # under the same name again: neither over it nor silently on with it
    again = [*argv, f"launch.storage_path={tmp_path / 'ray'}", "launch.engine=ray", "launch.num_training_workers=2"]
    with pytest.raises(UserError, match=r"desc-lost,index-0 exists already; .*--resume goes on with this one"):
        main(again)
    assert main([*again, "--resume"]) == 0  # is finished
    assert list(root("ray").glob(".ray-*")) == []


def test_ppo_in_two_workers_is_ppo_in_one_process(held: Held, tmp_path: Path) -> None:
    from common.checkpoint import new_manifest, save_model_directory
    from common.models.load import build_generator, train_tokenizer
    from common.schema import ModelInit

    prompts = [{"prompt": f"What is the {name} of {n}?"} for n in range(6) for name in ("name", "size")]
    (tmp_path / "prompts.json").write_text(json.dumps({"train": prompts[:8], "val": prompts[8:]}))
    tokenizer = train_tokenizer([row["prompt"] for row in prompts], 280)
    model = build_generator(ModelInit(model_type="gpt_neo", config=NEO), tokenizer, 64, 1)
    save_model_directory(tmp_path / "policy", model, tokenizer, new_manifest("sft", tokenizer, max_length=64))
    settings = {
        "desc": "ppo",
        "data_config": {"data_file_path": str(tmp_path / "prompts.json")},
        "generation_config": {"max_new_tokens": 6},
        "global_epochs": 10,
        "ppo_config": {"model_name": str(tmp_path / "policy"), "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "ppo_epochs": 2},
        "reward_config": {"pipeline": {"type": "length", "min_words": 4}},
        "evaluation": {"num_prompts": 4, "every_n_steps": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    argv = ["--config", str(tmp_path / "config.yaml")]
    alone = [*argv, f"results_root={tmp_path / 'one'}", "ppo_config.batch_size=4"]
    codes, printed = as_launched(rlhf.train_ppo.main, alone, tmp_path / "printed", processes=1)
    assert codes == [0], printed
    process = start("rlhf/train_ppo.py", [*argv, f"results_root={tmp_path / 'ray'}"], held)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    names = ("ppo/loss/total", "objective/kl", "eval/score", "ppo/mean_scores")
    one, two = (figures(next((tmp_path / name / "rlhf").glob("desc-*")), *names) for name in ("one", "ray"))
    assert len(one) > 5
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


def test_those_who_only_read_its_logs_are_no_part_of_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    code = "import sys, time; kept = open(sys.argv[1], sys.argv[2]); print('open', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    reader, writer = (subprocess.Popen([*command, mode], stdout=subprocess.PIPE, text=True) for mode in "ra")
    try:
        assert [process.stdout.readline() for process in (reader, writer) if process.stdout] == ["open\n"] * 2
        assert [process.pid for process in processes_of(tmp_path)] == [writer.pid]
        end(tmp_path)
        assert not psutil.pid_exists(writer.pid) and reader.poll() is None and not tmp_path.exists()
    finally:
        reader.kill()
        reader.communicate()
        writer.communicate()


def test_nothing_is_left_of_a_cluster_whose_run_is_killed(held: Held) -> None:
    left = [psutil.Process(number) for number in held.told["processes"] if psutil.pid_exists(number)]
    assert left
    held.process.send_signal(signal.SIGKILL)
    held.process.wait()
    _, alive = psutil.wait_procs(left, timeout=PATIENCE_S)
    assert alive == []
    latest = time.monotonic() + PATIENCE_S
    while Path(held.told["token"]["path"]).parent.exists() and time.monotonic() < latest:
        time.sleep(0.1)
    assert not Path(held.told["token"]["path"]).parent.exists()
