"""Models are tried on texts that any vocabulary has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.models.last_layer import LastFeedForward
from common.models.lower_layers import LowerLayers
from common.models.packed import can_pack
from common.models.parts import take_apart
from common.models.trial import trial_ids, trial_rows


def make(vocab: int) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=vocab, bos_token_id=1, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_trial_texts_by_hand() -> None:
    assert trial_ids(make(40), 2, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert trial_ids(make(4), 2, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    ids, mask = trial_rows(make(40))
    assert (ids[mask].tolist(), mask.sum(1).tolist()) == ([1, 2, 3, 4, 5, 6, 7, 8], [5, 3])


def test_a_vocabulary_of_a_few_tokens_is_no_obstacle() -> None:
    model = make(3)
    trunk = model.base_model
    assert take_apart(model) is not None
    assert can_pack(trunk)
    assert LastFeedForward.find(trunk) is not None
    model.requires_grad_(False)
    trunk.layers[2].requires_grad_(True)
    lower = LowerLayers.find(trunk)
    assert lower is not None and len(lower.below) == 2
