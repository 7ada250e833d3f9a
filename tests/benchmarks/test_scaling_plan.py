"""The plan for scale counts what its words say: hand-worked products, bytes, collectives and memory, and the document shows its tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ppo import parse
from benchmarks.roofline import count_work
from benchmarks.scaling_check import CPU_SIZES, FITTED, MEASURED, cpu_seconds
from benchmarks.scaling_model import (
    ADAM_TRAFFIC,
    Device,
    Run,
    Transformer,
    behind,
    ddp,
    decode,
    forwards,
    fsdp,
    fsdp_here,
    hybrid,
    scoring_memory,
    split,
    training_state,
    update,
    update_memory,
)
from benchmarks.scaling_plan import DOCUMENT, H100, POLICIES, RUN, figure, judge_of, main, regenerate

ROOT = Path(__file__).resolve().parents[2]
TINY = Transformer("tiny", hidden=4, layers=2, heads=2, kv_heads=1, feed_forward=8, vocabulary=10, tied=True)
LAYER = 2 * 4 * (4 + 2) + 2 * 4 * 8
DEVICE = Device("toy", 1000.0, 0.5, 0.5, 0.25, 100.0, 0.5, 50.0, 1e6, 0.0, launch=0.0, replay=0.0, per_node=2, link=100.0, network=10.0)
ONE = Run(answers=8, prompt=3, answer=2, longest=2, epochs=2, minibatches=2, mixed=False, rescored=False)


def of(name: str) -> Transformer:
    return next(model for model in POLICIES if model.name == name)


def test_parameters_are_those_of_the_models_named() -> None:
    assert TINY.parameters == 2 * LAYER + 4 * 10
    assert of("7B").parameters == 6_738_415_616 - 65 * 4096  # Llama 2 7B without its norms
    assert of("70B").parameters == 68_976_648_192 - 161 * 8192
    assert of("7B").cache(2) == 2 * 32 * 4096 * 2
    assert of("70B").cache(2) == 2 * 80 * 1024 * 2  # eight heads' keys and values for 64 of queries


def test_flop_of_a_forward_are_those_of_the_roofline() -> None:
    options = parse(["--size", "s", "--batch", "4", "--minibatch", "2", "--epochs", "1"])
    lengths = [(30, 20)] * 4  # shorter than the window of GPT-Neo's local layers
    work, attention = count_work(options, lengths)
    counted = sum(one.flop for one in work if one.phase == "train") + attention["train"]
    assert 3 * CPU_SIZES["s"].forward(4, 50, 20) == pytest.approx(counted)


def test_collectives_send_what_their_ring_sends() -> None:
    # In a node each member sends size * (n - 1) / n bytes over its link, twice for a sum that all get.
    assert DEVICE.gather(1000, 2) == 500 / 100
    assert DEVICE.all_reduce(1000, 2) == 2 * 500 / 100
    # Over two nodes the two GPUs of a node share what leaves it: 20 bytes/s.
    assert DEVICE.gather(1000, 4) == 750 / 20
    assert DEVICE.gather(1000, 1) == DEVICE.all_reduce(1000, 1) == 0
    # Four members in two nodes: a ring of two link steps and one network step; the sum takes a tree of one and one, there and back.
    slow = replace(DEVICE, protocols=((7.0, 0.1, 2.0, 1.0),))
    assert slow.gather(0, 4) == pytest.approx(7 + 2 * 0.1 + 2)
    assert slow.all_reduce(0, 4) == pytest.approx(7 + 2 * 0.1 + 2 * 2)
    assert replace(DEVICE, protocols=((7.0, 0, 0, 1.0), (1.0, 0, 0, 0.5))).gather(2, 2) == 1 + 1 / 50  # the quicker protocol


def test_decoding_reads_weights_once_for_all_rows_and_keys_for_each() -> None:
    steps = 1  # of two tokens the first comes from the prompts' forward
    for rows in (1, 3):
        times = decode(DEVICE, TINY, ONE, rows, rows)
        assert times["weights"] == steps * 4 * (2 * LAYER + 4 * 10) / 50
        assert times["cache"] == steps * rows * (3 + 2) * (2 * 2 * 2 * 4) / 50
    assert decode(DEVICE, TINY, ONE, 4, 2)["weights"] == 2 * decode(DEVICE, TINY, ONE, 2, 2)["weights"]
    many = replace(DEVICE, bandwidth=1e9)
    products = decode(many, TINY, ONE, 3, 3)
    assert products["weights"] == products["cache"] == 0  # products bound it
    assert products["products"] == (TINY.forward(3, 3, 1) + 3 * TINY.step(3 + 1)) / 500


def test_an_update_is_three_forwards_and_a_sum_of_gradients_per_optimizer_step() -> None:
    forward = TINY.forward(4, 5, 2)
    alone = update(DEVICE, TINY, ONE, 1, 4, False)
    assert alone["products"] == 4 * 3 * forward / 250
    assert alone["optimizer"] == 4 * ADAM_TRAFFIC * TINY.parameters / 50
    assert alone["network"] == alone["idle"] == 0
    assert update(DEVICE, TINY, ONE, 1, 4, True)["products"] == 4 * 4 * forward / 250
    two = update(DEVICE, TINY, ONE, 2, 2, False)
    assert two["products"] == alone["products"] / 2
    assert two["network"] == 4 * DEVICE.all_reduce(4 * TINY.parameters, 2)
    eight = update(DEVICE, TINY, ONE, 8, 1, False)  # eight GPUs for the four answers of a minibatch
    assert eight["products"] == eight["idle"] == 4 * 3 * TINY.forward(1, 5, 2) / 250 / 2


def test_adapters_need_no_gradient_of_the_weights_below_and_mixed_precision_casts_them() -> None:
    forward = TINY.forward(4, 5, 2)
    lora = update(DEVICE, TINY, ONE, 1, 4, False, trained=0.5)
    assert lora["products"] == 4 * 2 * forward / 250
    assert lora["optimizer"] == 4 * ADAM_TRAFFIC * TINY.parameters / 2 / 50
    assert update(DEVICE, TINY, ONE, 2, 2, False, shards=2)["optimizer"] == lora["optimizer"]
    mixed = replace(ONE, mixed=True)
    casts = 6 * TINY.parameters / 50  # float32 read, bfloat16 written
    assert update(DEVICE, TINY, mixed, 1, 2, False)["weights"] == pytest.approx(4 * 2 * casts)  # two forwards in each optimizer step
    assert forwards(DEVICE, TINY, mixed, 4, 2, cast=True)["weights"] == pytest.approx(casts)
    assert forwards(DEVICE, TINY, ONE, 4, 2, cast=True)["weights"] == 0


def test_weights_that_fit_nowhere_are_collected_for_every_token() -> None:
    quick = replace(DEVICE, peak=1e12, bandwidth=1e12)
    longer = replace(ONE, longest=4)
    times = decode(quick, TINY, longer, 1, 1, collected=2)
    assert times["network"] == pytest.approx(3 * quick.gather(4 * TINY.read, 2), rel=1e-6)
    policy = of("70B")
    room = replace(H100, memory=400e9)
    short, wide = (fsdp(device, policy, judge_of(policy), RUN, 64) for device in (H100, room))
    assert "copy to sample from" not in short.memory
    assert short.generate["network"] > 100 * wide.generate["network"] > 0


def test_this_projects_fsdp_collects_whole_networks_in_float32_and_decodes_kernel_by_kernel() -> None:
    policy = of("1B")
    here, plain = (layout(H100, policy, policy, RUN, 8) for layout in (fsdp_here, fsdp))
    launches = policy.layers * 511 * (75e-6 - 20e-6)
    assert here.generate["launches"] - plain.generate["launches"] == pytest.approx(launches)
    whole = policy.layers * (
        2 * H100.gather(4 * policy.parameters / policy.layers, 8) + H100.gather(2 * policy.parameters / policy.layers, 8)
    )
    assert here.score["network"] == pytest.approx(whole)
    # An update's forward of 32 texts: two collections and a sum in float32; scoring: each network by itself, the policy with casts.
    steps = 16 * 3 * 4 * policy.trunk + 2 * 4 * policy.trunk + 2 * policy.trunk + 2 * policy.parameters
    assert here.sent == pytest.approx(7 / 8 * steps)
    assert scoring_memory(policy, RUN, 1, 8, shortened=False)["copies for products"] == (4 + 2) * policy.parameters
    assert scoring_memory(policy, RUN, 1, 8)["copies for products"] == 2 * 2 * policy.layer
    assert fsdp_here(H100, of("7B"), of("7B"), RUN, 8).fits and not fsdp_here(H100, of("7B"), of("7B"), RUN, 4).fits


def test_bytes_sent_are_those_of_the_collectives() -> None:
    small = of("125M")
    gradients = 4 * small.parameters
    assert ddp(H100, small, small, RUN, 4).sent == 16 * 2 * gradients * 3 / 4
    # 8 GPUs: a minibatch's 32 texts in one forward, 128 answers scored in four forwards by three networks, one copy to sample from.
    sharded = fsdp(H100, small, small, RUN, 8)
    assert sharded.forward_rows == 32
    per_layer = (16 * (2 + 2 + 4) + 4 * 3 * 2) * small.trunk
    assert sharded.sent == pytest.approx(7 / 8 * (per_layer + 2 * small.parameters))
    divided = split(H100, small, small, RUN, 2)
    assert divided.sent == pytest.approx(2 * small.parameters / 2)  # one GPU trains alone and sends the other its weights
    eight = split(H100, small, small, RUN, 8)
    trainers, chunks = 8 - eight.rollout, 256 / (8 - eight.rollout) / eight.forward_rows
    trained = 16 * chunks * (2 + 2 + 4) * small.trunk * (trainers - 1) / trainers
    assert eight.sent == pytest.approx((trained * trainers + 2 * small.parameters * eight.rollout) / 8)


def test_sharded_updates_hide_their_traffic_behind_products() -> None:
    quick = replace(DEVICE, peak=1e12)
    gathers = 2 * (2 * quick.gather(4 * LAYER, 2) + quick.gather(4 * LAYER, 2))
    shown = update(quick, TINY, ONE, 2, 2, False, shards=2)["network"]
    assert shown == pytest.approx(4 * gathers, rel=1e-6)
    assert update(quick, TINY, ONE, 2, 1, False, shards=2)["network"] == pytest.approx(2 * shown, rel=1e-6)  # twice as many forwards
    assert update(replace(DEVICE, peak=1.0), TINY, ONE, 2, 2, False, shards=2)["network"] == 0
    assert forwards(quick, TINY, ONE, 1, 0, shards=2)["network"] == pytest.approx(2 * quick.gather(4 * LAYER, 2), rel=1e-6)


def test_memory_is_sixteen_bytes_per_parameter_and_what_a_layer_keeps() -> None:
    assert sum(training_state(TINY, 1).values()) == 16 * TINY.parameters
    assert sum(training_state(TINY, 8).values()) == 2 * TINY.parameters
    assert sum(training_state(TINY, 1, 0.01).values()) == pytest.approx((2 + 0.16) * TINY.parameters)
    whole = 4 * (6 * 4 + 2 * 2 + 2 * 8)
    assert TINY.kept(10, 4, False) == 10 * 2 * whole
    assert TINY.kept(10, 4, True) == 10 * (2 * 4 * 4 + whole)
    assert update_memory(TINY, ONE, 3, False, 1, 1.0, 2)["logits"] == 10 * 3 * 2 * 10


def test_plans_fit_into_their_memory_and_account_for_every_second() -> None:
    policy = of("7B")
    for layout in (ddp, fsdp, fsdp_here, hybrid, split, behind):
        plan = layout(H100, policy, judge_of(policy), RUN, 64)
        if plan.fits:
            assert sum(plan.memory.values()) <= H100.memory - H100.unusable
            assert sum(plan.step.values()) == pytest.approx(plan.seconds)
            assert all(seconds >= -1e-9 for seconds in plan.step.values())
    assert ddp(H100, policy, judge_of(policy), RUN, 64).bottleneck == "memory"
    # Lacking on 74 GB: 26 bytes per parameter, and the logits of the 32 texts that a forward before the update has.
    missing = ddp(H100, policy, judge_of(policy), RUN, 1).missing
    assert missing == pytest.approx((16 + 4 + 2 + 2 + 2) * policy.parameters + 32 * 6 * 256 * 32000 - 74e9)
    small = of("125M")
    wide = ddp(H100, small, small, RUN, 512)
    assert wide.bottleneck == "batch"
    waiting, busy = (layout(H100, policy, policy, RUN, 64) for layout in (split, behind))
    assert waiting.bottleneck == "waiting"
    assert busy.seconds < waiting.seconds
    assert ddp(H100, small, small, RUN, 1).sent == 0


def test_what_is_compared_are_the_figures_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for size, answers, tokens, *seconds in MEASURED:
        cells = " | ".join(f"{one:.2f}" for one in seconds)
        assert any(f"| {varied} | {cells} |" in results for varied in (size, answers, tokens)), (size, answers, tokens)
    assert {row[:3] for row in MEASURED} >= FITTED


def test_what_was_fitted_is_met_and_other_batches_are_foretold() -> None:
    for size, answers, tokens, *seconds in MEASURED:
        off = sum(cpu_seconds(size, answers, tokens)) / sum(seconds) - 1
        assert abs(off) < (0.06 if (size, answers, tokens) in FITTED else 0.1 if size != "xs" else 0.35)


def test_figures_have_three_digits() -> None:
    assert [figure(number) for number in (0, 0.01234, 1.234, 99.96, 1234.5)] == ["0", "0.0123", "1.23", "100", "1,230"]


def test_the_document_shows_its_tables() -> None:
    assert main(["--check"]) == 0
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count("<!-- plan:") == 9
    assert regenerate("<!-- plan:memory -->\nold\n<!-- /plan -->").count("\n| ") == 2 + len(POLICIES)


def test_one_case_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policy", "70B", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("GB short" in line and line.endswith("| memory |") for line in lines[2:])
    assert len({line.count("|") for line in lines}) == 1
    assert math.isinf(ddp(H100, of("70B"), of("7B"), RUN, 8).seconds)
