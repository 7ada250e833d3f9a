"""`train_reward.py --dry_run` of both kinds: every line is there, cached states are not made, and nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # makes an empty folder among the temporary files when it is imported, and Lightning imports it

from common.errors import UserError
from reward_model.classification.train_reward import main as train_pairs
from reward_model.regression.train_reward import main as train_scores
from tests.runs import contents

KINDS = {"pair": train_pairs, "score": train_scores}
FIRST_WORDS = ["config", "data", "parameters", "models", "steps", "measured", "time", "memory", "disk"]


@pytest.fixture(autouse=True)
def everything_in_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a path of its own lands in `tmp_path`, too."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "architecture", "params"),
    [
        ("pair", "gpt_neo", {}),
        ("score", "bert", {"freeze_emb": True}),
        ("score", "gpt_neo", {"freeze_backbone": True}),
        ("pair", "gpt_neo", {"lora": {"r": 2}}),
    ],
)
def test_it_says_what_the_run_takes_and_writes_nothing(
    kind: str,
    architecture: str,
    params: dict[str, Any],
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(kind, architecture, model_params=params)
    before = contents(tmp_path)
    assert KINDS[kind](["--config_file", str(path), "--dry_run"]) == 0
    assert contents(tmp_path) == before
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith(("note:", " "))]
    cached = ["cache"] if params.get("freeze_backbone") else []
    assert [line.partition(":")[0] for line in lines] == [*FIRST_WORDS, *cached, "nothing was written; the run can start"]
    rows = {"pair": (32, 6), "score": (64, 12)}[kind]
    assert f"data: {rows[0]} train, {rows[1]} val rows" in out
    assert f"steps: {rows[0] // 8} optimizer steps of 8 x 1 rows, 1 validation\n" in out
    [frozen] = [line for line in lines if line.startswith("parameters: ")]
    assert ("and 0 are frozen" in frozen) == (not params)


def test_what_does_not_fit_or_has_no_room_ends_it(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config("score")
    with pytest.raises(UserError, match=r"data\.max_length"):
        train_scores(["--config_file", str(path), "--dry_run", "model_init.config.max_position_embeddings=32"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="checkpoints need"):
        train_scores(["--config_file", str(path), "--dry_run"])
    assert not (tmp_path / "models").exists()
