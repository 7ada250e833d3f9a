"""Losses, gradients and weights that are not finite, memory that runs out, answers with nothing in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlhf.ppo.trainer
import rlhf.ppo.update
from common.tracking import read_metrics
from tests.faults.runs import (
    INTERVAL,
    MAINS,
    Models,
    Undisturbed,
    at_point,
    goes_on,
    in_step,
    kill_itself,
    left_by,
    run,
    run_dir,
    steps_there,
    write_config,
)

Whole = Callable[[str], Undisturbed]


def breaking(stage: str, what: str, step: int) -> Callable[[], None]:
    """A `prepare`: in the training step after `step` of them, the loss or a gradient is not finite."""

    def spoilt(loss: torch.Tensor) -> torch.Tensor:
        if what == "loss":
            return loss * math.inf
        zero = loss * 0.0
        return loss + zero.sqrt()  # 0, with the gradient infinity times 0

    def prepare() -> None:
        now = {"step": -1}
        if stage == "ppo":
            run_update, policy_loss = rlhf.ppo.update.Update.run, rlhf.ppo.update.policy_loss

            def counted(update: Any) -> Any:
                now["step"] = update.step
                return run_update(update)

            def broken(*arguments: Any, **options: Any) -> Any:
                loss, clipped = policy_loss(*arguments, **options)
                return (spoilt(loss) if now["step"] == step else loss), clipped

            rlhf.ppo.update.Update.run = counted  # type: ignore[method-assign]
            rlhf.ppo.update.policy_loss = broken
            return
        from tests.faults.runs import _IN_STEP

        owner = _IN_STEP[stage][0]
        original = owner.training_step  # type: ignore[attr-defined]

        def training_step(module: Any, *arguments: Any) -> Any:
            loss = original(module, *arguments)
            return spoilt(loss) if module.trainer.global_step == step else loss

        owner.training_step = training_step  # type: ignore[attr-defined]

    return prepare


@pytest.mark.parametrize(
    ("stage", "what"), [("sft", "loss"), ("regression", "gradient"), ("classification", "loss"), ("ppo", "gradient"), ("ppo", "loss")]
)
def test_it_stops_before_the_optimizers_step(tmp_path: Path, models: Models, whole: Whole, stage: str, what: str) -> None:
    config = write_config(stage, tmp_path, models)
    outcome = run(stage, config, prepare=breaking(stage, what, 3))
    assert outcome.code == 2, outcome
    [problem] = outcome.problems
    assert "finite" in problem and what in problem and "row" in problem and problem.startswith(("step 4: ", "PPO step 3: "))
    assert INTERVAL <= steps_there(config)[-1] < 4
    goes_on(stage, config, whole(stage).left)


@pytest.mark.parametrize(("stage", "what"), [("sft", "loss"), ("classification", "gradient"), ("ppo", "loss")])
def test_such_steps_are_left_out_and_counted_exactly_when_resumed_too(tmp_path: Path, models: Models, stage: str, what: str) -> None:
    undisturbed = write_config(stage, tmp_path / "whole", models, on_nan="skip")
    prepare = breaking(stage, what, 3)
    assert run(stage, undisturbed, prepare=prepare).code == 0
    lines = [line for line in read_metrics(run_dir(undisturbed)) if "train/epoch" in line]
    counted = {line["step"]: line["ppo/not_finite_minibatches" if stage == "ppo" else "train/skipped_steps"] for line in lines}
    assert counted == ({step: float(step == 4) for step in range(1, 7)} if stage == "ppo" else {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1})

    config = write_config(stage, tmp_path / "killed", models, on_nan="skip")
    kill = at_point("links moved", 2, kill_itself)
    assert run(stage, config, prepare=lambda: (prepare(), kill())).code == -9
    assert run(stage, config, "--resume", prepare=breaking(stage, what, 3)).code == 0
    assert left_by(config) == left_by(undisturbed)


def test_a_step_that_is_left_out_changes_no_weight(tmp_path: Path, models: Models) -> None:
    config = write_config(
        "sft", tmp_path, models, on_nan="skip", trainer__checkpoint__every_n_train_steps=1, trainer__checkpoint__keep_last=9
    )
    assert run("sft", config, prepare=breaking("sft", "gradient", 3)).code == 0
    weights = [load_file(run_dir(config) / f"checkpoints/step-00000{step}/model.safetensors") for step in (3, 4, 5)]
    same = [all(torch.equal(before[name], after[name]) for name in before) for before, after in pairwise(weights)]
    assert same == [True, False]


@pytest.mark.parametrize("stage", ["regression", "ppo"])
def test_weights_that_are_not_finite_push_out_no_good_ones(tmp_path: Path, models: Models, whole: Whole, stage: str) -> None:
    def prepare() -> None:
        steps, original = 0, torch.optim.AdamW.step

        def step(optimizer: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal steps
            result = original(optimizer, *arguments, **options)
            steps += 1
            if steps == 4:
                optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
            return result

        torch.optim.AdamW.step = step  # type: ignore[assignment]

    keep = "save_config__keep_last" if stage == "ppo" else "trainer__checkpoint__keep_last"
    config = write_config(stage, tmp_path, models, **{keep: 1})
    outcome = run(stage, config, prepare=prepare)
    assert outcome.code == 2 and "weights are not finite" in outcome.problems[0], outcome
    assert "they are not saved" in outcome.problems[0] and steps_there(config)[-1] < 4
    config = write_config(stage, tmp_path, models)
    goes_on(stage, config, whole(stage).left)


OUT_OF_MEMORY = {
    "sft": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
    "classification": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"),
    "regression": MemoryError(),
    "ppo": RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate …"),
}


@pytest.mark.parametrize("stage", MAINS)
def test_out_of_memory_names_the_settings_to_lower(tmp_path: Path, models: Models, whole: Whole, stage: str) -> None:
    def fail() -> None:
        raise OUT_OF_MEMORY[stage]

    config = write_config(stage, tmp_path, models)
    outcome = run(stage, config, prepare=in_step(stage, 3, fail))
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    [problem] = outcome.problems
    names = ("ppo_config.mini_batch_size", "generation_config.max_new_tokens") if stage == "ppo" else ("data.batch_size", "data.max_length")
    assert problem.startswith("out of memory") and all(name in problem for name in names)
    goes_on(stage, config, whole(stage).left)


@pytest.mark.parametrize("shape", ["one is empty", "all are empty", "all are cut"])
def test_answers_of_no_token_and_answers_that_were_cut_have_finite_losses_and_are_counted(
    tmp_path: Path, models: Models, shape: str
) -> None:
    def prepare() -> None:
        original = rlhf.ppo.trainer.collect_rollout

        def collect(*arguments: Any, **options: Any) -> Any:
            rollout = original(*arguments, **options)
            if options.get("step", 0) not in (2, 3):
                return rollout
            empty = [shape == "all are empty" or (shape == "one is empty" and row == 0) for row in range(len(rollout))]
            kept = torch.tensor([0 if gone else len(ids) for gone, ids in zip(empty, rollout.responses, strict=True)])
            mask = torch.arange(max(1, int(kept.max()))) < kept[:, None]
            return dataclasses.replace(
                rollout,
                responses=[ids[:count] for ids, count in zip(rollout.responses, kept.tolist(), strict=True)],
                texts=["" if gone else text for gone, text in zip(empty, rollout.texts, strict=True)],
                logprobs=rollout.logprobs[:, : mask.shape[1]] * mask,
                values=None if rollout.values is None else rollout.values[:, : mask.shape[1]] * mask,
            )

        rlhf.ppo.trainer.collect_rollout = collect

    cut = {"generation_config__min_length": 4} if shape == "all are cut" else {}
    config = write_config("ppo", tmp_path, models, ppo_config__steps=4, **cut)
    outcome = run("ppo", config, prepare=prepare)
    assert outcome.code == 0, outcome
    lines = {line["step"]: line for line in read_metrics(run_dir(config)) if "objective/kl" in line}
    assert all(isinstance(value, int | float) and math.isfinite(value) for line in lines.values() for value in line.values())
    assert [line["ppo/empty_minibatches"] for line in lines.values()] == [0, *[float(shape == "all are empty")] * 2, 0]
    if shape == "all are cut":
        assert [line["train/eos_rate"] for line in lines.values()] == [0.0] * 4
    if shape == "all are empty":
        assert lines[2]["tokens/responses_len_mean"] == 0.0
