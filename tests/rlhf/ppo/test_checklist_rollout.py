"""Details 10 to 15 of docs/ppo_checklist.md: what is sampled, where it ends, and which numbers belong to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.decoding import eos_ids, read_answers
from common.launch.runtime import Runtime
from common.lora import add_lora
from common.record_types import Prompt, PromptRecord
from common.sampling import filter_logits
from common.schema import GenerateParams, LoraSettings
from rlhf.config import PPOGeneration
from rlhf.ppo import PPOTrainer
from rlhf.ppo.answers import gather_answers
from rlhf.ppo.models import with_value_head
from rlhf.ppo.prompts import EncodedPrompt
from rlhf.ppo.rewards import penalised_scores
from rlhf.ppo.rollout import collect_rollout
from rlhf.ppo.sharing import score_rollout
from rlhf.reward_pipelines.build import RewardPipeline
from rlhf.reward_pipelines.part import Answers, RewardPart

SAMPLED = GenerateParams(do_sample=True, max_new_tokens=6)
Build = Callable[..., PPOTrainer]
Write = Callable[[list[list[int]]], None]


def ends_at(*tokens: int, **options: Any) -> GenerateParams:
    """Four tokens at most, ended by these instead of the tokenizer's EOS."""
    return GenerateParams.model_validate({"do_sample": True, "max_new_tokens": 4, "eos_token_id": list(tokens), **options})


# --- 10 ---------------------------------------------------------------------------------------------------------------------------


def test_10_sampling_is_pure_unless_told_otherwise() -> None:
    usual = PPOGeneration()
    assert (usual.do_sample, usual.top_k, usual.top_p, usual.temperature, usual.repetition_penalty) == (True, 0, 1.0, 1.0, 1.0)
    logits = torch.tensor([[0.0, -50.0, 3.0, 1.0]])
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, 2.0), torch.tensor([[0.0, -25.0, 1.5, 0.5]]))


@pytest.mark.parametrize("penalty", ["kl", "full"])
def test_10_the_temperature_divides_the_logits_in_rollout_reference_and_update(
    penalty: str, build: Build, batch: Any, make_model: Any
) -> None:
    """A model with halved logits, at temperature 1, is the model at temperature 2."""

    def model(seed: int, factor: float) -> Any:
        made = make_model("gpt2", seed, tie_word_embeddings=False)
        with torch.no_grad():
            made.lm_head.weight *= factor
        return made

    def run(factor: float, temperature: float) -> tuple[Any, dict[str, Any]]:
        settings = {"kl_penalty": penalty, "learning_rate": 0.0, "ppo_epochs": 2, "entropy_coef": 0.1}
        trainer = build(model(0, factor), reference=model(4, factor), **settings)
        params = SAMPLED.model_copy(update={"temperature": temperature})
        rollout = trainer.rollout(batch.queries, params, seed=3)
        stats = trainer.step(batch.queries, rollout.responses, batch.scores, temperature=temperature)
        torch.testing.assert_close(rollout.logprobs, trainer.record.logprobs, rtol=1e-5, atol=1e-5)
        return (rollout.responses, trainer.record, sum(trainer.sampled_kl(rollout, temperature))), stats

    (warm_responses, warm, warm_kl), first = run(1.0, 2.0)
    (cold_responses, cold, cold_kl), second = run(0.5, 1.0)
    assert warm_responses == cold_responses and warm_kl == pytest.approx(cold_kl, rel=1e-5)
    for name in ("logprobs", "ref_logprobs", "kl", "rewards"):
        torch.testing.assert_close(getattr(warm, name), getattr(cold, name), rtol=1e-5, atol=1e-5)
    for name in ("objective/kl", "ppo/policy/entropy", "ppo/loss/total"):
        assert first[name] == pytest.approx(second[name], rel=1e-5), name
    assert first["ppo/policy/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_10_a_rollout_of_another_temperature_is_refused(build: Build, batch: Any) -> None:
    trainer = build()
    rollout = trainer.rollout(batch.queries, SAMPLED.model_copy(update={"temperature": 0.5}), seed=3)
    with pytest.raises(ValueError, match=r"temperature 1.0 is not the 0.5 that the rollout was sampled at"):
        trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout)
    trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout, temperature=0.5)


# --- 11 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt_neo", "t5"])
def test_11_logprobs_and_values_of_a_token_come_from_the_place_before_it(kind: str, build: Build, batch: Any, make_model: Any) -> None:
    trainer = build(make_model(kind), learning_rate=0.0)
    trainer.step(*batch)
    record = trainer.record
    assert record is not None
    for row, (query, response) in enumerate(zip(batch.queries, batch.responses, strict=True)):
        inputs = {"input_ids": torch.tensor([query + response])}
        before = len(query) - 1
        if kind == "t5":
            start = trainer.model.config.decoder_start_token_id
            inputs = {"input_ids": torch.tensor([query]), "decoder_input_ids": torch.tensor([[start, *response]])}
            before = 0
        with torch.no_grad():
            logits, _, values = trainer.model(**inputs)
        for token, chosen in enumerate(response):
            logprob = float(logits[0, before + token].log_softmax(-1)[chosen])
            assert float(record.logprobs[row, token]) == pytest.approx(logprob, abs=1e-5)
            assert float(record.values[row, token]) == pytest.approx(float(values[0, before + token]), abs=1e-5)
        assert not record.logprobs[row, len(response) :].any() and not record.values[row, len(response) :].any()


# --- 12 ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)], ids=str)
def test_12_what_sampling_met_is_kept_in_float32_and_recomputed_in_shorter_types(
    dtype: torch.dtype, kept: bool, build: Build, batch: Any, make_model: Any
) -> None:
    trainer = build(add_lora(make_model().to(dtype), LoraSettings(), seed=1), learning_rate=0.0)
    rollout = trainer.rollout(batch.queries, SAMPLED, seed=0)
    answers = gather_answers(rollout.queries, rollout.responses, trainer.model.config)
    with torch.no_grad():
        full = trainer.networks.logprobs(trainer.policy, answers, 1.0)
    if kept:
        torch.testing.assert_close(rollout.logprobs, full, rtol=0, atol=1e-5)
    assert rollout.values is not None
    rollout.values[answers.present] += 0.5
    rollout.logprobs[answers.present] -= 0.25  # now it shows which numbers a step uses
    trainer.step(rollout.queries, rollout.responses, batch.scores, sampled=rollout)
    assert trainer.record is not None
    expected = rollout.logprobs if kept else full
    torch.testing.assert_close(trainer.record.logprobs, expected, rtol=0, atol=1e-5)
    assert torch.equal(trainer.record.values, rollout.values) is kept


# --- 13 ---------------------------------------------------------------------------------------------------------------------------


class Listener(RewardPart):
    """A part of the reward that remembers the texts it was asked about."""

    def __init__(self) -> None:
        super().__init__("listener")
        self.heard: list[tuple[str, bool]] = []

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        self.heard += zip(answers.responses, answers.ended, strict=True)
        return [0.0] * len(answers.responses)


def test_13_nothing_after_the_first_eos_is_scored_or_trained_on(write: Write, make_model: Any, tokenizer: Any) -> None:
    yes = tokenizer(" Yes")["input_ids"]
    write([[*yes, 1, 40, 41, 42], [*yes, 40, 41, 42, 43]])
    params = GenerateParams(do_sample=True, max_new_tokens=len(yes) + 3)
    rollout = collect_rollout(with_value_head(make_model()), tokenizer, [[5, 6], [7]], params, seed=0)
    assert rollout.responses == [[*yes, 1], [*yes, 40, 41, 42]]
    assert rollout.ended == [True, False]
    assert not rollout.logprobs[0, len(yes) + 1 :].any() and bool(rollout.logprobs[0, : len(yes) + 1].all())
    listener = Listener()
    prompts = [EncodedPrompt(ids, PromptRecord(Prompt("Is it?"), columns={}, where="here")) for ids in rollout.queries]
    score_rollout(Runtime.local("cpu"), RewardPipeline(listener), prompts, rollout)
    assert listener.heard == [("Yes", True), ("Yes" + tokenizer.decode([40, 41, 42]), False)]


def test_13_a_stop_string_ends_an_answer_and_is_cut_from_its_text(write: Write, make_model: Any, tokenizer: Any) -> None:
    ids = tokenizer(" Yes, it is.\nQuestion: Why")["input_ids"]
    write([ids])
    params = GenerateParams(do_sample=True, max_new_tokens=len(ids), stop_strings=["\nQuestion:"])
    rollout = collect_rollout(with_value_head(make_model()), tokenizer, [[5, 6]], params, seed=0)
    assert (rollout.texts, rollout.ended) == (["Yes, it is."], [True])
    [response] = rollout.responses
    assert response == ids[: len(response)] and len(response) < len(ids)
    assert tokenizer.decode(response).endswith("\nQuestion:")
    assert read_answers(tokenizer, [ids], ["it", "Yes"]) == [("", True)]  # the first of them


# --- 14 ---------------------------------------------------------------------------------------------------------------------------


def test_14_an_answer_without_eos_pays_or_gets_a_fixed_score() -> None:
    scores, lengths, ended = torch.tensor([3.0, 3.0, -1.0]), torch.tensor([2, 4, 4]), torch.tensor([True, False, False])
    assert penalised_scores(scores, lengths, ended).tolist() == [3.0, 3.0, -1.0]
    assert penalised_scores(scores, lengths, ended, missing_eos_penalty=0.5).tolist() == [3.0, 2.5, -1.5]
    assert penalised_scores(scores, lengths, ended, missing_eos_score=-7.0).tolist() == [3.0, -7.0, -7.0]
    with_length = penalised_scores(scores, lengths, ended, missing_eos_penalty=0.5, length_penalty=0.25)
    assert with_length.tolist() == [2.5, 1.5, -2.5]


def test_14_only_the_answer_is_searched_and_the_configured_id_counts(write: Write, make_model: Any, tokenizer: Any) -> None:
    """60 ends these answers, and the tokenizer's own EOS, 1, does not; both stand in the first prompt."""
    write([[40, 1, 41, 42], [40, 60, 41, 42], [60, 40, 41, 42]])
    rollout = collect_rollout(with_value_head(make_model()), tokenizer, [[60, 1, 60], [7], [8]], ends_at(60), seed=0)
    assert rollout.responses == [[40, 1, 41, 42], [40, 60], [60]]
    assert rollout.ended == [False, True, True]
    assert eos_ids(ends_at(60, 61), tokenizer, None) == [60, 61]
    assert eos_ids(GenerateParams(), tokenizer, None) == [1]


# --- 15 ---------------------------------------------------------------------------------------------------------------------------


def test_15_an_empty_answer_is_legal_and_its_score_reaches_nothing(build: Build, batch: Any) -> None:
    """Whatever an empty answer scores, the update is the same to the bit."""
    responses = [*batch.responses[:2], [], batch.responses[3]]
    trainers = [build(ppo_epochs=2, mini_batch_size=2, optimizer="adam") for _ in range(2)]
    for trainer, score in zip(trainers, (0.0, 1000.0), strict=True):
        stats = trainer.step(batch.queries, responses, [*batch.scores[:2], score, batch.scores[3]])
        assert all(torch.isfinite(torch.tensor(value)) for value in stats.values() if isinstance(value, float))
        assert trainer.record is not None and not trainer.record.mask[2].any()
        for name in ("rewards", "advantages", "kl", "logprobs", "values"):
            assert not getattr(trainer.record, name)[2].any(), name
        assert bool(trainer.record.logprobs[trainer.record.mask].all())  # the others have theirs
    for first, second in zip(*(trainer.parameters for trainer in trainers), strict=True):
        assert torch.equal(first, second) and bool(torch.isfinite(first).all())


def test_15_the_score_of_an_answer_of_one_token_lands_on_it(build: Build, batch: Any) -> None:
    """The shortest that sampling can write."""
    trainer = build(init_kl_coef=0.0)
    rollout = trainer.rollout(batch.queries, ends_at(*range(280)), seed=0)
    assert [len(response) for response in rollout.responses] == [1] * 4 and rollout.ended == [True] * 4
    trainer.step(batch.queries, rollout.responses, batch.scores, sampled=rollout)
    assert trainer.record is not None and trainer.record.rewards.tolist() == [[score] for score in batch.scores]
