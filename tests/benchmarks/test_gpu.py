"""The benchmark for GPUs says that it needs one; its tables are made here on the CPU, where their figures mean nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import decode_lines, generate, main, phase_lines
from benchmarks.ppo import parse
from benchmarks.synthetic import EOS, SIZES, build_policy, gpt_neo_config, vocabulary

CPU = torch.device("cpu")
TINY = ["--size", "xs", "--batch", "4", "--minibatch", "2", "--epochs", "2", "--new-tokens", "5", "--iters", "1", "--warmup", "0", "--bf16"]


def test_without_a_gpu_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"\Abenchmarks/gpu.py: there is no CUDA GPU here\Z"):
        main([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trainer would take the GPU")
def test_tables_have_a_line_for_each_phase_and_each_way_to_decode() -> None:
    options = parse([*TINY, "--threads", str(torch.get_num_threads())])
    phases = phase_lines(options, CPU, 1)
    assert [line.split()[1] for line in phases[3:]] == ["generate", "score", "train", "total"]
    ways = decode_lines(options, CPU, 1)
    assert [line.split(" | ")[0] for line in ways[2:]] == ["| generate", "| one launch per kernel", "| one CUDA graph per token"]
    assert ways[2].split(" | ")[2] == "1.00"
    assert {line.count("|") for line in phases[1:]} == {7} and {line.count("|") for line in ways} == {5}


def test_tokens_of_generate_end_with_eos() -> None:
    model = build_policy("xs", eos_hazard=0.5).eval()
    drawn: list[torch.Tensor] = []
    plain = model.generate
    model.generate = lambda *inputs, **options: drawn.append(plain(*inputs, **options)) or drawn[-1]
    counted = generate(model, [[5, 6, 7], [8]], 8, CPU)
    answers = [row[3:] for row in drawn[0].tolist()]
    assert counted == sum(row.index(EOS) + 1 if EOS in row else len(row) for row in answers)
    assert counted < sum(map(len, answers)) or len(answers[0]) == 1


@pytest.mark.parametrize(("size", "millions"), [("125m", 124), ("1b", 1010)])
def test_sizes_are_what_they_are_called(size: str, millions: int) -> None:
    hidden, layers, _ = SIZES[size]
    assert gpt_neo_config(size).vocab_size == vocabulary(size)
    assert round((12 * hidden**2 * layers + (vocabulary(size) + 512) * hidden) / 1e6) == pytest.approx(millions, abs=1)
