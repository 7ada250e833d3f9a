"""The states that enter the lowest layer that trains, computed once and read from disk from then on.

A cache as that of a frozen backbone's states, `common.models.frozen_states`, with every token's state at one place of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.freezing import find_blocks, freeze_eval
from common.models.answers import CachedStates, StartedAnswer
from common.models.backbone import RewardBatch, RewardInput
from common.models.frozen_states import cached_rows, transformer_facts
from common.models.lower_layers import LowerLayers
from common.models.modes import dropout_attributes, evaluating
from common.models.packed import as_line, packed_line
from common.state_facts import StateDtype, StateFacts

SETTING = "model_params.cache_states"


def frozen_layers(model: nn.Module, trunk: Any) -> LowerLayers:
    """The layers at the bottom of `trunk`, a part of `model`, whose states no step of training changes.

    Raises UserError with the reason where there are none: something below trains or draws dropout, or the model cannot start above.
    """
    kind = type(trunk).__name__
    if trunk.config.is_encoder_decoder:
        raise UserError(f"{SETTING}: the layers of {kind} hand on more than their states, and it has two stacks of them; leave it out")
    with evaluating(model):
        lower = LowerLayers.find(trunk)
    if lower is None:
        above = tuple(block.prefix for block in find_blocks(trunk)[1:])
        low = [name for name, parameter in trunk.named_parameters() if parameter.requires_grad and not name.startswith(above)]
        raise UserError(
            f"{SETTING}: {low[0]} of {kind} trains, so that no layer below the trained ones stays as it is; freeze it or leave it out"
            if low
            else f"{SETTING}: {kind} cannot start above its frozen layers; leave it out"
        )
    with evaluating(model):  # which puts the modes back
        model.train()
        freeze_eval(model)
        for name, module in trunk.named_modules():
            on = [value for attribute in dropout_attributes(module) if (value := getattr(module, attribute)) > 0]
            if on and module.training and not name.startswith(lower.above):
                raise UserError(
                    f"{SETTING}: {name or kind} has dropout {max(on):g} below the lowest layer that trains, and a state that is kept has "
                    "none; set model_params.dropout: 0 or leave it out"
                )
    return lower


def lower_facts(
    lower: LowerLayers, tokenizer: PreTrainedTokenizerBase, dtype: StateDtype, autocast: torch.dtype | None = None
) -> StateFacts:
    """What the states above these layers depend on: the weights of all that lies below."""
    trunk: Any = lower.trunk
    return transformer_facts(
        trunk,
        tokenizer,
        dtype,
        autocast,
        part=f"entering layer {len(lower.below)}",
        token="all",
        layers=1,
        hidden_size=trunk.config.get_text_config().hidden_size,
        without=lower.above,
    )


def started_answers(
    lower: LowerLayers,
    answers: Sequence[RewardInput],
    root: Path,
    facts: StateFacts,
    *,
    packs: bool,
    pad_id: int,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    show_progress: bool = True,
) -> list[StartedAnswer]:
    """Answers with the states that enter the lowest trained layer, from the cache below `root`. `packs`: the trunk can read lines.

    What the cache lacks is computed and written; its size is said before. Raises UserError where it does not fit onto the disk.
    """
    rows = cached_rows(
        lower.trunk,
        lambda batch: entering_rows(lower, batch, packs=packs),
        answers,
        root,
        facts,
        pad_id=pad_id,
        in_order=packs,
        reads=f"every token's state that enters layer {len(lower.below)}",
        remedy="cache_states: bfloat16 takes half of float32",
        device=device,
        autocast=autocast,
        show_progress=show_progress,
    )
    states = CachedStates(rows, facts.layers)
    return [StartedAnswer(answer, states, number) for number, answer in enumerate(answers)]


def entering_rows(lower: LowerLayers, batch: RewardBatch, *, packs: bool) -> list[Tensor]:
    """The states of each row's tokens (T of the row, 1, D) that enter the block above."""
    mask = batch.attention_mask
    if not packs:
        states = lower.states(input_ids=batch.input_ids, attention_mask=mask.long())
        return [own[real][:, None] for own, real in zip(states, mask, strict=True)]
    line = as_line(batch.input_ids, mask, share=True)
    with packed_line(lower.trunk, line.lengths, line.shared):
        states = lower.states(input_ids=line.ids, position_ids=line.positions())[0]  # (N, D)
    return [states[places[real]][:, None] for places, real in zip(line.places, mask, strict=True)]
