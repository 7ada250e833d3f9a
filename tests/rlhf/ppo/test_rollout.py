"""Sampling: what is drawn depends on the row alone, and what is kept equals a full forward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from common.decoding import read_answers
from common.errors import UserError
from common.evaluation.generate import generate_answers
from common.schema import GenerateParams
from common.token_choice import TokenChooser
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.answers import Forward, gather_answers
from rlhf.ppo.losses import token_stats
from rlhf.ppo.models import with_value_head
from rlhf.ppo.rollout import Rollout, collect_rollout
from rlhf.sampling_options import check_sampling_options

QUERIES = [[5, 6, 7], [9] * 11, [4, 8], [30, 31, 32, 33, 34], [7, 7], [50, 60, 70, 80]]
ENDS = [1, *range(20, 50)]
"""Many ids that end an answer, so that answers of random models do end."""
SAMPLED = GenerateParams.model_validate({"do_sample": True, "max_new_tokens": 12, "eos_token_id": ENDS})
MakeModel = Callable[..., Any]


def policy_of(make_model: MakeModel, kind: str) -> Any:
    model = with_value_head(make_model(kind)).eval()
    torch.nn.init.normal_(model.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    return model


def sample(model: Any, tokenizer: Any, queries: list[list[int]] | None = None, params: GenerateParams = SAMPLED, **options: Any) -> Rollout:
    return collect_rollout(model, tokenizer, QUERIES if queries is None else queries, params, seed=3, step=2, **options)


def recomputed(model: Any, rollout: Rollout, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values (B, T) of a full forward, one row at a time, so that nothing is padded."""
    logprobs, values = torch.zeros(rollout.logprobs.shape), torch.zeros(rollout.logprobs.shape)
    forward = Forward(model.pretrained_model)
    with torch.no_grad():
        for row, (query, response) in enumerate(zip(rollout.queries, rollout.responses, strict=True)):
            answers = gather_answers([query], [response], model.config)
            output = forward.at_answers(answers)
            logprobs[row, : len(response)] = token_stats(output.logits, torch.tensor(response), temperature).logprobs
            values[row, : len(response)] = model.v_head(output.states)
    return logprobs, values


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "t5"])
def test_12_kept_logprobs_and_values_equal_a_full_forward(kind: str, make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, kind)
    rollout = sample(model, tokenizer)
    assert len({len(response) for response in rollout.responses}) > 1  # rows end at different times, so some leave the batch
    logprobs, values = recomputed(model, rollout)
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert rollout.values is not None
    torch.testing.assert_close(rollout.values, values, rtol=1e-5, atol=1e-5)


def test_a_rollout_without_values_leaves_them_to_the_step(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt2")
    rollout = sample(model.pretrained_model, tokenizer)
    assert rollout.values is None
    trainer = PPOTrainer(PPOConfig(batch_size=6, mini_batch_size=6, ppo_epochs=1), model, tokenizer=tokenizer)
    _, values = recomputed(model, rollout)
    trainer.step(rollout.queries, rollout.responses, [0.0] * 6, temperature=rollout.temperature, sampled=rollout)
    assert trainer.record is not None and trainer.record.values is not None and float(values.abs().max()) > 0.01
    torch.testing.assert_close(trainer.record.values, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama", "t5"])
def test_03_answers_do_not_depend_on_padding_batch_order_or_cache(kind: str, make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, kind)
    together = sample(model, tokenizer)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = sample(model, tokenizer, [QUERIES[row] for row in order], rows=order)
    assert [shuffled.responses[order.index(row)] for row in range(6)] == together.responses
    alone = [sample(model, tokenizer, [QUERIES[row]], rows=[row]).responses[0] for row in range(6)]
    assert alone == together.responses
    assert sample(model, tokenizer, batch_size=2).responses == together.responses
    assert sample(model, tokenizer, pad_to=20).responses == together.responses
    assert sample(model, tokenizer, use_cache=False).responses == together.responses


def test_03_padding_is_told_by_position_even_where_its_id_stands_in_a_prompt(make_model: MakeModel, tokenizer: Any) -> None:
    """Ids 0 (padding) and 1 (EOS) inside a prompt are text like any other."""
    model = policy_of(make_model, "gpt_neo")
    queries = [[0, 0, 5, 1, 6], [9] * 11]
    rollout = sample(model, tokenizer, queries)
    logprobs, _ = recomputed(model, rollout)
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert sample(model, tokenizer, queries[:1]).responses[0] == rollout.responses[0]


def test_10_sampling_is_from_the_whole_distribution_at_the_temperature(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt_neo")
    params = GenerateParams(do_sample=True, max_new_tokens=1, temperature=1.7)
    count = 20000
    rollout = sample(model, tokenizer, [[5, 6, 7]] * count, params)
    with torch.no_grad():
        expected = (model.pretrained_model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.7).softmax(-1)
    found = torch.bincount(torch.tensor(rollout.responses).flatten(), minlength=len(expected)) / count
    assert float((found - expected).abs().max()) < 4 * (float(expected.max()) / count) ** 0.5
    logprobs, _ = recomputed(model, Rollout(rollout.queries[:5], rollout.responses[:5], [], [], rollout.logprobs[:5], None), 1.7)
    torch.testing.assert_close(rollout.logprobs[:5], logprobs, rtol=1e-5, atol=1e-5)


def test_11_a_logprob_comes_from_the_logits_one_place_earlier(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt2")
    rollout = sample(model, tokenizer, QUERIES[:1])
    ids = torch.tensor([rollout.queries[0] + rollout.responses[0]])
    with torch.no_grad():
        logprobs = model.pretrained_model(ids).logits.log_softmax(-1)
    by_hand = [float(logprobs[0, place - 1, ids[0, place]]) for place in range(3, ids.shape[1])]
    assert rollout.logprobs[0, : len(by_hand)].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_13_nothing_after_eos_and_eos_itself_is_part_of_the_answer(make_model: MakeModel, tokenizer: Any) -> None:
    rollout = sample(policy_of(make_model, "gpt_neo"), tokenizer)
    for response, ended, text in zip(rollout.responses, rollout.ended, rollout.texts, strict=True):
        assert not set(ENDS) & set(response[:-1])
        assert ended == (response[-1] in ENDS)
        assert ended or len(response) == 12
        assert "<eos>" not in text
    assert any(rollout.ended) and not all(rollout.ended)


def test_13_a_stop_string_ends_the_answer_and_is_cut_from_the_text(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt_neo")
    options = {"do_sample": True, "max_new_tokens": 12}
    free = sample(model, tokenizer, params=GenerateParams.model_validate(options))
    row = max(range(6), key=lambda number: len(free.texts[number]))
    stop = tokenizer.decode(free.responses[row][3:5])
    stopped = sample(model, tokenizer, params=GenerateParams.model_validate({**options, "stop_strings": [stop]}))
    length = len(stopped.responses[row])
    assert length < len(free.responses[row])
    assert stopped.responses[row] == free.responses[row][:length]
    assert stopped.ended[row] and stop not in stopped.texts[row]
    assert read_answers(tokenizer, [tokenizer(" Yes, it is. Thank")["input_ids"]], ["it"]) == [("Yes, ", True)]


def test_14_only_the_answer_is_searched_for_eos_and_the_configured_id_counts(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt_neo")
    free = sample(model, tokenizer)
    first = free.responses[0][1]
    queries = [[first, *QUERIES[0]], *QUERIES[1:]]
    params = GenerateParams.model_validate({**SAMPLED.model_dump(), "eos_token_id": first})
    rollout = sample(model, tokenizer, queries, params)
    assert all(len(response) >= 1 for response in rollout.responses)
    for response, ended in zip(rollout.responses, rollout.ended, strict=True):
        assert ended == (response[-1] == first)


def test_an_end_that_is_no_token_leaves_min_length_every_token() -> None:
    """-1 counted from the end of the vocabulary, whose last token then could not come."""
    params = GenerateParams.model_validate({"do_sample": False, "min_length": 3, "eos_token_id": [-1, 2, 9]})
    chooser = TokenChooser(params, [-1, 2, 9], seed=0, step=0)
    nothing = torch.zeros((1, 0), dtype=torch.long)
    scores = chooser.scores(torch.zeros(1, 5), None, 0, nothing, nothing.bool())
    assert scores.isinf().tolist() == [[False, False, True, False, False]]


def test_min_length_top_k_and_repetition_penalty_shape_what_is_sampled(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt_neo")
    greedy = sample(model, tokenizer, params=GenerateParams(do_sample=False, max_new_tokens=12))
    assert sample(model, tokenizer, params=GenerateParams(do_sample=True, top_k=1, max_new_tokens=12)).responses == greedy.responses
    assert sample(model, tokenizer, params=GenerateParams(do_sample=True, top_p=1e-6, max_new_tokens=12)).responses == greedy.responses
    often = SAMPLED.model_copy(update={"min_length": 6})
    found = {len(response) for response in sample(model, tokenizer, QUERIES * 20, often).responses}
    assert min(found) == 7  # six tokens, then EOS
    strict = sample(model, tokenizer, params=GenerateParams(do_sample=False, max_new_tokens=12, repetition_penalty=1e6))
    for query, response in zip(QUERIES, strict.responses, strict=True):
        assert len(set(response)) == len(response) and not set(response) & set(query)
    distinct = sample(model, tokenizer, params=GenerateParams(do_sample=False, max_new_tokens=12, no_repeat_ngram_size=2))
    for response in distinct.responses:
        pairs = list(pairwise(response))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("kind", ["gpt_neo", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.3, "min_length": 3},
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1},
        {"min_p": 0.05, "typical_p": 0.9},
        {"top_h": 0.4},
        {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
        {"do_sample": False, "repetition_penalty": 2.0},
        {"stop_strings": ["a", "e", "1"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_training_samples_what_evaluation_would(kind: str, options: dict[str, Any], make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, kind)
    params = GenerateParams.model_validate({**SAMPLED.model_dump(), **options})
    rollout = sample(model, tokenizer, params=params)
    answers = generate_answers(model.pretrained_model, tokenizer, QUERIES, params, seed=3, step=2, batch_size=6)
    assert rollout.responses == [list(answer.ids) for answer in answers]
    assert [(text, ended) for text, ended in zip(rollout.texts, rollout.ended, strict=True)] == [(a.text, a.ended) for a in answers]


@pytest.mark.parametrize("kind", ["gpt_neo", "t5"])
def test_penalties_see_prompt_and_answer_but_no_start_token(kind: str, make_model: MakeModel, tokenizer: Any) -> None:
    seen: list[tuple[int, list[list[int]]]] = []
    original = TokenChooser.scores

    def scores(self: Any, logits: Any, rows: Any, position: int, text: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        seen.append((position, [ids[mask].tolist() for ids, mask in zip(text, real, strict=True)]))
        return original(self, logits, rows, position, text, real)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenChooser, "scores", scores)
        rollout = sample(policy_of(make_model, kind), tokenizer, QUERIES[:2], GenerateParams(do_sample=True, max_new_tokens=4))
    assert [position for position, _ in seen] == [0, 1, 2, 3]
    for position, texts in seen:
        for text, query, response in zip(texts, rollout.queries, rollout.responses, strict=True):
            assert text == ([] if kind == "t5" else query) + response[:position]


def test_each_option_of_sampling_shapes_what_is_sampled(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt_neo")
    free = sample(model, tokenizer).responses
    for name, value in {"top_h": 0.2, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.3, "eta_cutoff": 0.9}.items():
        assert sample(model, tokenizer, params=SAMPLED.model_copy(update={name: value})).responses != free, name


def test_35_a_rollout_beyond_the_positions_is_refused_before_anything_is_decoded(make_model: MakeModel, tokenizer: Any) -> None:
    model = policy_of(make_model, "gpt2")
    fits = sample(model, tokenizer, [[5] * 60], GenerateParams(do_sample=True, max_new_tokens=4))
    assert len(fits.responses[0]) <= 4
    model.pretrained_model.forward = None
    with pytest.raises(UserError, match="prompt and answer of 65 tokens, the model has 64 positions"):
        sample(model, tokenizer, [[5] * 61, [5]], GenerateParams(do_sample=True, max_new_tokens=4))


def test_options_that_sampling_does_not_know_are_refused_by_name() -> None:
    params = GenerateParams.model_validate({"num_beams": 4, "min_p": 3.0, "max_new_tokens": 2, "min_length": 5, "do_sample": True})
    with pytest.raises(UserError) as error:
        check_sampling_options(params, setting="generation_config")
    first, second, third = error.value.problems
    assert "generation_config.num_beams: got 4" in first and "typical_p" in first
    assert "min_p: got 3.0" in second
    with pytest.raises(UserError, match=r"typical_p: got 1.0, expected a number above 0 and below 1"):
        check_sampling_options(GenerateParams.model_validate({"typical_p": 1.0, "do_sample": True}), setting="generation_config")
    assert "min_length 5 is more than max_new_tokens 2" in third


@pytest.mark.parametrize("ends", [True, [], [2, "</s>"], -2, 1.0])
def test_what_ends_an_answer_is_an_id_or_ids(ends: Any) -> None:
    with pytest.raises(UserError, match=r"generation_config.eos_token_id: got .*, expected a token id or a list of them"):
        check_sampling_options(GenerateParams.model_validate({"eos_token_id": ends}), setting="generation_config")
    for good in (-1, 2, [2, 9], None):
        check_sampling_options(GenerateParams.model_validate({"eos_token_id": good}), setting="generation_config")
