"""The benchmark of frozen lower layers measures what it says, on a model of the size that it names."""

from __future__ import annotations

import pytest

from benchmarks.lower_layers import build_model, parse


def test_the_model_is_the_one_that_is_named() -> None:
    model = build_model()
    assert model.config.num_layers == 8 and 9e6 < model.num_parameters() < 10e6
    assert parse(["--stages", "pairs"]).stages == "pairs"
    with pytest.raises(SystemExit):
        parse(["--stages", "ppo"])
