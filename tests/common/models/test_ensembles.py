"""Ensembles of readouts: their score by hand, members that do not know of one another, and the way to disk and back."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint import new_manifest, read_manifest, save_model_directory, verify_directory
from common.errors import UserError
from common.models.backbone import States, collate_rewards, collate_states, reward_inputs
from common.models.load import build_backbone, train_tokenizer
from common.models.readouts import Ensemble, LastToken, build_readout
from common.models.reward import RewardModel, RewardScorer
from common.readout_settings import Needs, ReadoutSettings
from common.records import Prompt
from common.schema import ModelInit
from common.score_transform import ScoreTransform

MODELS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neo", {"name": "last_token"}),
    ("gpt_neo", {"name": "layerwise_attention", "attention_size": 8, "hidden_sizes": [8]}),
    ("t5", {"name": "mean_pool"}),
]
PROMPTS = [Prompt("What is the capital of France?"), Prompt("Who?"), Prompt("Why do cats sleep so much?")]
ANSWERS = ["Paris, which lies on the Seine.", "Nobody.", "They hunt."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"Question: {prompt.question}\nAnswer: {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], 300)


def reward_model(model_type: str, tokenizer: Any, **readout: Any) -> RewardModel:
    backbone = build_backbone(ModelInit(model_type=model_type, config=MODELS[model_type]), tokenizer, 128, 0)
    return RewardModel.from_backbone(backbone, ReadoutSettings.model_validate(readout), seed=1).eval()


def scorer(model: RewardModel, tokenizer: Any, batch_size: int = 4, **more: Any) -> RewardScorer:
    manifest = new_manifest("reward_classification", tokenizer, max_length=128, **more)
    return RewardScorer(model, tokenizer=tokenizer, manifest=manifest, batch_size=batch_size)


def rows(judge: RewardScorer) -> list[Any]:
    return [reward_inputs(judge.encoder, judge.model.entry, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]


def test_the_score_is_the_mean_of_the_members_by_hand() -> None:
    ensemble = Ensemble([LastToken(2), LastToken(2)])
    for member, weight in zip(ensemble.members, ([1.0, 10.0], [3.0, 0.0]), strict=True):
        member.score.weight.data.copy_(torch.tensor([weight]))
    states = States(torch.tensor([[4.0, 5.0], [2.0, 3.0]])[:, None], [1, 1])
    assert ensemble.member_scores(states).tolist() == [[54.0, 12.0], [32.0, 6.0]]
    assert ensemble(states).tolist() == [33.0, 19.0]
    weight = ensemble.linear_weight()
    assert weight is not None and weight.tolist() == [[2.0, 5.0]]


@pytest.mark.parametrize("settings", [{"name": "last_token"}, {"name": "full_attention_pooling", "hidden_sizes": [4]}])
def test_the_first_member_starts_as_the_readout_alone_and_the_others_differ(settings: dict[str, Any]) -> None:
    needs = Needs("whole", "all", layers=2 if settings["name"] != "last_token" else 1)
    alone = build_readout(ReadoutSettings.model_validate(settings), needs, 8, seed=5)
    one = build_readout(ReadoutSettings.model_validate({**settings, "ensemble": 1}), needs, 8, seed=5)
    three = build_readout(ReadoutSettings.model_validate({**settings, "ensemble": 3}), needs, 8, seed=5)
    assert type(one) is type(alone) and isinstance(three, Ensemble) and len(three.members) == 3
    for name, tensor in alone.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor)
        members = [member.state_dict()[name] for member in three.members]
        assert torch.equal(members[0], tensor)
        assert not name.endswith("weight") or not any(torch.equal(members[a], members[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_settings_name_an_ensemble_only_where_there_is_one() -> None:
    assert ReadoutSettings(ensemble=1).model_dump() == ReadoutSettings().model_dump() == {"name": "last_token"}
    assert ReadoutSettings(ensemble=2, bootstrap=True).shape == {"name": "last_token", "ensemble": 2}
    with pytest.raises(ValueError, match="bootstrap"):
        ReadoutSettings(bootstrap=True)


@pytest.mark.parametrize(("model_type", "settings"), CASES)
def test_padding_batches_and_order_change_no_members_score(model_type: str, settings: dict[str, Any], tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, **settings, ensemble=3)
    judge = scorer(model, tokenizer)
    inputs = rows(judge)
    alone = scorer(model, tokenizer, batch_size=1).score_members(inputs)
    assert alone.shape == (3, 3) and len({round(score, 4) for score in alone.flatten().tolist()}) == 9
    torch.testing.assert_close(judge.score_members(inputs[::-1]).flip(0), alone, rtol=0, atol=1e-6)
    with torch.no_grad():
        for padding_free in (False, True):
            model.set_padding_free(padding_free)
            padded = collate_rewards(inputs, 0, pad_to=100)
            torch.testing.assert_close(model.member_scores(padded).double(), alone, rtol=0, atol=1e-6)
            torch.testing.assert_close(model(*padded).double(), alone.mean(1), rtol=0, atol=1e-6)
            known = collate_states(model.state_rows(padded))
            torch.testing.assert_close(model.scores(known).double(), alone.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("model_type", "settings"), CASES)
def test_gradients_reach_every_member_and_are_those_of_the_member_alone(model_type: str, settings: dict[str, Any], tokenizer: Any) -> None:
    model = reward_model(model_type, tokenizer, **settings, ensemble=3)
    batch = collate_rewards(rows(scorer(model, tokenizer)), 0)
    states = collate_states(model.state_rows(batch))
    states = States(states.values.detach(), states.lengths)
    target = torch.tensor([1.0, -1.0, 0.5])

    def loss(scores: Tensor) -> Tensor:
        return ((scores - target[:, None]) ** 2).sum() / scores.shape[1]

    loss(model.member_scores(states)).backward()
    ensemble = model.readout
    assert isinstance(ensemble, Ensemble)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ensemble.parameters())
    alone = build_readout(ReadoutSettings.model_validate(settings), model.needs, 16, seed=0)
    for member in ensemble.members:
        alone.load_state_dict(member.state_dict())
        alone.zero_grad()
        loss(alone.member_scores(states)).backward()
        for (name, got), expected in zip(member.named_parameters(), alone.parameters(), strict=True):
            assert got.grad is not None and expected.grad is not None
            torch.testing.assert_close(got.grad, expected.grad / 3, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("model_type", "settings"), CASES)
def test_saved_and_loaded_members_are_equal(model_type: str, settings: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model(model_type, tokenizer, **settings, ensemble=2, bootstrap=True)
    manifest = new_manifest("reward_classification", tokenizer, max_length=128)
    folder = save_model_directory(tmp_path / "m", model, tokenizer, manifest)
    assert verify_directory(folder) == [] and (folder / "readout.safetensors").is_file()
    assert "RewardModel.load" in (folder / "README.md").read_text()
    saved = read_manifest(folder)
    assert saved is not None and saved.readout is not None and saved.readout["ensemble"] == 2
    loaded = RewardScorer(folder)
    torch.testing.assert_close(loaded.score_members(rows(loaded)), scorer(model, tokenizer).score_members(rows(loaded)), rtol=0, atol=1e-6)
    asked = ReadoutSettings.model_validate({**settings, "ensemble": 2})  # without bootstrap: training alone knows it
    assert RewardModel.load(folder, readout_settings=asked).members == 2
    with pytest.raises(UserError, match="has the readout"):
        RewardModel.load(folder, readout_settings=ReadoutSettings.model_validate({**settings, "ensemble": 3}))


def test_members_are_judged_from_their_own_zero(tokenizer: Any) -> None:
    """A member whose scores lie 5 above the model's on the training set does not disagree by that."""
    model = reward_model("gpt_neo", tokenizer, ensemble=2)
    transform = ScoreTransform(name="standardize", shift=3.0, scale=2.0)
    plain = scorer(model, tokenizer, score_transform=transform)
    raw = plain.score_members(rows(plain)).tolist()
    means = {"score_mean": 1.0, "score_scale": 1.0, "member_means": [6.0, -4.0]}
    shifted = scorer(model, tokenizer, score_transform=transform, **means).judge(PROMPTS, ANSWERS)
    for values, as_it_is, answer in zip(raw, plain.judge(PROMPTS, ANSWERS), shifted, strict=True):
        final = [2.0 * value + 3.0 for value in values]
        assert as_it_is.members == pytest.approx(final)
        assert answer.members == pytest.approx([final[0] - 5.0, final[1] + 5.0])
        assert answer.score == as_it_is.score == pytest.approx(statistics.fmean(final))
        assert answer.spread == pytest.approx(abs(final[0] - final[1] - 10.0) / 2)
    assert plain.score(PROMPTS, ANSWERS) == [answer.score for answer in shifted]
    assert plain.judge([], []) == []
