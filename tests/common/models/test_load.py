"""Tokenizers and models: deterministic, complete, in the type that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common.errors import UserError
from common.models.load import (
    alternating_attention,
    build_backbone,
    build_generator,
    check_vocabulary,
    give_pad_token,
    load_backbone,
    load_generator,
    load_tokenizer,
    pad_is_eos,
    set_dropout,
    train_tokenizer,
)
from common.models.modes import draws_dropout
from common.schema import ModelInit

TEXTS = ["Question: What is the capital of France?\nAnswer: Paris.", "Question: Who asks <eos>?\nAnswer: Nobody asks <pad>."] * 3
STRANGE = "  \tÜnïcode 😀\u0000\n\n<eos> 1234 <pad><pad>\r x"
SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
GENERATORS = [name for name in SIZES if name != "bert"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def init(model_type: str, **more: Any) -> ModelInit:
    return ModelInit(model_type=model_type, config=SIZES.get(model_type, {}) | more)


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- tokenizers


def test_trained_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        for text in (*TEXTS, STRANGE, ""):
            ids = loaded(text).input_ids
            assert ids == tokenizer(text).input_ids
            assert loaded.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)


def test_special_strings_in_a_text_are_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not {0, 1} & set(tokenizer(STRANGE).input_ids)


def test_digits_are_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(train_tokenizer(["1234 1234 1234"] * 9, 300)("1234").input_ids)
    assert len(tokens) == 4


def test_training_a_tokenizer_is_deterministic() -> None:
    texts = [f"word{i % 7} other{i % 5} thing{i % 3}" for i in range(60)]
    first, second = (train_tokenizer(texts, 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_vocabulary_size_is_kept_and_too_small_ones_are_refused() -> None:
    assert len(train_tokenizer(["abab cdcd " * 50 + "the quick brown fox jumps over it"], 262)) == 262
    assert len(train_tokenizer([], 300)) == 258
    with pytest.raises(UserError, match=r"vocab_size 257 is too small: 256 bytes and 2 special tokens need 258"):
        train_tokenizer(TEXTS, 257)


def test_padding_is_a_token_of_its_own_where_there_is_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unannounced")
    loaded = load_tokenizer(str(tmp_path / "unannounced"))
    assert loaded.pad_token_id == 0 and not pad_is_eos(loaded)


def eos_only_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_padding_falls_back_to_eos_and_a_reward_model_can_get_its_own(tmp_path: Path) -> None:
    eos_only_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert pad_is_eos(tokenizer) and tokenizer.pad_token_id == 0
    backbone = build_backbone(init("gpt_neo"), tokenizer, 16, 0)
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        before = backbone(ids).last_hidden_state
        assert give_pad_token(tokenizer, backbone) and not give_pad_token(tokenizer, backbone)
        assert torch.equal(backbone(ids).last_hidden_state, before)
    assert (tokenizer.pad_token_id, backbone.config.pad_token_id, backbone.config.vocab_size) == (3, 3, 4)
    assert not pad_is_eos(tokenizer) and backbone.get_input_embeddings().num_embeddings == 4
    assert backbone.get_input_embeddings().weight[3].tolist() == [0.0] * 16  # the same in every run


def test_tokenizer_without_any_end_and_missing_tokenizer(tmp_path: Path) -> None:
    tokenizer = eos_only_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "t"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path / "empty"))


def test_rows_longer_than_a_fresh_models_positions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data.max_length 24 exceeds the 16 positions of model_init.config"):
        build_generator(init("gpt2", n_positions=16), tokenizer, 24, 0)


def test_tokenizer_larger_than_the_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_generator(init("gpt2"), train_tokenizer([], 258), 16, 0)
    with pytest.raises(UserError, match=rf"the tokenizer has {len(tokenizer)} entries, but m has embeddings for 258"):
        check_vocabulary(tokenizer, model, "m")
    check_vocabulary(train_tokenizer([], 258), model, "m")


# --- building


@pytest.mark.parametrize("model_type", GENERATORS)
def test_fresh_weights_depend_on_the_seed_alone(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build_generator(init(model_type), tokenizer, 24, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = build_generator(init(model_type), tokenizer, 24, 3), build_generator(init(model_type), tokenizer, 24, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert (first.config.vocab_size, first.config.pad_token_id, first.config.eos_token_id) == (len(tokenizer), 0, 1)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32} and not first.training
    if model_type != "t5":
        assert first.config.max_position_embeddings == 24


def test_positions_of_the_config_win(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_generator(init("gpt2", n_positions=40), tokenizer, 24, 0).config.n_positions == 40
    assert build_generator(init("gpt2", max_position_embeddings=40), tokenizer, 24, 0).config.n_positions == 40


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [[["global"], 1]]), (2, [[["global", "local"], 1]]), (5, [[["global", "local"], 2], [["global"], 1]])],
)
def test_gpt_neo_attention_alternates_and_agrees_with_the_layers(
    layers: int, expected: list[Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert alternating_attention(layers) == expected
    model = build_generator(init("gpt_neo", num_layers=layers), tokenizer, 16, 0)
    assert model.config.attention_layers == [("global", "local")[index % 2] for index in range(layers)]


@pytest.mark.parametrize(
    ("model_init", "message"),
    [
        (ModelInit(model_type="gptneo"), "model_init.model_type: got gptneo; did you mean gpt_neo"),
        (ModelInit(model_type="xyzzy"), "expected one of transformers' model types"),
        (ModelInit(model_type="bert"), "model_type bert writes no text; it can only be a reward model's backbone"),
        (ModelInit(model_type="vit"), "model_type vit reads no text"),
        (ModelInit(config={"hiden_size": 8}), "model_init.config.hiden_size: gpt_neo has no such setting; did you mean hidden_size"),
        (ModelInit(config={"hidden_size": 9, "num_layers": 1, "num_heads": 2}), "cannot be built: embed_dim must be divisible"),
        (ModelInit(config={"hidden_size": "x"}), "model_init.config.hidden_size: got x, expected a whole number >= 1"),
        (ModelInit(config={"attention_dropout": "x"}), "gpt_neo refuses it: .*attention_dropout"),
        (ModelInit(config={"num_layers": 3, "attention_types": [[["global"], 2]]}), "gpt_neo refuses it"),
        (ModelInit(config={"vocab_size": 5}), "vocab_size 5 differs from the tokenizer's"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(model_init: ModelInit, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_generator(model_init, tokenizer, 16, 0)
    assert all("\n" not in line for line in caught.value.problems)


def test_unknown_settings_are_all_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        build_generator(ModelInit(config={"hiden_size": 8, "num_layer": 2}), tokenizer, 16, 0)
    assert len(caught.value.problems) == 2


def test_backbones_of_every_kind_without_pooler(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for model_type in SIZES:
        backbone = build_backbone(init(model_type), tokenizer, 16, 0)
        assert not any("lm_head" in name or "pooler" in name for name, _ in backbone.named_parameters())
        again = load_backbone(save(backbone, tokenizer, tmp_path / model_type))
        assert backbone.state_dict().keys() == again.state_dict().keys()


# --- loading


def test_weights_load_as_float32_unless_told_otherwise(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_generator(init("llama"), tokenizer, 16, 0).to(torch.bfloat16)
    name = save(model, tokenizer, tmp_path / "m")
    assert next(AutoModelForCausalLM.from_pretrained(name).parameters()).dtype == torch.bfloat16  # what transformers itself does
    for load in (load_generator, load_backbone):
        assert {parameter.dtype for parameter in load(name).parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in load(name, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_sampling_defaults_of_a_model_are_dropped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_generator(init("llama"), tokenizer, 16, 0)
    model.generation_config.do_sample = True
    model.generation_config.top_p = 0.5
    model.generation_config.eos_token_id = [1, 5]
    loaded = load_generator(save(model, tokenizer, tmp_path / "m")).generation_config
    assert (loaded.do_sample, loaded.top_p, loaded.eos_token_id) == (None, None, [1, 5])


def test_missing_weights_are_an_error_and_never_random(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    backbone = build_backbone(init("llama"), tokenizer, 16, 0)  # its output layer is not tied, so it has none
    with pytest.raises(UserError, match=r"lacks weights that LlamaForCausalLM needs: lm_head.weight"):
        load_generator(save(backbone, tokenizer, tmp_path / "m"))


def test_the_head_of_a_generator_is_left_behind_by_its_backbone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    generator = build_generator(init("gpt_neo"), tokenizer, 16, 0)
    backbone = load_backbone(save(generator, tokenizer, tmp_path / "m"))
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, generator.transformer(ids).last_hidden_state)


def test_loading_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model can be loaded from") as caught:
        load_generator(str(tmp_path))
    assert "\n" not in str(caught.value)


# --- dropout


@pytest.mark.parametrize("model_type", SIZES)
def test_dropout_takes_effect_everywhere_and_zero_turns_it_off(model_type: str, tokenizer: PreTrainedTokenizerFast) -> None:
    backbone = build_backbone(init(model_type), tokenizer, 16, 0).train()
    ids = torch.arange(4, 12).reshape(1, -1)
    more = {"decoder_input_ids": ids} if model_type == "t5" else {}

    def states() -> torch.Tensor:
        return backbone(ids, **more).last_hidden_state

    set_dropout(backbone, 0.5)
    assert not torch.equal(states(), states())
    set_dropout(backbone, 0.0)
    assert torch.equal(states(), states())
    assert torch.equal(states(), backbone.eval()(ids, **more).last_hidden_state)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 2, "hidden_dropout": 0.5}),
        ("xglm", {"d_model": 16, "ffn_dim": 32, "num_layers": 6, "attention_heads": 2, "layerdrop": 0.5, "dropout": 0.0}),
    ],
)
def test_zero_turns_off_dropout_under_other_names_and_of_whole_layers(model_type: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[model_type](vocab_size=20, initializer_range=0.3, init_std=0.3, **config)).train()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert draws_dropout(model) and len({float(model(ids).last_hidden_state.sum()) for _ in range(4)}) > 1
        set_dropout(model, 0.0)
        assert not draws_dropout(model) and len({float(model(ids).last_hidden_state.sum()) for _ in range(4)}) == 1


def test_dropout_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_generator(init("gpt2"), tokenizer, 16, 0)
    set_dropout(model, 0.25)
    loaded = load_generator(save(model, tokenizer, tmp_path / "m"))
    assert {module.p for module in loaded.modules() if isinstance(module, nn.Dropout)} == {0.25}


def test_dropout_without_any_place_for_it_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model_params.dropout 0.1 has no effect: Linear has no dropout"):
        set_dropout(nn.Linear(2, 2), 0.1)
