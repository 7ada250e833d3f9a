"""Answers do not depend on their batch, end where they should, and follow the options."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from common.errors import UserError
from common.evaluation.generate import Answer, generate_answers, read_answer
from common.evaluation.generation_options import generation_options, idle_options
from common.models.load import train_tokenizer
from common.schema import GenerateParams

PAD, EOS = 0, 1
PROMPTS = [[5, 9], [7, 3, 20, 11, 8, 2], [4], [30, 31, 32, 33], [9, 9, 9], [12, 40], [6, 5, 4, 3, 2, 10, 11]]


def config_of(kind: str) -> PreTrainedConfig:
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **ids}
    if kind == "gpt_neo":
        sizes = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, **ids}
        return GPTNeoConfig(attention_types=[[["global", "local"], 1]], window_size=4, **sizes)
    if kind == "llama":
        return LlamaConfig(intermediate_size=48, num_key_value_heads=2, **small)
    if kind == "opt":
        return OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **small)
    if kind == "t5":
        return T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD, **ids)
    layers = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return BartConfig(
        vocab_size=300, d_model=32, max_position_embeddings=64, decoder_start_token_id=EOS, forced_eos_token_id=None, **layers, **ids
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the capital of france is paris", "what is the colour of the sky? it is blue."], 300)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(kind)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # larger than a fresh model's, so that prompts matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def gpt_neo() -> PreTrainedModel:
    return build("gpt_neo")


def answer(model: PreTrainedModel, tokenizer, prompts=PROMPTS, *, seed: int = 3, batch_size: int = 3, rows=None, **params) -> list[Answer]:
    use_cache = params.pop("use_cache", True)
    step = params.pop("step", 0)
    pad_to = params.pop("pad_to", None)
    settings = GenerateParams(**{"max_new_tokens": 8, **params})
    return generate_answers(
        model, tokenizer, prompts, settings, seed=seed, batch_size=batch_size, use_cache=use_cache, rows=rows, step=step, pad_to=pad_to
    )


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "opt", "t5", "bart"])
@pytest.mark.parametrize(
    "params",
    [{}, SAMPLING, {**SAMPLING, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1}],
    ids=["greedy", "sampled", "penalties"],
)
def test_batch_order_and_padding_change_no_answer(kind: str, params: dict, tokenizer) -> None:
    model = build(kind)
    together = answer(model, tokenizer, batch_size=len(PROMPTS), pad_to=16, **params)
    alone = [answer(model, tokenizer, [prompt], rows=[row], **params)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = answer(model, tokenizer, [PROMPTS[row] for row in order], rows=order, batch_size=2, **params)
    assert [shuffled[order.index(row)] for row in range(len(PROMPTS))] == together
    assert len({a.ids for a in together}) > 1


def test_padding_that_is_eos_counts_as_no_text() -> None:
    """Where padding and EOS are one token, a rule against repetition must not forbid a padded row to end."""
    own = train_tokenizer(["the capital of france is paris"], 300)
    own.pad_token = own.eos_token
    model = build("gpt_neo")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely, EOS among them
    prompts = [[5, 9, 4, 7, 8, 11][: 1 + row % 6] for row in range(18)]
    params = {"do_sample": True, "max_new_tokens": 30, "no_repeat_ngram_size": 1}
    together = answer(model, own, prompts, batch_size=18, **params)
    assert together == answer(model, own, prompts, batch_size=1, **params)
    assert any(a.ended for a in together)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((300,), 1.0))
        model.lm_head.bias[EOS] = 6.0  # divided by 10 if it stood in the text, and then unlikely
    penalised = answer(model, own, prompts, batch_size=18, do_sample=True, repetition_penalty=10.0)
    assert penalised == answer(model, own, prompts, batch_size=1, do_sample=True, repetition_penalty=10.0)
    assert any(a.ended for a in penalised)


def test_greedy_equals_a_plain_loop_over_the_model(gpt_neo, tokenizer) -> None:
    for prompt, written in zip(PROMPTS, answer(gpt_neo, tokenizer), strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(gpt_neo(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert list(written.ids) == ids[len(prompt) :]


def test_sampling_follows_the_models_distribution(gpt_neo, tokenizer) -> None:
    n = 4000
    written = answer(gpt_neo, tokenizer, [[5, 9]] * n, batch_size=1000, do_sample=True, max_new_tokens=1, temperature=0.7)
    shares = torch.bincount(torch.tensor([a.ids[0] for a in written]), minlength=300) / n
    probs = (gpt_neo(torch.tensor([[5, 9]])).logits[0, -1] / 0.7).softmax(-1)
    assert ((shares - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt() + 1 / n).all()


def test_seed_step_and_row_make_other_samples_and_the_cache_does_not(gpt_neo, tokenizer) -> None:
    base = answer(gpt_neo, tokenizer, **SAMPLING)
    assert answer(gpt_neo, tokenizer, **SAMPLING) == base
    assert answer(gpt_neo, tokenizer, use_cache=False, **SAMPLING) == base
    assert answer(gpt_neo, tokenizer, seed=4, **SAMPLING) != base
    assert answer(gpt_neo, tokenizer, step=1, **SAMPLING) != base
    assert answer(gpt_neo, tokenizer, rows=range(10, 17), **SAMPLING) != base


def test_the_global_generator_is_neither_used_nor_moved(gpt_neo, tokenizer) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = answer(gpt_neo, tokenizer, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert answer(gpt_neo, tokenizer, **SAMPLING) == first


def test_answers_end_at_eos_and_eos_is_kept_in_the_ids(tokenizer) -> None:
    ids = tokenizer("paris").input_ids
    ended = read_answer(tokenizer, [*ids, EOS, PAD, PAD], frozenset({EOS}), [])
    assert (ended.text, ended.ids, ended.ended) == ("paris", (*ids, EOS), True)
    cut = read_answer(tokenizer, ids, frozenset({EOS}), [])
    assert (cut.text, cut.ids, cut.ended) == ("paris", tuple(ids), False)
    assert read_answer(tokenizer, [EOS], frozenset({EOS}), []) == Answer("", (EOS,), True)


def test_text_is_cut_at_the_first_stop_string_and_loses_its_leading_space(tokenizer) -> None:
    ids = tokenizer(" blue.\nQuestion: and sky").input_ids
    stopped = read_answer(tokenizer, ids, frozenset({EOS}), ["sky", "\nQuestion:"])
    assert (stopped.text, stopped.ended) == ("blue.", True)


def test_generation_stops_at_a_stop_string(gpt_neo, tokenizer) -> None:
    free = answer(gpt_neo, tokenizer, max_new_tokens=12)
    text = tokenizer.decode(free[0].ids[:6])
    stop = tokenizer.decode(free[0].ids[3])  # something that greedy decoding is known to write
    assert stop.strip() and stop in text
    stopped = answer(gpt_neo, tokenizer, max_new_tokens=12, stop_strings=[stop], batch_size=2)
    for a, b in zip(free, stopped, strict=True):
        whole = tokenizer.decode(a.ids, skip_special_tokens=True).removeprefix(" ")
        assert b.text == whole.split(stop)[0]
        assert b.ended == (stop in whole or a.ended)
    alone = answer(gpt_neo, tokenizer, PROMPTS[:1], max_new_tokens=12, stop_strings=[stop])
    assert len(alone[0].ids) <= 4


def test_min_length_counts_answer_tokens(tokenizer) -> None:
    model = build("gpt_neo")
    with torch.no_grad():  # every logit is 0: EOS is as likely as any other, and argmax takes the first that is allowed
        model.lm_head.weight.zero_()
    params = {"do_sample": True, "max_new_tokens": 40, "top_k": 0}
    lengths = [len(a.ids) for a in answer(model, tokenizer, [[5]] * 100, batch_size=100, **params, min_length=0)]
    assert min(lengths) < 8
    assert all(len(a.ids) > 8 for a in answer(model, tokenizer, [[5]] * 100, batch_size=100, **params, min_length=8))
    assert [len(a.ids) for a in answer(model, tokenizer, [[5]] * 100, batch_size=100, **params, min_length=-1)] == lengths


def test_other_options_reach_generate(gpt_neo, tokenizer) -> None:
    plain = answer(gpt_neo, tokenizer)
    banned = plain[0].ids[0]
    assert all(banned not in a.ids for a in answer(gpt_neo, tokenizer, suppress_tokens=[banned]))
    assert answer(gpt_neo, tokenizer, num_beams=4) != plain
    # a token needs 1.0 of the likeliest one's probability: sampling becomes greedy
    assert answer(gpt_neo, tokenizer, do_sample=True, min_p=1.0) == plain


def test_settings_of_sampling_stored_with_a_model_are_not_used(gpt_neo, tokenizer) -> None:
    plain = answer(gpt_neo, tokenizer)
    model = build("gpt_neo")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    model.generation_config.min_length = 30
    assert answer(model, tokenizer) == plain


def test_no_prompts_give_no_answers_and_modes_come_back(gpt_neo, tokenizer) -> None:
    assert answer(gpt_neo, tokenizer, []) == []
    gpt_neo.train()
    try:
        answer(gpt_neo, tokenizer, PROMPTS[:1])
        assert gpt_neo.training
    finally:
        gpt_neo.eval()


def test_prompts_that_leave_no_room_are_refused(gpt_neo, tokenizer) -> None:
    with pytest.raises(UserError, match="66 tokens, the model has 64 positions"):
        answer(gpt_neo, tokenizer, [[5] * 58])
    with pytest.raises(UserError, match="prompt of 65 tokens"):
        answer(build("bart"), tokenizer, [[5] * 65])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_beam": 4}, r"num_beam is no option of generation \(did you mean num_beams\?\)"),
        ({"max_length": 9}, "write max_new_tokens"),
        ({"num_return_sequences": 2}, "one answer"),
        ({"num_beams": 2, "do_sample": True}, "num_beams 2 searches, do_sample: true samples"),
        ({"early_stopping": "often"}, "early_stopping"),
    ],
)
def test_options_that_cannot_work_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generation_options(GenerateParams(**params))


def test_options_without_effect_are_named() -> None:
    assert idle_options(GenerateParams(temperature=0.7, top_k=5, min_p=0.1)) == ["temperature", "top_k", "min_p"]
    assert idle_options(GenerateParams(temperature=0.7, do_sample=True)) == []
    assert idle_options(GenerateParams()) == []
