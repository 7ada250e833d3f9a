"""Two processes that share each batch train what one process does, and leave one run behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.tracking import read_metrics
from reward_model.classification.train_reward import main
from tests.processes import as_launched


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted((run / "last/").glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_two_processes_train_what_one_does(write_config: Any, tmp_path: Path) -> None:
    """Over an encoder whose decoder gets no gradient, with batches that do not come out even, saving between validations."""
    model_init = {"config": {"dropout_rate": 0.0}}
    config = write_config("pair", "t5", model_init=model_init, model_params={"readout": {"name": "mean_pool"}}, desc="x", index=0)
    common = [f"--config_file={config}", "trainer.params.log_every_n_steps=1", "trainer.checkpoint.every_n_train_steps=2"]
    common += ["data.val_batch_size=4", "trainer.params.val_check_interval=1", "trainer.params.enable_progress_bar=true"]
    assert main([*common, "data.batch_size=12", f"results_root={tmp_path / 'one'}"]) == 0
    halves = [*common, "data.batch_size=6", "trainer.params.devices=2", f"results_root={tmp_path / 'two'}"]
    codes, printed = as_launched(main, halves, tmp_path / "printed")
    assert codes == [0, 0], printed
    assert printed.count("output: ") == 1 and printed.count("step 1: val/loss") == 1
    assert "steps of 6 x 1 rows on each of 2 devices" in printed
    one, two = (tmp_path / name / "reward_classification/desc-x,index-0" for name in ("one", "two"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        figures = [[line[name] for line in read_metrics(run) if name in line] for run in (one, two)]
        assert len(figures[0]) == 3 and figures[0] == pytest.approx(figures[1], rel=1e-4), name


def test_devices_are_chosen_in_one_place(write_config: Any) -> None:
    arguments = ["--config_file", str(write_config("pair")), "--validate", "use_multi_gpu_if_available=true"]
    assert main(arguments) == 0
    with pytest.raises(UserError, match=r"use_multi_gpu_if_available is true, and trainer\.params\.devices is 2; remove one of them"):
        main([*arguments, "trainer.params.devices=2"])
