"""Freezing by structure: the same groups for every architecture, and the original's rule on GPT-Neo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from common.errors import UserError
from common.freezing import apply_freezing, find_blocks, freeze_eval, parameter_groups
from common.schema import FreezeSettings

SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 8, "num_layers": 3, "num_heads": 2, "attention_types": [[["global"], 3]], "max_position_embeddings": 16},
    "gpt2": {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16},
    "llama": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    "qwen2": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
              "head_dim": 4},
    "opt": {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "word_embed_proj_dim": 4},
    "bert": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2},
}  # fmt: skip


def build(model_type: str, **more: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=0, **(SIZES[model_type] | more))
    auto = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}.get(model_type, AutoModelForCausalLM)
    torch.manual_seed(0)
    return auto.from_config(config)


class WithHead(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.v_head = nn.Linear(8, 1)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def original_rule(name: str, flags: dict[str, bool], layers: list[int]) -> bool:
    """Whether the original code left a GPT-Neo parameter trainable: by what its name contains, kept layers first."""
    if any(name.startswith(f"transformer.h.{layer}.") for layer in layers):
        return True
    if "wte" in name or "wpe" in name:
        group = "emb"
    elif "ln" in name:
        group = "ln"
    elif "attn" in name:
        group = "attn"
    elif "mlp" in name:
        group = "ff"
    else:
        group = "other"
    return not flags[group]


@pytest.mark.parametrize("bits", range(31))
def test_gpt_neo_trains_what_the_original_trained(bits: int) -> None:
    flags = {group: bool(bits >> place & 1) for place, group in enumerate(("emb", "ln", "attn", "ff", "other"))}
    model = build("gpt_neo")
    layers = [0, 2] if bits % 2 else []
    names = [name for name, _ in model.named_parameters()]
    expected = {name for name in names if original_rule(name, flags, layers)}
    if not expected:
        pytest.skip("nothing left to train: an error of its own")
    apply_freezing(model, FreezeSettings(**{f"freeze_{group}": on for group, on in flags.items()}, layers_not_to_freeze=layers))
    assert trained_names(model) == expected


GROUPS = {
    "gpt2": {"transformer.wpe.weight": "emb", "transformer.h.1.ln_2.bias": "ln", "transformer.h.1.attn.c_proj.weight": "attn",
             "transformer.h.1.mlp.c_fc.weight": "ff", "transformer.ln_f.weight": "ln"},
    "llama": {"model.embed_tokens.weight": "emb", "model.layers.0.self_attn.o_proj.weight": "attn", "model.norm.weight": "ln",
              "model.layers.0.mlp.gate_proj.weight": "ff", "model.layers.0.input_layernorm.weight": "ln", "lm_head.weight": "other"},
    "qwen2": {"model.layers.2.self_attn.q_proj.bias": "attn", "model.layers.2.mlp.up_proj.weight": "ff"},
    "qwen3": {"model.layers.0.self_attn.q_norm.weight": "ln"},
    "opt": {"model.decoder.embed_positions.weight": "emb", "model.decoder.layers.0.self_attn_layer_norm.bias": "ln",
            "model.decoder.layers.0.fc1.weight": "ff", "model.decoder.layers.0.fc2.bias": "ff",
            "model.decoder.layers.0.self_attn.v_proj.bias": "attn", "model.decoder.project_in.weight": "other"},
    "bert": {"bert.embeddings.token_type_embeddings.weight": "emb", "bert.embeddings.LayerNorm.weight": "ln",
             "bert.encoder.layer.0.attention.output.dense.weight": "attn", "bert.encoder.layer.0.attention.output.LayerNorm.bias": "ln",
             "bert.encoder.layer.0.intermediate.dense.weight": "ff", "bert.encoder.layer.0.output.dense.weight": "ff",
             "cls.predictions.transform.dense.weight": "other"},
    "t5": {"shared.weight": "emb", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "attn",
           "decoder.block.2.layer.1.EncDecAttention.k.weight": "attn", "decoder.block.2.layer.2.DenseReluDense.wo.weight": "ff",
           "encoder.block.1.layer.1.layer_norm.weight": "ln", "decoder.final_layer_norm.weight": "ln"},
}  # fmt: skip


@pytest.mark.parametrize("model_type", GROUPS)
def test_groups_follow_the_structure(model_type: str) -> None:
    groups = parameter_groups(build(model_type))
    assert {name: groups[name] for name in GROUPS[model_type]} == GROUPS[model_type]


@pytest.mark.parametrize("model_type", SIZES)
def test_every_block_is_found_and_every_freeze_freezes_its_group_alone(model_type: str) -> None:
    stacks = 2 if model_type == "t5" else 1
    model = build(model_type)
    assert [(block.index, block.count) for block in find_blocks(model)] == [(index, 3) for index in range(3)] * stacks
    groups = parameter_groups(model)
    for group in sorted(set(groups.values())):
        apply_freezing(model, FreezeSettings(**{f"freeze_{group}": True}))
        assert trained_names(model) == {name for name, its in groups.items() if its != group}


@pytest.mark.parametrize("model_type", SIZES)
def test_groups_are_the_same_under_a_wrapping_module(model_type: str) -> None:
    model = build(model_type)
    wrapped = parameter_groups(WithHead(model))
    assert {f"backbone.{name}": group for name, group in parameter_groups(model).items()}.items() <= wrapped.items()
    assert wrapped["v_head.weight"] == "other"


@pytest.mark.parametrize("model_type", SIZES)
def test_negative_layers_count_from_the_end_of_each_stack(model_type: str) -> None:
    model = build(model_type)
    everything = {f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")}
    apply_freezing(model, FreezeSettings(**everything, layers_not_to_freeze=[-1]))
    last = [block.prefix for block in find_blocks(model) if block.index == 2]
    assert len(last) == (2 if model_type == "t5" else 1)
    assert trained_names(model) == {name for name, _ in model.named_parameters() if name.startswith(tuple(last))}


def test_tied_output_layer_counts_as_embeddings_and_an_untied_one_does_not() -> None:
    tied, untied = build("llama", tie_word_embeddings=True), build("llama", tie_word_embeddings=False)
    for model in (tied, untied):
        apply_freezing(model, FreezeSettings(freeze_emb=True))
    assert not tied.lm_head.weight.requires_grad
    assert untied.lm_head.weight.requires_grad


def test_heads_always_train_and_the_table_says_so() -> None:
    model = WithHead(build("gpt2"))
    settings = FreezeSettings(**{f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")})
    table = apply_freezing(model, settings, always_train=("v_head",))
    assert trained_names(model) == {"v_head.weight", "v_head.bias"}
    assert (table.trained, table.rows[-1].group, table.rows[-1].parameters) == (9, "head", 9)
    assert "the fresh head trains, whatever is frozen" in str(table)
    assert table.frozen == sum(parameter.numel() for parameter in model.backbone.parameters())


def test_table_adds_up() -> None:
    model = build("gpt_neo")
    table = apply_freezing(model, FreezeSettings(freeze_attn=True, layers_not_to_freeze=[0]))
    attention = next(row for row in table.rows if row.group == "attn")
    assert (attention.trained, attention.frozen, attention.state) == (4 * 64 + 8, 2 * (4 * 64 + 8), "partly trained")
    assert table.trained + table.frozen == sum(parameter.numel() for parameter in model.parameters())
    assert "layers 0 of 3 train whatever the flags say" in str(table)


def test_do_freeze_false_overrides_and_missing_means_any_flag() -> None:
    model = build("gpt2")
    apply_freezing(model, FreezeSettings(freeze_emb=True))
    assert not model.transformer.wte.weight.requires_grad
    table = apply_freezing(model, FreezeSettings(do_freeze=False, freeze_emb=True))
    assert model.transformer.wte.weight.requires_grad and table.frozen == 0


@pytest.mark.parametrize("layer", [3, -4])
def test_layer_out_of_range_names_the_number_of_layers(layer: int) -> None:
    with pytest.raises(
        UserError, match=rf"layers_not_to_freeze: {layer} out of range, the model has 3 layers \(indices 0 to 2, or -3 to -1\)"
    ):
        apply_freezing(build("llama"), FreezeSettings(freeze_emb=True, layers_not_to_freeze=[0, layer]))


def test_settings_that_freeze_nothing_are_said_and_checked_all_the_same() -> None:
    model = build("gpt_neo")
    table = apply_freezing(model, FreezeSettings(do_freeze=True, layers_not_to_freeze=[0]))
    assert table.frozen == 0 and "do_freeze and layers_not_to_freeze without effect" in str(table)
    assert apply_freezing(model, FreezeSettings()).notes == ()
    with pytest.raises(UserError, match="7 out of range"):
        apply_freezing(model, FreezeSettings(layers_not_to_freeze=[7]))


def test_nothing_left_to_train_is_an_error() -> None:
    settings = FreezeSettings(**{f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")})
    with pytest.raises(UserError, match="nothing is left to train"):
        apply_freezing(build("bert"), settings)


def test_frozen_parts_run_in_eval_mode() -> None:
    model = WithHead(build("gpt2"))
    settings = FreezeSettings(**{f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")}, layers_not_to_freeze=[2])
    apply_freezing(model, settings, always_train=("v_head",))
    model.train()
    freeze_eval(model)
    blocks = model.backbone.transformer.h
    assert [block.attn.resid_dropout.training for block in blocks] == [False, False, True]
    assert model.training and model.v_head.training and not model.backbone.transformer.wte.training
    apply_freezing(model.backbone, FreezeSettings())
    model.train()
    freeze_eval(model)
    assert all(module.training for module in model.modules())


def test_a_wholly_frozen_backbone_gives_the_same_states_in_training() -> None:
    model = WithHead(build("gpt2"))
    settings = FreezeSettings(**{f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")})
    apply_freezing(model, settings, always_train=("v_head",))
    ids = torch.tensor([[3, 4, 5]])
    model.train()
    freeze_eval(model)
    first, second = (model.backbone(ids).logits for _ in range(2))
    assert torch.equal(first, second)


def test_only_the_outermost_stack_makes_blocks() -> None:
    class Attention(nn.Linear):
        pass

    def block() -> nn.Module:
        return nn.ModuleDict({"layer": nn.ModuleList([Attention(2, 2), Attention(2, 2)]), "mixer": nn.Linear(2, 2)})

    model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "adapters": nn.ModuleList([nn.Linear(2, 2)])})
    assert [found.prefix for found in find_blocks(model)] == ["blocks.0.", "blocks.1."]
    groups = parameter_groups(model)
    assert groups["blocks.1.layer.0.weight"] == "attn" and groups["blocks.0.mixer.bias"] == "ff" and groups["adapters.0.bias"] == "other"
