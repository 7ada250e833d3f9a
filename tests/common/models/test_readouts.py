"""Every readout over every kind of transformer: which states it gets, what it makes of them, and where it makes no sense."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from common.checkpoint import new_manifest, read_manifest, save_model_directory
from common.errors import UserError
from common.freezing import find_blocks
from common.lora import add_lora
from common.models.backbone import (
    Entry,
    RewardBatch,
    States,
    backbone_states,
    collate_rewards,
    collate_states,
    layer_count,
    line_states,
    readout_needs,
    reward_inputs,
)
from common.models.kinds import backbone_kind
from common.models.load import build_backbone, set_dropout, train_tokenizer
from common.models.readouts import Attention, LayerWeights, Pooled, build_readout, normalised, weighted_mean
from common.models.recompute import recompute_activations
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import READS, SETTINGS, Needs, ReadoutName, ReadoutSettings
from common.records import Prompt
from common.schema import LoraSettings, ModelInit

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "gpt_neo": {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "window_size": 8},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2},
}
ONE_OF_EACH_KIND = ("gpt_neo", "bert", "t5")
KINDS = {"gpt_neo": "causal", "bert": "encoder", "t5": "encoder_decoder"}
FITTING = [(model_type, name) for model_type in ONE_OF_EACH_KIND for name, places in READS.items() if KINDS[model_type] in places]
SENSELESS = [(model_type, name) for model_type in ONE_OF_EACH_KIND for name, places in READS.items() if KINDS[model_type] not in places]
PROMPTS = [Prompt("What is the capital of France?"), Prompt("Who?"), Prompt("Why do cats sleep so much?"), Prompt("1 + 1")]
ANSWERS = ["Paris, which lies on the Seine.", "Nobody.", "They hunt.", "2"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"Question: {prompt.question}\nAnswer: {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], 300)


def backbone(model_type: str, tokenizer: Any) -> Any:
    """A small transformer whose layers do more than hand on their input."""
    model = build_backbone(ModelInit(model_type=model_type, config=MODELS[model_type]), tokenizer, 128, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2, generator=generator)
    return model


def reward_model(model_type: str, tokenizer: Any, name: ReadoutName, *, seed: int = 1, **settings: Any) -> RewardModel:
    return RewardModel.from_backbone(backbone(model_type, tokenizer), ReadoutSettings(name=name, **settings), seed=seed).eval()


def scorer(model: RewardModel, tokenizer: Any, batch_size: int = 4) -> RewardScorer:
    manifest = new_manifest("reward_regression", tokenizer, max_length=128)
    return RewardScorer(model, tokenizer=tokenizer, manifest=manifest, batch_size=batch_size)


def inputs(model: RewardModel, tokenizer: Any) -> list[Any]:
    encoder = scorer(model, tokenizer).encoder
    return [reward_inputs(encoder, model.entry, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


def padded_left(batch: RewardBatch) -> RewardBatch:
    """The same rows with their padding in front, in the encoder or the only part."""
    rows = [(ids[mask], mask.sum()) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    width = batch.input_ids.shape[1]
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row, _ in rows])
    mask = torch.stack([torch.arange(width) >= width - length for _, length in rows])
    return batch._replace(input_ids=ids, attention_mask=mask)


# --- the states that a readout gets


@pytest.mark.parametrize(
    ("model_type", "part"), [*((name, "whole") for name in MODELS if name != "t5"), ("t5", "encoder"), ("t5", "decoder")]
)
def test_layers_are_those_of_transformers_and_the_last_is_behind_the_final_norm(model_type: str, part: Any, tokenizer: Any) -> None:
    model = backbone(model_type, tokenizer)
    batch = RewardBatch(torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.ones(1, 6, dtype=torch.bool))
    if part == "decoder":
        batch = batch._replace(decoder_input_ids=torch.tensor([[0, 11, 12]]), decoder_attention_mask=torch.ones(1, 3, dtype=torch.bool))
    count = layer_count(model.config, part)
    assert count == (2 if part == "decoder" else 3)
    with torch.no_grad():
        states = backbone_states(model, batch, Needs(part, "all", count))
        given = {name: tensor for name, tensor in batch._asdict().items() if tensor is not None}
        if part == "encoder":
            given["decoder_input_ids"] = torch.tensor([[0]])
        output = model(**given, output_hidden_states=True)
        fewer = backbone_states(model, batch, Needs(part, "all", 2))
    theirs = {"whole": "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}[part]
    final = output.encoder_last_hidden_state if part == "encoder" else output.last_hidden_state
    assert torch.equal(states.values, torch.stack(output[theirs][1:], 2)[0]) and states.lengths == [len(states.values)]
    assert torch.equal(states.values[:, -1], final[0])
    assert torch.equal(fewer.values, states.values[:, -2:])
    norm = {"gpt2": "ln_f", "gpt_neo": "ln_f", "llama": "norm", "t5": f"{part}.final_layer_norm"}.get(model_type)
    if norm is not None:  # BERT's layers end in a norm each
        before: list[Tensor] = []
        hook = model.get_submodule(norm).register_forward_pre_hook(lambda _, arguments: before.append(arguments[0]))
        with torch.no_grad():
            backbone_states(model, batch, Needs(part, "all", count))
            hook.remove()
            torch.testing.assert_close(model.get_submodule(norm)(before[0])[0], states.values[:, -1])
        assert not torch.allclose(before[0][0], states.values[:, -1], atol=1e-2)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
@pytest.mark.parametrize("token", ["all", "first", "last"])
def test_a_line_gives_the_states_of_padded_rows(model_type: str, token: Any, tokenizer: Any) -> None:
    model = backbone(model_type, tokenizer)
    lengths = torch.tensor([4, 11, 1, 10])
    ids = torch.arange(44).reshape(4, 11) + 20
    ids[3, :9] = ids[1, :9]  # a beginning that stands in the line once
    mask = torch.arange(11) < lengths[:, None]
    batch = RewardBatch(ids.masked_fill(~mask, 0), mask)
    with torch.no_grad():
        for layers in (1, 3):
            line, padded = (states_of(model, batch, Needs("whole", token, layers)) for states_of in (line_states, backbone_states))
            assert line.lengths == padded.lengths == (lengths.tolist() if token == "all" else [1] * 4)
            torch.testing.assert_close(line.values, padded.values, rtol=1e-5, atol=1e-5)
            assert line.values.shape == (sum(line.lengths), layers, 16)


def test_one_token_is_the_real_one_whichever_side_is_padded(tokenizer: Any) -> None:
    model = backbone("t5", tokenizer)
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 0]])
    with torch.no_grad():
        whole = model.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        for token, places in (("first", [0, 1]), ("last", [2, 2])):
            states = backbone_states(model, RewardBatch(ids, mask), Needs("encoder", token))
            assert torch.equal(states.values[:, 0], whole[[0, 1], places]) and states.lengths == [1, 1]


def test_the_decoder_does_not_run_where_the_encoder_alone_is_read(tokenizer: Any) -> None:
    ran = []
    for name in SETTINGS:
        if "encoder_decoder" in READS[name]:
            model = reward_model("t5", tokenizer, name)
            model.backbone.decoder.register_forward_hook(lambda *_: ran.append(name))  # noqa: B023  # it runs in this turn
            scorer(model, tokenizer).raw_scores(PROMPTS[:1], ANSWERS[:1])
    assert set(ran) == {"last_token", "decoder_output", "attention_pooled_decoder", "weighted_layers"}


def test_whole_layers_do_not_stay_in_memory_where_one_token_is_read(tokenizer: Any) -> None:
    model = backbone("gpt2", tokenizer)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(block: Any, arguments: Any, result: Any) -> None:
        alive.append(sum(states() is not None for states in made))
        made.append(weakref.ref(result[0] if isinstance(result, tuple) else result))

    for block in find_blocks(model):
        model.get_submodule(block.prefix.rstrip(".")).register_forward_hook(note)
    batch = RewardBatch(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        backbone_states(model, batch, Needs("whole", "last", 3))
        assert max(alive) <= 1, "the layer below is an input, no other is needed any more"
    backbone_states(model, batch, Needs("whole", "last", 3))
    assert max(alive) == 2, "gradients need them all"


def test_no_hook_stays_behind_even_after_an_error(tokenizer: Any) -> None:
    model = backbone("gpt2", tokenizer)
    good = RewardBatch(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    backbone_states(model, good, Needs("whole", "all", 3))
    with pytest.raises(IndexError):
        backbone_states(model, good._replace(input_ids=torch.tensor([[5, 6, 7000]])), Needs("whole", "all", 3))
    assert not any(module._forward_hooks for module in model.h)


@pytest.mark.parametrize(("model_type", "name"), FITTING)
def test_states_of_rows_read_again_give_the_same_scores(model_type: str, name: ReadoutName, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, name)
    rows = inputs(model, tokenizer)
    batch = collate_rewards(rows, 0)
    with torch.no_grad():
        scores = model(*batch)
        kept = model.state_rows(batch)
        for row, states in zip(rows, kept, strict=True):
            tokens = len(row.input_ids) if model.needs.token == "all" else 1
            assert states.shape == (tokens, model.needs.layers, 16)
        torch.testing.assert_close(model.readout(collate_states(kept)), scores, rtol=0, atol=1e-6)
        order = [2, 0, 3, 1]
        torch.testing.assert_close(model.readout(collate_states([kept[row] for row in order])), scores[order], rtol=0, atol=1e-6)


def test_rows_of_states_make_a_batch_by_hand() -> None:
    rows = [torch.arange(4.0).view(2, 2, 1), torch.tensor([[[7.0], [8.0]]])]  # two tokens and one, of two layers
    states = collate_states(rows)
    assert states.values[..., 0].tolist() == [[0.0, 1.0], [2.0, 3.0], [7.0, 8.0]] and states.lengths == [2, 1]
    assert all(torch.equal(*pair) for pair in zip(states.rows(), rows, strict=True))


# --- which text enters where


@pytest.mark.parametrize("name", READS)
def test_prompt_and_answer_of_an_encoder_decoder_enter_the_encoder_but_for_its_last_token(name: ReadoutName, tokenizer: Any) -> None:
    if "encoder_decoder" not in READS[name]:
        return
    model = reward_model("t5", tokenizer, name)
    judge = scorer(model, tokenizer)
    [row] = [reward_inputs(judge.encoder, model.entry, Prompt("Who?"), "Nobody.")]
    prompt = tokenizer("Question: Who?\nAnswer:").input_ids
    if name == "last_token":
        assert (row.input_ids, row.decoder_input_ids) == (prompt, [0, *tokenizer("Nobody.").input_ids, 1])
    else:  # one text, as causal models read it
        assert row.input_ids == [*prompt, *tokenizer(" Nobody.").input_ids, 1]
        assert row.decoder_input_ids == ([0] if model.needs.part == "decoder" else None)


def test_entry_of_causal_models_and_encoders_is_one_text(tokenizer: Any) -> None:
    for model_type, name in FITTING:
        if model_type != "t5":
            assert reward_model(model_type, tokenizer, name).entry == Entry(False, None)


# --- invariants of scores


@pytest.mark.parametrize(("model_type", "name"), FITTING)
def test_padding_batch_and_order_change_no_score(model_type: str, name: ReadoutName, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, name, **({"hidden_sizes": [8]} if SETTINGS[name] else {}))
    judge = scorer(model, tokenizer)
    alone = scorer(model, tokenizer, batch_size=1).raw_scores(PROMPTS, ANSWERS)
    assert len({round(score, 5) for score in alone}) == len(alone)
    assert judge.raw_scores(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-6)
    assert judge.raw_scores(PROMPTS[::-1], ANSWERS[::-1])[::-1] == pytest.approx(alone, abs=1e-6)
    rows = inputs(model, tokenizer)
    with torch.no_grad():
        for padding_free in (False, True):
            model.set_padding_free(padding_free)
            assert model(*collate_rewards(rows, 0, pad_to=120)).tolist() == pytest.approx(alone, abs=1e-6)
            assert model(*collate_rewards(rows, 1)).tolist() == pytest.approx(alone, abs=1e-6)  # what is under the mask is not read


@pytest.mark.parametrize(("model_type", "name"), [("llama", name) for name in READS if "causal" in READS[name]] + FITTING[-8:])
def test_padding_on_the_left_changes_no_score_where_positions_are_relative(model_type: str, name: ReadoutName, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, name)
    batch = collate_rewards(inputs(model, tokenizer), 0)
    with torch.no_grad():
        expected = model(*batch)
        for padding_free in (False, True):
            model.set_padding_free(padding_free)
            torch.testing.assert_close(model(*padded_left(batch)), expected, rtol=0, atol=2e-6)


# --- what a readout makes of states


def test_poolings_by_hand() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]])
    attention = Attention(2)
    with torch.no_grad():
        attention.query.copy_(torch.tensor([0.5, 0.0]))
    near, far = math.exp(0.5), math.exp(1.5)  # of 1 * 0.5 and 3 * 0.5
    expected = [(1 * near + 3 * far) / (near + far), (2 * near + 6 * far) / (near + far)]
    assert attention(states[:, :2])[0].tolist() == pytest.approx(expected)
    two_layers = torch.stack([states[0, :2], 10 * states[0, :2]], 1)  # (T, L, D)
    logits = torch.stack([attention.logits(states[0, :2]), torch.zeros(2)], 1)
    found = weighted_mean(logits, two_layers)
    assert found[0].tolist() == pytest.approx(expected) and found[1].tolist() == pytest.approx([20.0, 40.0])
    weights = LayerWeights(3)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([0.0, 0.0, math.log(2.0)]))
    assert weights(states)[0].tolist() == pytest.approx([(1 + 3 + 2 * 9) / 4, (2 + 6 + 2 * 9) / 4])


def test_gated_attention_by_hand() -> None:
    attention = Attention(2, gate=1)
    assert attention.projection is not None
    with torch.no_grad():
        attention.projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # the gate reads the first feature, the value the second
        attention.query.fill_(2.0)
    vectors = torch.tensor([[[1.0, 3.0], [-1.0, 2.0]]])
    gelu = {1.0: 0.8413447, -1.0: -0.1586553}  # x times the normal distribution's probability below x
    logits = [2 * gelu[1.0] * 3.0, 2 * gelu[-1.0] * 2.0]
    share = 1 / (1 + math.exp(logits[1] - logits[0]))
    assert attention(vectors)[0].tolist() == pytest.approx([share - (1 - share), 3 * share + 2 * (1 - share)], abs=1e-5)


def test_mean_pool_is_the_score_of_the_normalised_mean_of_real_tokens() -> None:
    readout = build_readout(ReadoutSettings(name="mean_pool"), Needs("whole", "all"), 3, seed=0)
    with torch.no_grad():
        readout.score.weight.copy_(torch.tensor([[1.0, 3.0, 5.0]]))
    values = torch.tensor([[0.0, 3.0, 0.0], [6.0, 3.0, 0.0], [5.0, 0.0, 1.0]])[:, None]
    # the mean of the first row is (3, 3, 0): normalised (1, 1, -2) / sqrt(2); that of the second (3, -2, -1) / sqrt(14 / 3)
    assert readout(States(values, [2, 1])).tolist() == pytest.approx([-6 / math.sqrt(2), -8 / math.sqrt(14 / 3)])


@pytest.mark.parametrize(
    ("name", "gated", "attended", "layers"),
    [
        ("mean_pool", False, False, None),
        ("decoder_output", False, False, None),
        ("weighted_layers", False, False, LayerWeights),
        ("layerwise_attention", True, True, LayerWeights),
        ("full_attention_pooling", False, True, Attention),
        ("attention_pooled_encoder", False, False, Attention),
        ("attention_pooled_decoder", False, False, Attention),
    ],
)
def test_what_pools_tokens_and_layers(name: ReadoutName, gated: bool, attended: bool, layers: type | None) -> None:
    settings = ReadoutSettings(name=name, **({"attention_size": 5} if gated else {}))
    readout = build_readout(settings, Needs("whole", "all", 3 if settings.reads_layers else 1), 8, seed=0)
    assert isinstance(readout, Pooled)
    assert [attention.query.shape for attention in readout.tokens] == [(5 if gated else 8,)] * (3 if attended else 0)
    assert [attention.projection is not None for attention in readout.tokens] == [gated] * (3 if attended else 0)
    assert type(readout.layers) is (layers or type(None))


def test_layers_are_normalised_before_they_are_mixed() -> None:
    """A layer whose states are a million times larger counts no more than the others."""
    readout = build_readout(ReadoutSettings(name="weighted_layers"), Needs("whole", "last", 2), 4, seed=0)
    values = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    larger = values * torch.tensor([1e6, 1.0])[:, None]
    torch.testing.assert_close(readout(States(larger, [1, 1, 1])), readout(States(values, [1, 1, 1])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layerwise_attention", "full_attention_pooling"])
def test_tokens_are_normalised_before_they_are_weighed(name: ReadoutName) -> None:
    """Some transformers have single tokens with states a thousand times larger, which would take all the attention."""
    readout = build_readout(ReadoutSettings(name=name), Needs("whole", "all", 2), 4, seed=0)
    values = torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0))
    larger = values * torch.tensor([1.0, 1000.0, 1.0, 30.0, 1.0] * 2)[:, None, None]
    torch.testing.assert_close(readout(States(larger, [3, 5, 2])), readout(States(values, [3, 5, 2])), rtol=1e-4, atol=1e-5)


def test_the_head_has_hidden_layers_and_dropout_acts_in_training_alone(tokenizer: Any) -> None:
    model = reward_model("gpt_neo", tokenizer, "mean_pool", hidden_sizes=[12, 5], dropout=0.5)
    assert isinstance(model.readout, Pooled)
    assert [tuple(layer.weight.shape) for layer in model.readout.hidden] == [(12, 16), (5, 12)] and model.readout.score.in_features == 5
    batch = collate_rewards(inputs(model, tokenizer), 0)
    set_dropout(model.backbone, 0.0)
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(model(*batch), model(*batch))
        model.train()
        assert not torch.equal(model(*batch), model(*batch))
        dropped: list[int] = []
        model.readout.dropout.register_forward_hook(lambda _, arguments, __: dropped.append(arguments[0].shape[-1]))
        model(*batch)
    assert dropped == [16, 12, 5]  # before each layer of the head


@pytest.mark.parametrize("name", READS)
def test_readouts_compute_in_float32_over_bfloat16_states_and_under_autocast(name: ReadoutName) -> None:
    needs = Needs("whole", "all", 3 if ReadoutSettings(name=name).reads_layers else 1)
    readout = build_readout(ReadoutSettings(name=name), needs, 8, seed=0)
    values = torch.randn(5, needs.layers, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = [3, 2] if name in ("mean_pool", "layerwise_attention", "full_attention_pooling") else [1] * 5
    expected = readout(States(values.float(), lengths))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = readout(States(values, lengths))
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    assert all(parameter.dtype == torch.float32 for parameter in readout.parameters())


@pytest.mark.parametrize("model_type", ONE_OF_EACH_KIND)
def test_mixed_precision_reads_layers_of_unequal_types(model_type: str, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, "layerwise_attention")
    batch = collate_rewards(inputs(model, tokenizer), 0)
    expected = model(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(*batch)
        scores.sum().backward()
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05)
    assert scores.dtype == torch.float32 and not torch.equal(scores, expected)


# --- what is learnt


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("model_type", "name"), FITTING)
def test_gradients_reach_every_learnt_part(model_type: str, name: ReadoutName, recompute: bool, tokenizer: Any) -> None:
    gradients = []
    for again in (False, recompute):
        model = reward_model(model_type, tokenizer, name, **({"hidden_sizes": [8]} if SETTINGS[name] else {}))
        set_dropout(model.backbone, 0.0)
        if again:
            recompute_activations(model.backbone)
        model.set_padding_free(not again)
        scores = model.train()(*collate_rewards(inputs(model, tokenizer), 0))
        (scores * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
        read = model.backbone.encoder if model.needs.part == "encoder" else model.backbone
        for parameter in (*model.readout.parameters(), *read.parameters()):
            assert parameter.grad is not None
        assert all(float(parameter.grad.abs().max()) > 1e-7 for parameter in model.readout.parameters())  # type: ignore[union-attr]
    plain, other = gradients
    assert plain.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=2e-6 * largest, msg=key)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize(("model_type", "name"), [pair for pair in FITTING if pair[1] != "last_token"])
def test_fresh_scores_have_mean_0_and_spread_1(model_type: str, name: ReadoutName, scale: float, tokenizer: Any) -> None:
    """Over seeds of the head; `scale`: states as large as those inside of a trained T5."""
    for hidden_sizes in ([], [32]):
        settings = ReadoutSettings(name=name, hidden_sizes=hidden_sizes)
        model = RewardModel(backbone(model_type, tokenizer), settings, seed=0).eval()
        with torch.no_grad():
            states = collate_states([scale * rows for rows in model.state_rows(collate_rewards(inputs(model, tokenizer), 0))])
            scores = torch.stack([build_readout(settings, model.needs, 16, seed)(states) for seed in range(200)])  # (seeds, B)
        assert scores.mean(0).abs().max() < 0.25  # 3.5 standard errors
        assert scores.std(0).min() > 0.8 and scores.std(0).max() < 1.2


def test_fresh_weights_depend_on_the_seed_alone(tokenizer: Any) -> None:
    for name in READS:
        settings = ReadoutSettings(name=name, **({"hidden_sizes": [4]} if SETTINGS[name] else {}))
        needs = Needs("whole", "all", 2 if settings.reads_layers else 1)
        first, again, other = (build_readout(settings, needs, 8, seed).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["score.weight"], other["score.weight"])


# --- saving, loading, adapters


@pytest.mark.parametrize(("model_type", "name"), FITTING)
def test_saved_and_loaded_scores_are_equal(model_type: str, name: ReadoutName, tokenizer: Any, tmp_path: Path) -> None:
    more = {key: value for key, value in {"n_layers": 2, "hidden_sizes": [6], "attention_size": 4}.items() if key in SETTINGS[name]}
    model = reward_model(model_type, tokenizer, name, **more)
    expected = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("reward_regression", tokenizer, max_length=128))
    assert RewardScorer(folder, batch_size=4).raw_scores(PROMPTS, ANSWERS) == expected
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.readout == {"name": name, **({"dropout": 0.0} if SETTINGS[name] else {}), **more}
    assert (folder / "readout.safetensors").exists() == ((model_type, name) != ("gpt_neo", "last_token"))


def test_another_readout_than_the_saved_one_is_refused_and_dropout_is_no_other(tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model("gpt_neo", tokenizer, "weighted_layers", n_layers=2)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, new_manifest("reward_regression", tokenizer, max_length=128))
    again = RewardModel.load(folder, readout_settings=ReadoutSettings(name="weighted_layers", n_layers=2, dropout=0.3))
    assert isinstance(again.readout, Pooled) and again.readout.dropout.p == 0.3
    for other in (ReadoutSettings(name="weighted_layers"), ReadoutSettings(name="mean_pool"), ReadoutSettings()):
        with pytest.raises(UserError, match=r"has the readout .*weighted_layers.*, but the config asks for"):
            RewardModel.load(folder, readout_settings=other)


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "layerwise_attention"), ("t5", "attention_pooled_decoder"), ("t5", "mean_pool")]
)
def test_adapters_are_read_through(model_type: str, name: ReadoutName, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, name)
    before = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    model.backbone = add_lora(model.backbone, LoraSettings(r=2), seed=3)
    assert scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS) == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.02)
    adapted = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    assert max(abs(a - b) for a, b in zip(before, adapted, strict=True)) > 1e-3


# --- what makes no sense


def test_the_table_of_readouts_is_complete() -> None:
    assert set(READS) == set(SETTINGS) == set(get_args(ReadoutName))
    assert len(FITTING) + len(SENSELESS) == 3 * len(READS) and len(SENSELESS) == 5


@pytest.mark.parametrize(("model_type", "name"), SENSELESS)
def test_a_senseless_readout_is_refused(model_type: str, name: ReadoutName, tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=rf"model_params.readout.name: got {name}, which makes no sense over an? .*expected one of: last_token"
    ):
        reward_model(model_type, tokenizer, name)


def test_more_layers_than_there_are_are_refused(tokenizer: Any) -> None:
    for model_type, name, layers in (
        ("gpt2", "weighted_layers", 3), ("t5", "layerwise_attention", 3), ("t5", "attention_pooled_decoder", 2),
    ):  # fmt: skip
        config = backbone(model_type, tokenizer).config
        settings = {n: ReadoutSettings(name=name, n_layers=n) for n in (layers, layers + 1)}  # type: ignore[arg-type]
        assert readout_needs(settings[layers], config).layers == layers
        with pytest.raises(UserError, match=f"n_layers: got {layers + 1}, expected at most the model's {layers} layers"):
            readout_needs(settings[layers + 1], config)


def test_layers_wider_than_the_final_states_are_not_mixed_with_them(tokenizer: Any) -> None:
    config = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 8}
    model = build_backbone(ModelInit(model_type="opt", config=config), tokenizer, 128, 0)
    RewardModel(model, ReadoutSettings(name="mean_pool"), seed=0)
    with pytest.raises(UserError, match="the layers have 16 features and the final states 8"):
        RewardModel(model, ReadoutSettings(name="layerwise_attention"), seed=0)


def test_kinds_told_by_a_configuration_alone_are_those_of_the_models() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from common.model_source import _KIND_OF_TYPE, kind_in, layers_in

    for model_type, kind in _KIND_OF_TYPE.items():
        if model_type in CONFIG_MAPPING:
            config = CONFIG_MAPPING[model_type]()
            assert backbone_kind(config) == kind == kind_in(config.to_dict()) == kind_in({"model_type": model_type}), model_type
            for part in ("encoder", "decoder") if kind == "encoder_decoder" else ("whole",):
                assert layers_in(config.to_dict(), part) == layer_count(config, part), model_type  # type: ignore[arg-type]
    assert kind_in({"model_type": "bert", "is_decoder": True}) == "causal" and kind_in({"model_type": "none_of_these"}) is None


def test_normalised_vectors_have_mean_square_1_whatever_their_scale() -> None:
    for scale in (1e-4, 1.0, 1e6):
        vectors = normalised(scale * torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
        assert vectors.mean().item() == pytest.approx(0.0, abs=1e-6) and vectors.square().mean().item() == pytest.approx(1.0, abs=1e-4)
