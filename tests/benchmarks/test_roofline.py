"""The FLOP that the roofline counts are those that torch counts, and its table holds what its columns say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ppo import parse
from benchmarks.roofline import attention_flop, count_work, main, phase_line, visible_pairs
from benchmarks.synthetic import build_policy


def linear_flop(work: list, phase: str) -> float:
    return sum(one.flop for one in work if one.phase == phase)


def test_visible_pairs() -> None:
    for tokens in (1, 5, 9):
        for window in (None, 1, 4, 9, 20):
            seen = sum(min(query + 1, window or tokens) for query in range(tokens))
            assert visible_pairs(tokens, window) == seen


def test_flop_of_linear_layers_are_those_that_torch_counts() -> None:
    model = build_policy("xs").eval()
    ids, answer = torch.randint(3, 100, (1, 12)), 5
    options = parse(["--size", "xs", "--batch", "1", "--minibatch", "1", "--epochs", "2"])
    work, _ = count_work(options, [(7, answer)])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.lm_head(model.transformer(ids, use_cache=False)[0][:, -answer:])
    linear = {name: flop for name, flop in forward.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")}
    one_forward = sum(linear.values())
    with FlopCounterMode(display=False) as trunk, torch.no_grad():
        model.transformer(ids, use_cache=False)
    one_trunk = sum(flop for name, flop in trunk.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm"))
    assert linear_flop(work, "score") == one_forward + one_trunk
    assert linear_flop(work, "train") == 2 * 3 * one_forward
    assert linear_flop(work, "generate") == one_forward - one_trunk / 12


def test_flop_of_attention_are_two_products_over_what_is_visible() -> None:
    hidden, tokens = 128, 70  # longer than the window of the second, local layer
    pairs = sum(query + 1 for query in range(tokens)) + sum(min(query + 1, 64) for query in range(tokens))
    assert attention_flop("xs", 0, tokens) == 2 * 2 * hidden * pairs
    assert attention_flop("xs", 0, 30) + attention_flop("xs", 30, tokens) == attention_flop("xs", 0, tokens)
    _, attention = count_work(parse(["--size", "xs", "--batch", "2", "--minibatch", "1", "--epochs", "4"]), [(60, 10), (60, 10)])
    assert attention["score"] == 2 * 2 * attention_flop("xs", 0, tokens)
    assert attention["train"] == 4 * 3 * 2 * attention_flop("xs", 0, tokens)


def test_decoding_is_as_wide_as_the_answers_that_are_still_written() -> None:
    work, _ = count_work(parse(["--size", "xs", "--batch", "4", "--minibatch", "2"]), [(5, 1), (5, 1), (5, 1), (5, 9)])
    assert {one.rows for one in work if one.phase == "generate"} == {20, 1}


def test_it_prints_a_line_for_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "xs", "--batch", "4", "--minibatch", "2", "--epochs", "1", "--new-tokens", "4", "--iters", "1", "--warmup", "0"]
    assert main([*arguments, "--threads", str(torch.get_num_threads()), "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    products = [line for line in lines if line.startswith(("| generate", "| score", "| train", "| total"))]
    assert len(products) == 15 + 4
    assert phase_line("train", 4e9, 2.0, 1.0) == "| train | 4.0 | 2.00 | 2.0 | 1.00 | 0.50 |"
    with pytest.raises(SystemExit):
        main(["--critic"])
