"""Prepacked weights give what plain ones give, where no gradient is asked for, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.models.prepacked import PrepackedLinear, prepacked


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32, bias=False), nn.Linear(32, 1)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_results_are_those_of_plain_layers(dtype: torch.dtype, tolerance: float) -> None:
    model, x = network(dtype), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        plain = model(x)
        with prepacked(model):
            assert [type(layer) for layer in (model[0], model[2], model[3])] == [PrepackedLinear, PrepackedLinear, nn.Linear]
            model[0].weight.data.mul_(2)  # what was prepacked is what is used
            packed = model(x)
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_activation_behind_a_product_is_that_of_its_result(dtype: torch.dtype, tolerance: float) -> None:
    layer, x = network(dtype)[0], torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.gelu(layer(x), approximate="tanh")
    with prepacked(layer):
        assert torch.equal(layer.then_gelu(x), expected) and layer.then_gelu(x).requires_grad
        layer.weight.data.zero_()  # what was prepacked is what is used
        with torch.no_grad():
            torch.testing.assert_close(layer.then_gelu(x), expected, rtol=tolerance, atol=tolerance)


def test_gradients_autocast_and_other_types_take_the_plain_way() -> None:
    model, x = network(), torch.randn(3, 48)
    with prepacked(model):
        model[0].weight.data.zero_(), model[0].bias.data.fill_(1.0)
        assert torch.equal(model[0](x), torch.ones(3, 96))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model[0](x), torch.ones(3, 96, dtype=torch.bfloat16))
        with torch.no_grad():
            assert not torch.equal(model[0](x), torch.ones(3, 96))
    with prepacked(model, dtypes=(torch.bfloat16,)):
        assert type(model[0]) is nn.Linear


def test_afterwards_the_model_is_as_it_was() -> None:
    model = network()
    before = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    with pytest.raises(RuntimeError), prepacked(model), prepacked(model):
        raise RuntimeError
    assert {type(layer) for layer in model} == {nn.Linear, nn.GELU} and not hasattr(model[0], "prepacked")
    assert all(
        name == other and torch.equal(value, now) for (name, value), (other, now) in zip(before, model.state_dict().items(), strict=True)
    )


def test_a_layer_that_cannot_be_laid_out_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(3, 48)
    real = torch.ops.mkldnn._reorder_linear_weight

    def short_of_memory(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape == (32, 96):
            raise RuntimeError("not enough memory")
        return real(weight)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", short_of_memory)
    with pytest.raises(RuntimeError, match="not enough memory"), prepacked(model):
        pass
    with torch.no_grad():
        assert model(x).shape == (3, 1)
    assert not any(isinstance(layer, PrepackedLinear) for layer in model)
