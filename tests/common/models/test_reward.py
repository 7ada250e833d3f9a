"""Reward models: which text enters where, which token is read, and the same score through every door."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from common import chunks
from common.checkpoint import new_manifest, read_manifest, save_model_directory, verify_directory
from common.errors import UserError
from common.freezing import apply_freezing, freeze_eval
from common.lora import add_lora
from common.models.backbone import Entry, RewardInput, States, collate_rewards, decoder_start, reward_inputs, token_position
from common.models.kinds import backbone_kind
from common.models.load import build_backbone, build_generator, set_dropout, train_tokenizer
from common.models.modes import evaluating
from common.models.packed import Line
from common.models.readouts import LastToken, ScoreHead
from common.models.recompute import recompute_activations
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import ReadoutSettings
from common.records import Prompt
from common.schema import FreezeSettings, LoraSettings, ModelInit
from common.score_transform import ScoreTransform
from common.tokenization import Encoder

CAUSAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 8},
}
OTHERS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
SIZES = CAUSAL | OTHERS
PROMPTS = [Prompt("What is the capital of France?"), Prompt("Who?"), Prompt("Why do cats, of all animals, sleep so much?"), Prompt("1 + 1")]
ANSWERS = ["Paris, which lies on the Seine and is very old.", "Nobody.", "They hunt.", "2"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"Question: {prompt.question}\nAnswer: {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], 300)


def reward_model(model_type: str, tokenizer: Any, *, seed: int = 1) -> RewardModel:
    backbone = build_backbone(ModelInit(model_type=model_type, config=SIZES[model_type]), tokenizer, 128, 0)
    return RewardModel.from_backbone(backbone, seed=seed).eval()


def manifest(tokenizer: Any, **more: Any) -> Any:
    return new_manifest("reward_regression", tokenizer, max_length=128, **more)


def scorer(model: RewardModel, tokenizer: Any, batch_size: int = 4, **more: Any) -> RewardScorer:
    return RewardScorer(model, tokenizer=tokenizer, manifest=manifest(tokenizer, **more), batch_size=batch_size)


# --- readout and head


def test_last_position_by_hand_on_both_sides() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert token_position(mask, "last").tolist() == [1, 3, 3, 0]
    assert token_position(mask, "first").tolist() == [0, 2, 0, 0]


def test_last_token_is_a_linear_head_by_hand() -> None:
    readout = LastToken(2)
    with torch.no_grad():
        readout.score.weight.copy_(torch.tensor([[1.0, 10.0]]))
    states = States(torch.tensor([[4.0, 5.0], [2.0, 3.0]])[:, None], [1, 1])
    assert readout(states).tolist() == [54.0, 32.0]


def test_head_has_no_bias_and_its_spread() -> None:
    size = 99
    weights = torch.cat([ScoreHead(size, torch.Generator().manual_seed(seed)).weight for seed in range(200)]).flatten()
    assert ScoreHead(size).bias is None
    assert weights.std().item() == pytest.approx(1 / math.sqrt(size + 1), rel=0.02)
    assert abs(weights.mean().item()) < 0.003


def test_head_depends_on_the_seed_alone(tokenizer: Any) -> None:
    torch.manual_seed(1)
    first = reward_model("gpt2", tokenizer, seed=5)
    torch.manual_seed(2)
    second, other = reward_model("gpt2", tokenizer, seed=5), reward_model("gpt2", tokenizer, seed=6)
    assert torch.equal(first.readout.score.weight, second.readout.score.weight)
    assert not torch.equal(first.readout.score.weight, other.readout.score.weight)


def test_head_stays_float32_over_a_bfloat16_backbone_and_under_autocast(tokenizer: Any) -> None:
    model = reward_model("llama", tokenizer)
    ids, mask = torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, mask).dtype == torch.float32
    model.backbone.to(torch.bfloat16)
    scores = model(ids, mask)
    assert scores.dtype == torch.float32 and model.readout.score.weight.dtype == torch.float32
    state = model.backbone(ids).last_hidden_state[:, -1].float()
    assert torch.equal(scores, (state @ model.readout.score.weight.T)[:, 0])


# --- which text enters where


def test_kinds(tokenizer: Any) -> None:
    kinds = {model_type: backbone_kind(reward_model(model_type, tokenizer).config) for model_type in SIZES}
    assert kinds == {model_type: "causal" for model_type in CAUSAL} | {"bert": "encoder", "t5": "encoder_decoder"}


def test_inputs_of_causal_models_and_encoder_decoders(tokenizer: Any) -> None:
    prompt_ids = tokenizer("Question: Who?\nAnswer:").input_ids
    for model_type in ("gpt2", "t5"):
        model = reward_model(model_type, tokenizer)
        config = model.config
        encoder = Encoder(tokenizer, prompt_format="qa", max_length=128, is_encoder_decoder=config.is_encoder_decoder)
        for ended, tail in ((True, [1]), (False, [])):
            row = reward_inputs(encoder, model.entry, Prompt("Who?"), "Nobody.", ended=ended)
            if model_type == "gpt2":
                assert row == RewardInput([*prompt_ids, *tokenizer(" Nobody.").input_ids, *tail])
            else:  # the answer begins a sequence of its own, so no space stands before it
                assert row == RewardInput(prompt_ids, [decoder_start(config), *tokenizer("Nobody.").input_ids, *tail])
                assert decoder_start(config) == 0


def test_an_answer_that_was_cut_has_no_end_to_lose(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, prompt_format="qa", max_length=24)
    ended, cut = (reward_inputs(encoder, Entry(), Prompt("Who?"), "Nobody. " * 20, ended=flag) for flag in (True, False))
    assert ended == cut and ended.length == 24 and ended.input_ids[-1] != 1


@pytest.mark.parametrize("model_type", SIZES)
def test_score_is_the_state_of_the_unpadded_row(model_type: str, tokenizer: Any) -> None:
    """Computed without our collating and readout: one row, no mask, the state at its end (encoder: its start) times the head."""
    model = reward_model(model_type, tokenizer)
    judge = scorer(model, tokenizer)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        row = reward_inputs(judge.encoder, model.entry, prompt, answer)
        more = {} if row.decoder_input_ids is None else {"decoder_input_ids": torch.tensor([row.decoder_input_ids])}
        with torch.no_grad():
            states = model.backbone(torch.tensor([row.input_ids]), **more).last_hidden_state[0]
            expected.append(float(model.readout.score.weight[0] @ states[0 if model_type == "bert" else -1]))
    assert judge.raw_scores(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-6)


# --- invariants


@pytest.mark.parametrize("model_type", SIZES)
def test_padding_batch_size_and_order_change_no_score(model_type: str, tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer)
    judge = scorer(model, tokenizer)
    alone = scorer(model, tokenizer, batch_size=1).raw_scores(PROMPTS, ANSWERS)
    assert judge.raw_scores(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-6)
    assert judge.raw_scores(PROMPTS[::-1], ANSWERS[::-1])[::-1] == pytest.approx(alone, abs=1e-6)
    rows = [reward_inputs(judge.encoder, model.entry, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        assert model(*collate_rewards(rows, 0, pad_to=120)).tolist() == pytest.approx(alone, abs=1e-6)
        # What stands under the mask does not matter, not even EOS.
        assert model(*collate_rewards(rows, 1)).tolist() == pytest.approx(alone, abs=1e-6)
    assert len({round(score, 5) for score in alone}) == len(alone)


def test_ended_adds_the_end_and_changes_the_score(tokenizer: Any) -> None:
    judge = scorer(reward_model("gpt_neo", tokenizer), tokenizer)
    ended, cut = (judge.raw_scores(PROMPTS[:1], ANSWERS[:1], [flag])[0] for flag in (True, False))
    assert abs(ended - cut) > 1e-3
    assert judge.raw_scores(PROMPTS[:1], ANSWERS[:1]) == [ended]
    mixed = judge.raw_scores(PROMPTS[:1] * 2, ANSWERS[:1] * 2, [False, True])
    assert mixed == pytest.approx([cut, ended], abs=1e-6)


def test_strings_are_questions_and_lengths_must_agree(tokenizer: Any) -> None:
    judge = scorer(reward_model("gpt2", tokenizer), tokenizer)
    assert judge.score(["Who?"], ["Nobody."]) == judge.score([Prompt("Who?")], ["Nobody."])
    assert judge.score([], []) == []
    with pytest.raises(ValueError, match="1 prompts, 2 responses"):
        judge.score(["Who?"], ["a", "b"])


def test_transform_is_undone_in_scores_and_left_on_in_raw_ones(tokenizer: Any) -> None:
    judge = scorer(reward_model("gpt2", tokenizer), tokenizer, score_transform=ScoreTransform(name="standardize", shift=3.0, scale=2.0))
    raw, final = judge.raw_scores(PROMPTS, ANSWERS), judge.score(PROMPTS, ANSWERS)
    assert final == pytest.approx([2.0 * score + 3.0 for score in raw], abs=1e-12)


def test_scoring_leaves_the_modes_of_a_model_in_training_alone(tokenizer: Any) -> None:
    model = reward_model("gpt2", tokenizer)
    judge = scorer(model, tokenizer)
    frozen = FreezeSettings(**{f"freeze_{group}": True for group in ("emb", "ln", "attn", "ff", "other")}, layers_not_to_freeze=[1])
    apply_freezing(model, frozen, always_train=RewardModel.HEAD_PREFIXES)
    model.train()
    freeze_eval(model)
    modes = [module.training for module in model.modules()]
    assert judge.score(PROMPTS, ANSWERS) == judge.score(PROMPTS, ANSWERS)  # dropout is off
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


# --- saving and loading


def save(model: RewardModel, tokenizer: Any, folder: Path, **more: Any) -> Path:
    return save_model_directory(folder, model, tokenizer, manifest(tokenizer, **more))


@pytest.mark.parametrize("model_type", SIZES)
def test_saved_and_loaded_scores_are_equal(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model(model_type, tokenizer)
    expected = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    folder = save(model, tokenizer, tmp_path / "m", score_mean=0.5, score_scale=2.0)
    assert verify_directory(folder) == []
    loaded = RewardScorer(folder, batch_size=4)
    assert loaded.raw_scores(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-6)
    assert (loaded.score_mean, loaded.score_scale) == (0.5, 2.0)
    saved = read_manifest(folder)
    assert saved is not None and saved.readout == {"name": "last_token"}


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_model_whose_scores_are_all_alike_has_nothing_to_divide_by(tokenizer: Any, scale: float) -> None:
    alike = manifest(tokenizer, score_mean=0.5, score_scale=scale)
    judge = RewardScorer(reward_model("gpt_neo", tokenizer), tokenizer=tokenizer, manifest=alike)
    assert judge.knows_its_scale and (judge.score_mean, judge.score_scale) == (0.5, 1.0)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_plain_transformers_give_the_same_raw_scores(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    """With padding and EOS, in one batch of mixed lengths, tokenized without our code."""
    model = reward_model(model_type, tokenizer)
    folder = save(model, tokenizer, tmp_path / "m", score_transform=ScoreTransform(name="standardize", shift=3.0, scale=2.0))
    plain, plain_tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        parts = plain_tokenizer(f"Question: {prompt.question}\nAnswer:").input_ids, plain_tokenizer(" " + answer).input_ids
        rows.append({"input_ids": [*parts[0], *parts[1], plain_tokenizer.eos_token_id]})
    batch = plain_tokenizer.pad(rows, return_tensors="pt")
    assert len({len(row["input_ids"]) for row in rows}) > 2
    with torch.no_grad():
        scores = plain(**batch).logits[:, 0].tolist()
    assert scores == pytest.approx(RewardScorer(folder).raw_scores(PROMPTS, ANSWERS), abs=1e-6)
    assert scores == pytest.approx(scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS), abs=1e-6)
    assert plain.score.bias is None and plain.config.num_labels == 1


def test_model_card_names_the_class_that_loads_it(tokenizer: Any, tmp_path: Path) -> None:
    causal = save(reward_model("llama", tokenizer), tokenizer, tmp_path / "causal")
    assert "AutoModelForSequenceClassification.from_pretrained" in (causal / "README.md").read_text()
    encoder = save(reward_model("bert", tokenizer), tokenizer, tmp_path / "encoder")
    assert "RewardModel.load" in (encoder / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["gpt_neo", "llama", "t5"])
def test_adapters_are_merged_into_what_is_saved(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model(model_type, tokenizer)
    before = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    model.backbone = add_lora(model.backbone, LoraSettings(r=2), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.02)
    expected = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    folder = save(model, tokenizer, tmp_path / "m")
    assert RewardScorer(folder).raw_scores(PROMPTS, ANSWERS) == pytest.approx(expected, abs=2e-6)
    assert scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS) == expected  # the model in training is as it was
    assert max(abs(a - b) for a, b in zip(before, expected, strict=True)) > 1e-2
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_training_starts_from_a_generator_with_a_fresh_head_and_from_a_reward_model_with_its_own(tokenizer: Any, tmp_path: Path) -> None:
    generator = build_generator(ModelInit(config=CAUSAL["gpt_neo"]), tokenizer, 128, 7)
    folder = save_model_directory(tmp_path / "sft", generator, tokenizer, new_manifest("sft", tokenizer))
    fresh = RewardModel.start(str(folder), seed=1)
    assert torch.equal(fresh.backbone.wte.weight, generator.transformer.wte.weight)
    assert torch.equal(fresh.readout.score.weight, reward_model("gpt_neo", tokenizer, seed=1).readout.score.weight)
    again = RewardModel.start(str(save(fresh, tokenizer, tmp_path / "reward")), seed=2)
    assert torch.equal(again.readout.score.weight, fresh.readout.score.weight)


def test_what_is_no_reward_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    generator = build_generator(ModelInit(config=CAUSAL["gpt_neo"]), tokenizer, 128, 7)
    folder = save_model_directory(tmp_path / "sft", generator, tokenizer, new_manifest("sft", tokenizer))
    with pytest.raises(UserError, match="has no reward head"):
        RewardModel.load(folder)
    reward = save(reward_model("gpt_neo", tokenizer), tokenizer, tmp_path / "reward")
    with pytest.raises(UserError, match="has the readout"):
        RewardModel.load(reward, readout_settings=ReadoutSettings(name="mean_pool"))
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0, num_labels=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="GPT2ForSequenceClassification with 3 outputs"):
        RewardModel.load(tmp_path / "classifier")


def test_reward_model_of_other_hands_is_read(tokenizer: Any, tmp_path: Path) -> None:
    """A causal sequence classifier with one output, without manifest: raw scores, prompt format qa."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, pad_token_id=0, num_labels=1)
    plain = GPT2ForSequenceClassification(config).eval()
    plain.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    judge = RewardScorer(tmp_path / "m")
    rows = [reward_inputs(judge.encoder, judge.model.entry, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    batch = collate_rewards(rows, 0)
    with torch.no_grad():
        expected = plain(batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, 0].tolist()
    assert judge.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-6)


def test_saved_reward_model_is_no_generator_but_its_trunk_is_intact(tokenizer: Any, tmp_path: Path) -> None:
    folder = save(reward_model("gpt_neo", tokenizer), tokenizer, tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPTNeoForSequenceClassification"]
    trunk = AutoModelForCausalLM.from_pretrained(folder).transformer
    assert torch.equal(trunk.wte.weight, reward_model("gpt_neo", tokenizer).backbone.wte.weight)


# --- training


@pytest.mark.parametrize("model_type", SIZES)
def test_gradients_reach_head_and_backbone_also_when_activations_are_recomputed(model_type: str, tokenizer: Any) -> None:
    gradients = []
    for recompute in (False, True):
        model = reward_model(model_type, tokenizer)
        judge = scorer(model, tokenizer)
        if recompute:
            recompute_activations(model.backbone)
        set_dropout(model.backbone, 0.0)
        model.train()
        rows = [reward_inputs(judge.encoder, model.entry, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
        model(*collate_rewards(rows, 0)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and "readout.score.weight" in plain and len(plain) > 5
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
def test_reading_without_padding_changes_no_score_and_no_gradient(
    model_type: str, recompute: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several answers to one question among the rows: a line has the question once."""
    monkeypatch.setitem(chunks.FORWARD_TOKENS, "cpu", 4)  # or so few tokens would share one forward
    model = reward_model(model_type, tokenizer)
    judge = scorer(model, tokenizer)
    set_dropout(model.backbone, 0.0)
    if recompute:
        recompute_activations(model.backbone)
    asked = [
        (PROMPTS[place], answer) for place, answer in ((0, ANSWERS[0]), (0, ANSWERS[1]), (1, ANSWERS[1]), (2, ANSWERS[2]), (0, "Rome."))
    ]
    batch = collate_rewards([reward_inputs(judge.encoder, model.entry, *pair) for pair in asked], 0)
    found = []
    for padding_free in (True, False):
        model.set_padding_free(padding_free)
        model.train().zero_grad()
        scores = model(*batch)
        (scores * torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0])).sum().backward()
        found.append([scores.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    (got, *gradients), (expected, *exact) = found
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in exact)
    torch.testing.assert_close(gradients, exact, rtol=1e-5, atol=2e-6 * largest)


def test_rows_share_a_question_only_where_no_dropout_makes_their_states_differ(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    states = Line.states
    monkeypatch.setattr(Line, "states", lambda line, trunk: (read.append(line.ids.numel()), states(line, trunk))[1])
    model = reward_model("gpt_neo", tokenizer)
    judge = scorer(model, tokenizer)
    batch = collate_rewards([reward_inputs(judge.encoder, model.entry, PROMPTS[0], answer) for answer in ANSWERS], 0)
    question = len(judge.encoder.prompt(PROMPTS[0]))
    set_dropout(model.backbone, 0.1)
    model(*batch)
    model.train()(*batch)
    set_dropout(model.backbone, 0.0)
    model(*batch)
    tokens = int(batch.attention_mask.sum())
    evaluating, dropping, without_dropout = read[-3:]  # before them the model was tried
    assert dropping == tokens and evaluating == without_dropout <= tokens - 3 * question


def test_an_empty_answer_is_judged_and_not_refused(tokenizer: Any) -> None:
    for model_type in ("gpt_neo", "t5"):
        judge = scorer(reward_model(model_type, tokenizer), tokenizer)
        empty, full = judge.score(["Who?", "Who?"], ["", "Nobody."])
        assert math.isfinite(empty) and empty != full
        assert math.isfinite(judge.score(["Who?"], [""], [False])[0])


def test_an_offloaded_model_is_on_its_device_only_while_it_scores(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model("gpt_neo", tokenizer)
    expected = scorer(model, tokenizer).raw_scores(PROMPTS, ANSWERS)
    moves: list[str] = []
    monkeypatch.setattr(RewardModel, "to", lambda self, place: moves.append(str(place)) or self)
    judge = RewardScorer(model, tokenizer=tokenizer, manifest=manifest(tokenizer), device="cpu:0", offload=True)
    assert moves == ["cpu"]
    assert judge.raw_scores(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-6) and moves == ["cpu", "cpu:0", "cpu"]
    monkeypatch.setattr(RewardModel, "member_scores", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge.raw_scores(PROMPTS, ANSWERS)
    assert moves[-2:] == ["cpu:0", "cpu"]
