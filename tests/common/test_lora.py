"""LoRA: only adapters train, saving merges a copy, and what is saved computes the same."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.lora import add_lora, is_lora, merged_copy
from common.models.load import build_generator, train_tokenizer
from common.schema import LoraSettings, ModelInit

SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["Question: one?\nAnswer: two."], 260)


def build(model_type: str, tokenizer: Any) -> Any:
    return build_generator(ModelInit(model_type=model_type, config=SIZES[model_type]), tokenizer, 32, 0)


def trained(model: Any) -> Any:
    """An adapter that has moved away from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def test_adding_an_adapter_warns_of_nothing(tokenizer: Any) -> None:
    model = build("gpt_neo", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, LoraSettings(r=2))


@pytest.mark.parametrize("model_type", SIZES)
def test_a_fresh_adapter_changes_nothing_and_trains_alone(model_type: str, tokenizer: Any) -> None:
    base = build(model_type, tokenizer)
    with torch.no_grad():
        before = base(IDS).logits
        adapted = add_lora(base, LoraSettings(r=2)).eval()
        assert torch.equal(adapted(IDS).logits, before)
    assert is_lora(adapted) and not is_lora(build(model_type, tokenizer))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}


@pytest.mark.parametrize("model_type", SIZES)
def test_saved_model_is_merged_and_the_one_in_training_is_not(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    adapted = trained(add_lora(build(model_type, tokenizer), LoraSettings(r=2)))
    weights = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    with torch.no_grad():
        expected = adapted(IDS).logits
        folder = save_model_directory(tmp_path / "m", adapted, tokenizer, new_manifest("sft", tokenizer))
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=0, atol=1e-6)
        again = PeftModel.from_pretrained(build(model_type, tokenizer), str(folder / "adapter"))
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-6)
        assert (expected - build(model_type, tokenizer)(IDS).logits).abs().max() > 1e-3  # the adapter does something
    after = dict(adapted.named_parameters())
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert not any("lora" in name for name, _ in merged_copy(adapted).named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SIZES)
def test_a_merged_copy_has_the_bits_of_peft_and_shares_what_has_no_adapter(model_type: str, dtype: torch.dtype, tokenizer: Any) -> None:
    adapted = trained(add_lora(build(model_type, tokenizer).to(dtype), LoraSettings(r=2)))
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    training = [parameter.requires_grad for parameter in adapted.parameters()]
    merged = merged_copy(adapted)
    assert training == [parameter.requires_grad for parameter in adapted.parameters()]
    assert all(torch.equal(before[name], parameter) for name, parameter in adapted.named_parameters())
    theirs = copy.deepcopy(adapted).merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shared = {parameter.data_ptr() for parameter in adapted.parameters()}
    copied = {name for name, parameter in merged.named_parameters() if parameter.data_ptr() not in shared}
    with_adapter = {name.removesuffix(".lora_A.default.weight") for name in before if ".lora_A." in name}
    assert copied == {f"{name.removeprefix('base_model.model.')}.weight" for name in with_adapter}


def test_adapters_depend_on_the_seed_alone(tokenizer: Any) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = add_lora(build("gpt2", tokenizer), LoraSettings(), seed=3).state_dict()
    torch.manual_seed(8)
    second = add_lora(build("gpt2", tokenizer), LoraSettings(), seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(7)
    add_lora(build("gpt2", tokenizer), LoraSettings(), seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_target_modules_that_fit_nothing_are_named(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: \['q_projj'\] fits no layer of LlamaForCausalLM"):
        add_lora(build("llama", tokenizer), LoraSettings(target_modules=["q_projj"]))
