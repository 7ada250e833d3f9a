"""Losses of predicted against target scores. Pure functions; B rows."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

LossName = Literal["mse", "mae", "huber"]


def score_loss(predicted: Tensor, target: Tensor, name: LossName = "mse", huber_delta: float = 1.0) -> Tensor:
    """Loss of each row, (B,), with e = predicted - target on the transformed scale.

    mse     e^2
    mae     |e|
    huber   e^2 / 2                          where |e| <= huber_delta
            huber_delta (|e| - huber_delta / 2)  beyond (Huber 1964)
    """
    error = predicted - target
    if name == "mse":
        return error**2
    size = error.abs()
    if name == "mae":
        return size
    assert name == "huber", name
    clipped = size.clamp(max=huber_delta)
    return clipped * (size - clipped / 2.0)
