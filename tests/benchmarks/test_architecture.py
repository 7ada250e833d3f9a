"""The benchmark of fused parts runs, and compares what it says it compares."""

from __future__ import annotations

import pytest
import torch

from benchmarks.architecture import build, choose, main
from common.models.fused import FusedGPTNeoSelfAttention, FusedNewGELU


def test_it_runs_and_prints_a_line_for_each_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shapes", "16x2x2", "--batch", "2", "--tokens", "8", "--rounds", "1", "--threads", str(torch.get_num_threads())]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  both ") for line in lines) == 3
    assert any(line.startswith("  fused ") for line in lines)


@pytest.mark.parametrize(("variant", "gelu", "attention"), [("transformers", 0, 0), ("gelu", 2, 0), ("attention", 0, 2), ("both", 2, 2)])
def test_variants_fuse_what_their_name_says(variant: str, gelu: int, attention: int) -> None:
    model = build("16x2x2")
    choose(model, "both")
    choose(model, variant)
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(FusedNewGELU), kinds.count(FusedGPTNeoSelfAttention)) == (gelu, attention)
