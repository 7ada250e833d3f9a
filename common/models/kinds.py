"""What a transformer's configuration tells of it: which of three kinds it is, and how many positions it has."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from common.model_source import BackboneKind


def backbone_kind(config: PreTrainedConfig) -> BackboneKind:
    """What a configuration describes. A model that predicts masked words and is not told to be a decoder is an encoder."""
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if getattr(config, "is_decoder", False):
        return "causal"
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return "encoder" if is_encoder else "causal"


def positions_of(config: Any) -> int | None:
    """Positions of a loaded model's configuration; None where they are relative, as T5's are, and nothing limits a text."""
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None
