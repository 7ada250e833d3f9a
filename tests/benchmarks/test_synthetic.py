"""What the PPO benchmarks run on: the shared benchmark's weights, prompts and lengths, and phases that add up."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.synthetic import (
    EOS,
    VOCABULARY,
    CpuLog,
    build_judge,
    build_policy,
    build_prompts,
    build_tokenizer,
    phase_seconds,
    result,
)


@pytest.fixture
def bench_common(shared: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module from which the other contenders take models and prompts."""
    folder = shared / "bench"
    if not folder.is_dir():
        pytest.skip("no shared benchmarks")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "bench_common", raising=False)
    import bench_common

    return bench_common  # type: ignore[no-any-return]


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("hazard", [0.0, 0.04])
def test_policy_and_judge_have_the_weights_of_the_shared_benchmark(bench_common: ModuleType, hazard: float) -> None:
    theirs = bench_common.build_policy("xs", eos_hazard=hazard)
    ours = build_policy("xs", eos_hazard=hazard)
    assert same_weights(ours, theirs)
    assert not same_weights(ours, build_policy("xs", seed=1, eos_hazard=hazard))
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert same_weights(build_judge("xs"), bench_common.build_reward("xs"))


def test_prompts_are_those_of_the_shared_benchmark(bench_common: ModuleType) -> None:
    assert build_prompts(40) == bench_common.make_prompts(40)
    assert build_prompts(5, seed=3, shortest=4, longest=30) == bench_common.make_prompts(5, 3, 4, 30)


def test_a_result_has_the_form_of_the_shared_benchmark(bench_common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with CpuLog() as cpu:
        now = time.perf_counter()
        figures = phase_seconds((now - 4, now - 3, now - 2, now), cpu, 7)
    clock = bench_common.Clock()
    for phase in ("generate", "score", "train"):
        clock.lap(phase)
    theirs_of_one = {**dict.fromkeys(clock.d, 1.0), "resp_tokens": 7.0}
    options = bench_common.ppo_args("").parse_args(["--warmup", "0"])
    bench_common.report("x", options, [theirs_of_one], {"params": 1})
    theirs = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    ours = result("x", "s", 64, [figures], params=1)
    assert ours.keys() == theirs.keys()
    assert ours["median"].keys() == theirs["median"].keys() and ours["iters"][0].keys() == theirs["iters"][0].keys()
    assert ours["versions"] == theirs["versions"]
    assert 100 < ours["peak_rss_mb"] == pytest.approx(theirs["peak_rss_mb"], abs=20)


def test_eos_comes_with_the_probability_asked_for() -> None:
    model = build_policy("xs", eos_hazard=0.1).eval()
    with torch.no_grad():
        logits = model(torch.tensor(build_prompts(4, shortest=32, longest=32))).logits
    assert 0.08 < logits.softmax(-1)[..., EOS].mean() < 0.12


def test_the_tokenizer_has_a_word_for_each_id() -> None:
    tokenizer = build_tokenizer()
    ids = [3, 17, VOCABULARY - 1]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.eos_token_id == EOS and len(tokenizer) == VOCABULARY


def test_cpu_seconds_are_read_between_the_readings_and_at_their_ends() -> None:
    cpu = CpuLog()
    cpu._readings = [(0.0, 1.0), (1.0, 1.0), (3.0, 4.0)]
    assert [cpu.at(moment) for moment in (-1.0, 0.5, 1.0, 2.0, 3.0)] == [1.0, 1.0, 1.0, 2.5, 4.0]


def test_cpu_log_tells_work_from_waiting() -> None:
    with CpuLog(interval=0.005) as cpu:
        begun = time.perf_counter()
        while time.process_time() - cpu._readings[0][1] < 0.1:
            sum(range(1000))
        worked = time.perf_counter()
        time.sleep(0.1)
        ended = time.perf_counter()
    assert cpu.at(worked) - cpu.at(begun) > 0.08
    assert cpu.at(ended) - cpu.at(worked) < 0.05


def test_phases_add_up_to_the_total() -> None:
    cpu = CpuLog()
    cpu._readings = [(0.0, 0.0), (10.0, 20.0)]
    assert phase_seconds((1.0, 2.0, 4.0, 8.0), cpu, 5) == {
        "generate": 1.0, "cpu_generate": 2.0, "score": 2.0, "cpu_score": 4.0, "train": 4.0, "cpu_train": 8.0,
        "total": 7.0, "cpu_total": 14.0, "resp_tokens": 5.0,
    }  # fmt: skip
