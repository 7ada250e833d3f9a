"""The `launch` section: what it accepts, where a run then lies, and that as many processes run as it asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import load_config
from common.errors import UserError
from common.launch.workers import WORKER_VARIABLE, check_launch, check_number_of_workers, idle_launch_settings, processes_to_train
from common.resume import is_free
from common.schema import LaunchSettings, Section
from reward_model.config import ClassificationConfig, RegressionConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

ROOT = Path(__file__).resolve().parents[3]
STAGES = {
    "sft": SFTConfig,
    "reward_model/classification": ClassificationConfig,
    "reward_model/regression": RegressionConfig,
    "rlhf": PPORunConfig,
}


def load(stage: str, *overrides: str) -> Any:
    schema: type[Section] = STAGES[stage]
    return load_config(schema, ROOT / stage / "configs/trainer_config.yaml", overrides)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_section(stage: str) -> None:
    assert load(stage).launch == LaunchSettings()
    resources = "launch.resources_per_worker={CPU: 32, GPU: 1}"
    launch = load(stage, "launch.engine=ray", "launch.num_training_workers=4", resources, "launch.address=head:6379").launch
    assert (launch.engine, launch.num_training_workers, launch.address, launch.max_failures) == ("ray", 4, "head:6379", 0)
    assert (launch.resources_per_worker.CPU, launch.resources_per_worker.GPU) == (32, 1)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("launch.engine=ray", "launch.num_training_workers: got null, and engine is ray; expected how many workers train"),
        ("launch.engine=slurm", "launch.engine: got 'slurm', expected local or ray"),
        ("launch.num_training_workers=0", "launch.num_training_workers: got 0, expected a whole number >= 1"),
        ("launch.resources_per_worker={CPU: 1, GPU: 2}", "launch.resources_per_worker.GPU: got 2, expected a whole number >= 0 and <= 1"),
        ("launch.resources_per_worker={cpu: 2}", "launch.resources_per_worker.cpu: unknown key"),
    ],
)
def test_what_the_section_refuses(override: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load("sft", override)
    assert problem in str(caught.value)


def test_weights_are_not_spread_over_one_worker() -> None:
    ray = ("launch.engine=ray", "trainer.params.strategy=fsdp")
    with pytest.raises(UserError, match=r"trainer\.params\.strategy: got fsdp, but launch\.num_training_workers is 1; set that to 2"):
        load("sft", *ray, "launch.num_training_workers=1")
    assert load("sft", *ray, "launch.num_training_workers=2").trainer.params["strategy"] == "fsdp"


def test_storage_path_is_the_root_of_runs(tmp_path: Path) -> None:
    config = load("sft", f"launch.storage_path={tmp_path}")
    assert config.runs_root == str(tmp_path)
    with pytest.raises(UserError, match=r"results_root is .*launch\.storage_path is .*remove one"):
        load("sft", f"launch.storage_path={tmp_path}", f"results_root={tmp_path}")


def test_a_comparison_of_readouts_runs_in_one_process() -> None:
    from reward_model.comparison_config import ComparisonConfig

    path = ROOT / "reward_model/configs/compare_readouts.yaml"
    with pytest.raises(UserError, match="launch: expected nothing here"):
        load_config(
            ComparisonConfig, path, ["launch.engine=ray", "launch.num_training_workers=2"], base_dir=Path(os.path.dirname(path.parent))
        )


def test_another_number_of_processes_than_asked_for_is_an_error() -> None:
    check_number_of_workers(LaunchSettings(), 3)
    check_number_of_workers(LaunchSettings(num_training_workers=2), 2)
    with pytest.raises(UserError, match=r"launch\.num_training_workers: got 2, but 1 process trains; start as many"):
        check_number_of_workers(LaunchSettings(num_training_workers=2), 1)


def test_how_many_will_train_is_known_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [processes_to_train(load(stage)) for stage in STAGES] == [1, 1, 1, 1]
    devices = [2, "auto", -1, [0, 1]]
    assert [processes_to_train(load("sft", f"trainer.params.devices={value}")) for value in devices] == [2, None, None, None]
    assert processes_to_train(load("reward_model/regression", "use_multi_gpu_if_available=true")) is None
    ray = load("rlhf", "launch.engine=ray", "launch.num_training_workers=3")
    assert processes_to_train(ray) == 3
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert [processes_to_train(config) for config in (load("sft"), load("rlhf"), ray)] == [4, 4, 3]


def test_settings_of_ray_are_named_where_nothing_reads_them() -> None:
    assert idle_launch_settings(LaunchSettings()) == []
    assert idle_launch_settings(LaunchSettings(engine="ray", num_training_workers=1, max_failures=3)) == []
    assert idle_launch_settings(LaunchSettings(max_failures=3, address="auto")) == [
        "launch.address, launch.max_failures: without effect, since launch.engine is local"
    ]


def problems(monkeypatch: pytest.MonkeyPatch, launch: LaunchSettings, **environment: str) -> list[str]:
    """What is wrong with a start on Ray in such an environment, and nothing else in it that Ray or a launcher would read."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        check_launch(launch)
    except UserError as error:
        return list(error.problems)
    return []


def test_what_ray_needs_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("common.launch.workers.find_spec", lambda name: name)
    own, joined = (LaunchSettings(engine="ray", num_training_workers=2, address=address) for address in (None, "head:6379"))
    (tmp_path / "token").write_text("secret")
    file = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert problems(monkeypatch, own, HOME=str(tmp_path)) == []
    assert problems(monkeypatch, joined, RAY_AUTH_TOKEN="secret") == problems(monkeypatch, joined, **file) == []
    (no_token,) = problems(monkeypatch, joined, HOME=str(tmp_path))
    assert no_token.startswith("launch.address: got head:6379, but no token to join it with")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert problems(monkeypatch, joined, HOME=str(tmp_path)) == []
    (disabled,) = problems(monkeypatch, own, RAY_AUTH_MODE="disabled")
    assert disabled.startswith("RAY_AUTH_MODE is disabled")
    (torchrun,) = problems(monkeypatch, own, RANK="0", WORLD_SIZE="2")
    assert torchrun.startswith("launch.engine: got ray, which starts its workers itself")
    (client,) = problems(monkeypatch, own.model_copy(update={"address": "ray://head:10001"}))
    assert client.startswith("launch.address: got ray://head:10001, expected HOST:PORT or auto")
    with pytest.raises(UserError, match=r"^command line: --dry_run measures without Ray; add launch\.engine=local"):
        check_launch(own, dry_run=True)
    check_launch(LaunchSettings(), dry_run=True)
    monkeypatch.setattr("common.launch.workers.find_spec", lambda name: None)
    (missing,) = problems(monkeypatch, own)
    assert missing == "launch.engine: got ray, which is not installed here; pip install -r requirements-ray.txt"
    assert problems(monkeypatch, own, **{WORKER_VARIABLE: "1", "RANK": "0", "WORLD_SIZE": "2"}) == []  # in a worker


def test_ray_is_imported_for_ray_alone() -> None:
    code = (
        "import sys, common.resume, common.launch.ray, sft.training; print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_settings_reach_ray_workers_and_secrets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
    from common.launch.ray_driver import _environment

    passed = {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": "/hub", "WANDB_MODE": "offline", "RESULTS_ROOT_DIR": "/runs"}
    kept = {
        "HF_TOKEN": "1",
        "WANDB_API_KEY": "2",
        "HF_TOKEN_PATH": "/token",
        "WANDB_PASSWORD": "3",
        "AWS_SECRET_ACCESS_KEY": "4",
        "PATH_X": "5",
    }
    for name, value in {**passed, **kept}.items():
        monkeypatch.setenv(name, value)
    environment = _environment()
    assert environment.items() >= passed.items() and not environment.keys() & kept.keys()


def test_a_run_may_go_on_under_another_engine() -> None:
    assert is_free("launch.engine") and is_free("launch.resources_per_worker.CPU")
