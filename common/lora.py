"""LoRA adapters (peft): add them for training, save them merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.schema import LoraSettings


def add_lora(model: nn.Module, settings: LoraSettings, *, seed: int = 0) -> Any:
    """Wrap `model` so that only low-rank updates (float32) of its linear layers train; the base weights are frozen.

    The adapters' fresh weights depend on `seed` alone. Raises UserError where `target_modules` names no layer.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # annotated as int, used as a factor
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        bias="none",
        fan_in_fan_out=_is_conv1d(model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {settings.target_modules} fits no layer of {type(model).__name__}: {error}") from None


def _is_conv1d(model: nn.Module) -> bool:
    """Whether linear layers hold their matrix transposed, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def is_lora(model: Any) -> bool:
    """Whether a model, or the backbone of a reward model, carries adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel) or isinstance(getattr(model, "backbone", None), PeftModel)


def merged_copy(model: Any) -> Any:
    """A copy with the adapters merged into the weights; the model in training stays untouched."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return copy.deepcopy(model).merge_and_unload()
    merged = copy.deepcopy(model)
    merged.backbone = merged.backbone.merge_and_unload()
    return merged


def save_adapter(model: Any, folder: Path) -> None:
    """The adapter alone, as peft loads it over the base model."""
    from peft import PeftModel

    adapter = model if isinstance(model, PeftModel) else model.backbone
    adapter.save_pretrained(str(folder))
