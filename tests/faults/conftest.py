"""One undisturbed training per stage, made once, to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.checkpoint import new_manifest, save_model_directory
from common.models.load import build_generator, train_tokenizer
from common.models.reward import RewardModel
from common.schema import ModelInit
from tests.faults.runs import Models, Undisturbed, left_by, run, write_config

SIZE = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "window_size": 8, "max_position_embeddings": 64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["Question: What is 1 and 2?\nAnswer: It is 3."], 270)
    policy = build_generator(ModelInit(config=SIZE), tokenizer, 64, 1)
    judge = RewardModel.from_backbone(build_generator(ModelInit(config=SIZE), tokenizer, 64, 2).transformer, seed=3)
    save_model_directory(folder / "policy", policy, tokenizer, new_manifest("sft", tokenizer, max_length=64))
    manifest = new_manifest("reward_classification", tokenizer, max_length=64, score_mean=0.0, score_scale=1.0)
    save_model_directory(folder / "reward", judge, tokenizer, manifest)
    return Models(folder / "policy", folder / "reward")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Callable[[str], Undisturbed]:
    """`whole(stage)`: what a run of `write_config(stage, …)` leaves that nothing disturbs."""
    made: dict[str, Undisturbed] = {}

    def of(stage: str) -> Undisturbed:
        if stage not in made:
            config = write_config(stage, tmp_path_factory.mktemp("whole") / stage, models)
            began = time.monotonic()
            outcome = run(stage, config)
            assert outcome.code == 0, outcome
            made[stage] = Undisturbed(left_by(config), time.monotonic() - began)
        return made[stage]

    return of
