"""SFT and reward models under `strategy: deepspeed`: two processes do what one does with batches of twice the size, and go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from sft.module import SFTModule
from tests.processes import as_launched
from tests.test_processes import MAINS, check_equal, check_same_bits, stopping_the_second, weights, write_config

pytest.importorskip("deepspeed", reason="requirements-deepspeed.txt is not installed")

SPREAD = ["data.batch_size=2", "trainer.params.strategy=deepspeed"]


@pytest.mark.parametrize("stage", ["sft", "reward_classification"])
def test_a_model_that_deepspeed_spreads_trains_as_one_that_is_whole(stage: str, tmp_path: Path) -> None:
    path = write_config(stage, tmp_path)
    clipped = "trainer.params.gradient_clip_val=0.5"
    assert MAINS[stage]([f"--config={path}", "desc=one", clipped]) == 0
    codes, printed = as_launched(MAINS[stage], [f"--config={path}", clipped, *SPREAD, "desc=two"], tmp_path)
    assert codes == [0, 0], printed
    check_equal(*(tmp_path / "models" / f"desc-{name},index-0" for name in ("one", "two")))


def test_processes_of_deepspeed_that_were_stopped_go_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config("sft", tmp_path, model_params={"learning_rate": 1e-2, "dropout": 0.2, "weight_decay": 0.1})
    command = [f"--config={path}", *SPREAD, "trainer.params.accumulate_grad_batches=1"]
    assert as_launched(MAINS["sft"], [*command, "desc=whole"], tmp_path)[0] == [0, 0]
    with monkeypatch.context() as patch:
        stopping_the_second(patch)
        assert as_launched(MAINS["sft"], [*command, "desc=stopped"], tmp_path)[0] == [143, 143]
    with pytest.raises(UserError, match="--resume: 1 process now, 2 when the run began; start as many"):
        MAINS["sft"]([*command, "desc=stopped", "--resume"])
    codes, printed = as_launched(MAINS["sft"], [*command, "desc=stopped", "--resume"], tmp_path)
    assert codes == [0, 0], printed
    check_same_bits(*(tmp_path / "models" / f"desc-{name},index-0" for name in ("whole", "stopped")))


def test_a_step_that_is_left_out_changes_nothing_under_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the fifth step is not a number, and its gradient is one."""
    path = write_config("sft", tmp_path)
    original = SFTModule.training_step

    def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
        loss = original(module, batch, batch_idx)
        return loss + torch.nan if module.trainer.global_step == 4 else loss

    monkeypatch.setattr(SFTModule, "training_step", training_step)
    assert MAINS["sft"]([f"--config={path}", "desc=one", "on_nan=skip"]) == 0
    codes, printed = as_launched(MAINS["sft"], [f"--config={path}", *SPREAD, "desc=two", "on_nan=skip"], tmp_path)
    assert codes == [0, 0] and "the step is left out" in printed, printed
    one, two = (weights(tmp_path / "models" / f"desc-{name},index-0") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)
