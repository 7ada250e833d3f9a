"""Linear layers whose weights are laid out for the CPU's matrix kernels beforehand, while a model only reads.

oneDNN wants weights in blocks of its own. Plain calls bring them there every time, or leave it to a slower library; passes without
gradients (sampling, reference, judges) can do it once for many calls. Results differ from plain ones by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu


class PrepackedLinear(nn.Linear):
    """A linear layer that computes with its prepacked weights where no gradient is asked for."""

    prepacked: Any

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _product(input, self.prepacked, self.bias) if self._applies(input) else super().forward(input)

    def then_gelu(self, input: Tensor) -> Tensor:
        """tanh-GELU of (..., out), from the same kernel as the product where that can be."""
        if self._applies(input):
            return _product(input, self.prepacked, self.bias, "gelu", "tanh")
        return gelu(super().forward(input), approximate="tanh")

    def _applies(self, input: Tensor) -> bool:
        return not torch.is_grad_enabled() and input.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")


def _product(input: Tensor, prepacked: Any, bias: Tensor | None, then: str = "none", variant: str = "") -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, prepacked, bias, then, [], variant)
    return result


@contextmanager
def prepacked(*models: nn.Module, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Iterator[None]:
    """Inside, forwards without gradients use prepacked weights, which must not change meanwhile; on a CPU, where torch has the kernels.

    `dtypes`: weights of other types stay as they are.
    """
    changed: list[nn.Linear] = []
    try:
        with torch.no_grad():
            for module in (module for model in models for module in model.modules()):
                if type(module) is nn.Linear and module.weight.dtype in dtypes and _fits(module.weight) and _available(module.weight.dtype):
                    # What may fail, for lack of memory, comes first.
                    laid_out = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
                    module.__class__, module.prepacked = PrepackedLinear, laid_out
                    changed.append(module)
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
            del module.prepacked


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and min(weight.shape) > 1


@cache
def _available(dtype: torch.dtype) -> bool:
    """Whether this torch has the operations, tried on a small product: their names are not public."""
    if not torch.backends.mkldnn.is_available():
        return False
    input, weight = torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype), torch.linspace(-1, 1, 20).reshape(5, 4).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        got = _product(input, packed, None), _product(input, packed, None, "gelu", "tanh")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    plain = input @ weight.T
    return all(torch.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in zip(got, (plain, gelu(plain, approximate="tanh")), strict=True))
