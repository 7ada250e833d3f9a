"""`--validate` of both kinds refuses what training would fail on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from reward_model.classification import train_reward as train_pairs
from reward_model.regression import train_reward as train_scores

MAINS: dict[str, Any] = {"pair": train_pairs.main, "score": train_scores.main}


@pytest.mark.parametrize("kind", MAINS)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_init.config.num_head=4", "did you mean num_heads"),
        ("model_init.model_type=gpt9", "got gpt9"),
        ("model_init.config.max_position_embeddings=32", "data.max_length 64 exceeds the 32 positions"),
        ("data.max_length=5", "expected at least 7"),
        ("model_params.model_dtype=bfloat16", "small updates of the weights are lost to rounding"),
    ],
)
def test_a_model_that_cannot_be_built_is_not_valid(kind: str, override: str, message: str, write_config, tmp_path: Path) -> None:
    arguments = ["--config_file", str(write_config(kind)), "--validate"]
    assert MAINS[kind](arguments) == 0
    with pytest.raises(UserError, match=message):
        MAINS[kind]([*arguments, override])
    assert not (tmp_path / "models").exists()


def test_both_kinds_take_the_key_that_chooses_the_loss_of_scores(write_config, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, main in MAINS.items():
        assert main(["--config_file", str(write_config(kind)), "--validate", "model_params.mae_loss=false"]) == 0
        assert ("mae_loss is obsolete and has no effect" in capsys.readouterr().out) == (kind == "pair")


@pytest.mark.parametrize("limit", [63, 64])
def test_a_limit_of_prompts_beyond_that_of_the_whole_text_is_said_to_do_nothing(
    limit: int, write_config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_pairs.main(["--config_file", str(write_config("pair")), "--validate", f"data.max_prompt_length={limit}"]) == 0
    assert ("data.max_prompt_length 64 has no effect: data.max_length 64 limits" in capsys.readouterr().out) == (limit == 64)


@pytest.mark.parametrize("kind", MAINS)
def test_a_taken_index_is_refused_under_the_results_root_too(
    kind: str, write_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"pair": "reward_classification", "score": "reward_regression"}[kind]
    monkeypatch.setenv("RESULTS_ROOT_DIR", str(tmp_path / "results"))
    (tmp_path / "results" / stage / "desc-mine,index-1").mkdir(parents=True)
    arguments = ["--config_file", str(write_config(kind)), "--validate", "desc=mine"]
    assert MAINS[kind]([*arguments, "index=2"]) == MAINS[kind]([*arguments, "index=auto"]) == 0
    with pytest.raises(UserError, match=f"{stage}/desc-mine,index-1 exists already; the next free index is 2"):
        MAINS[kind]([*arguments, "index=1"])
