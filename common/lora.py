"""LoRA adapters (peft): add them for training, save them merged."""

from __future__ import annotations

import copy
import itertools
import warnings
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
    from peft import LoraConfig

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
            return add_adapters(model, config)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {settings.target_modules} fits no layer of {type(model).__name__}: {error}") from None


def add_adapters(model: nn.Module, config: Any) -> Any:
    """Wrap `model` as a `peft.LoraConfig` says; fresh weights come from torch's generator.

    Raises UserError for adapters of another kind, which cannot be merged, ValueError where they fit no layer.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(config, LoraConfig) or config.use_dora:
        got = "use_dora" if isinstance(config, LoraConfig) else type(config).__name__
        raise UserError(f"peft_config: got {got}, expected a LoraConfig without use_dora: only those are merged into the weights saved")
    with warnings.catch_warnings():
        # peft asks transformers under a name that transformers is about to drop
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def _is_conv1d(model: nn.Module) -> bool:
    """Whether linear layers hold their matrix transposed, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def is_lora(model: Any) -> bool:
    """Whether a model, or the backbone of a reward model, carries adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel) or isinstance(getattr(model, "backbone", None), PeftModel)


def merged_copy(model: Any) -> Any:
    """A copy to save, with the adapters merged into the weights; the model in training stays untouched, bit for bit.

    Weights without an adapter are shared with `model`. Merged ones are made one at a time and lie in the CPU's memory, so a GPU holds
    no second model. (Merging in place and taking it back afterwards would change the weights by rounding.)
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    copies: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            adapted: Any = layer  # each kind of layer has its own `get_delta_weight`
            weight = adapted.get_base_layer().weight
            merged = weight.detach()
            for adapter in adapted.active_adapters:
                merged = (merged + adapted.get_delta_weight(adapter).detach()).to(weight.dtype)
            copies[id(weight)] = nn.Parameter(merged.cpu(), requires_grad=False)
    copied = copy.deepcopy(model, copies)
    if isinstance(copied, PeftModel):
        return copied.unload()
    copied.backbone = copied.backbone.unload()
    return copied


def save_adapter(model: Any, folder: Path) -> None:
    """The adapter alone, as peft loads it over the base model."""
    from peft import PeftModel

    adapter = model if isinstance(model, PeftModel) else model.backbone
    adapter.save_pretrained(str(folder))
