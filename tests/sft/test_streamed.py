"""SFT on rows that stay in their file is SFT on rows in memory, to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common import json_stream, parallel, records
from common.errors import UserError
from common.token_rows import TokenCache
from common.tracking import read_metrics
from sft.module import SFTModule
from sft.train_sft import main
from tests.processes import as_launched

ROWS = [{"Question": f"What is {a} and {b}?", "Answer": f"It is {a + b}{', friend' * (b % 4)}."} for a in range(6) for b in range(7)]
ODD = [{"Question": "x", "Answer": " "}, {"Question": "long " * 30, "Answer": "yes"}, {"Question": "<|endoftext|>", "Answer": "no"}]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(json_stream, "STRETCH_BYTES", 500)
    monkeypatch.setattr(parallel, "STRETCH", 7)
    monkeypatch.setattr(parallel, "cores", lambda **_: 1)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:20], *ODD, *ROWS[20:]]))
    settings: dict[str, Any] = {
        "data": {"data_dir": str(tmp_path / "data.jsonl"), "batch_size": 4, "max_length": 40, "unusable_rows": "drop"},
        "model_init": {
            "model_type": "gpt_neo",
            "vocab_size": 280,
            "config": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 8},
        },
        "model_params": {"learning_rate": 1e-2},
        "evaluation": {"num_generated": 2, "generate_params": {"max_new_tokens": 4}},
        "trainer": {
            "checkpoint": {"dirpath": str(tmp_path / "models")},
            "params": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "num_sanity_val_steps": 0,
                "accumulate_grad_batches": 2,
                "log_every_n_steps": 1,
            },
        },
        "wandb": {"mode": "disabled"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def stream(monkeypatch: pytest.MonkeyPatch, yes: bool = True) -> None:
    monkeypatch.setattr(records, "STREAMED_BYTES", 0 if yes else 2**30)


def run(config: Path, desc: str, *overrides: str) -> dict[str, Any]:
    """What a run logged, said of its data and learnt."""
    assert main(["--config_file", str(config), f"desc={desc}", *overrides]) == 0
    directory = config.parent / "models" / f"desc-{desc},index-0"
    notes = [line for line in (directory / "log.txt").read_text().splitlines() if line.startswith("note: ")]
    lines = [{name: value for name, value in line.items() if not name.startswith(("perf/", "time"))} for line in read_metrics(directory)]
    return {
        "figures": lines,
        "notes": [note for note in notes if "/token_cache/" not in note],
        "weights": load_file(directory / "best" / "model.safetensors"),
        "fingerprint": json.loads((directory / "best" / "manifest.json").read_text())["data_fingerprint"],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = one["weights"].keys() == other["weights"].keys() and all(
        torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"]
    )
    return weights and all(one[name] == other[name] for name in ("figures", "fingerprint"))


@pytest.mark.parametrize(
    "overrides", [["model_params.do_compute_metrics=true"], ["data.batching=bucketed", "data.num_workers=1"], ["data.batching=packed"]]
)
def test_figures_weights_and_notes_are_those_of_rows_in_memory(config: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    stream(monkeypatch, False)
    memory = run(config, "memory", *overrides)
    stream(monkeypatch)
    streamed = run(config, "streamed", *overrides)
    assert same(memory, streamed) and memory["notes"] == streamed["notes"]
    assert any("1 of 45 rows dropped as unusable" in note for note in memory["notes"])
    assert any("prompts cut" in note for note in memory["notes"]) and len(memory["figures"]) > 5
    assert len(list((config.parent / "models" / "token_cache").glob("*/manifest.json"))) == 2


def test_a_run_goes_on_from_ids_that_are_there_or_made_anew(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(monkeypatch)
    whole = run(config, "whole")
    for desc in ("kept", "removed"):
        with monkeypatch.context() as stopping:
            step = SFTModule.training_step

            def stop_at_five(self: SFTModule, batch: dict[str, Any], batch_idx: int, step: Any = step) -> Any:
                if self.trainer.global_step == 5:
                    signal.raise_signal(signal.SIGTERM)
                return step(self, batch, batch_idx)

            stopping.setattr(SFTModule, "training_step", stop_at_five)
            with pytest.raises(SystemExit):
                main(["--config_file", str(config), f"desc={desc}"])
        if desc == "removed":
            for file in (config.parent / "models" / "token_cache").glob("*/*"):
                file.unlink()
        assert same(whole, run(config, desc, "--resume"))


def test_processes_that_train_together_make_the_ids_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, write, written = [], TokenCache._write, config.parent / "written"

    def noted(*arguments: Any) -> None:
        with written.open("a") as file:
            file.write(f"{arguments[5]}\n")
        write(*arguments)

    monkeypatch.setattr(TokenCache, "_write", noted)
    for desc in ("memory", "streamed"):
        stream(monkeypatch, desc == "streamed")
        codes, printed = as_launched(main, [f"--config_file={config}", "data.batch_size=2", f"desc={desc}"], config.parent / desc)
        assert codes == [0, 0], printed
        found.append(load_file(config.parent / "models" / f"desc-{desc},index-0" / "last" / "model.safetensors"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert written.read_text() == "train\nval\n"


def test_errors_name_the_rows_that_they_name_in_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for yes in (False, True):
        stream(monkeypatch, yes)
        with pytest.raises(UserError) as raised:
            main(["--config_file", str(config), "data.truncate_prompt=false", "data.unusable_rows=drop"])
        told.append(raised.value.problems)
    assert told[0] == told[1] and "train row 22: got prompt and answer of" in told[0][0]
    assert not list((config.parent / "models" / "token_cache").glob("*/"))  # nothing half made stays


def test_validating_and_measuring_write_nothing(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for yes in (False, True):
        stream(monkeypatch, yes)
        for how in ("--validate", "--dry_run"):
            assert main(["--config_file", str(config), how]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "token_cache" not in line]
        said.append([line for line in lines if not line.startswith(("measured", "time", "memory", "disk"))])
    assert said[0] == said[1]
    assert [path.name for path in config.parent.iterdir()] == ["data.jsonl", "config.yaml"]
