"""RLOO and GRPO: advantages by hand, what they leave out, and that no split of a batch changes their update."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

import common.chunks as common_chunks
from common.launch.runtime import Runtime
from common.schema import GenerateParams
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.advantages import are_alike, grpo, rloo
from rlhf.ppo.losses import policy_loss
from rlhf.ppo.models import Critic, with_value_head
from rlhf.ppo.rewards import kl_shaped_rewards

EXACT = {"rtol": 1e-6, "atol": 1e-6}
Build = Callable[..., PPOTrainer]
InRanks = Callable[[int, Callable[[Runtime], Any]], list[Any]]
GROUPED = ["rloo", "grpo"]

QUERIES = [[5, 6, 7]] * 2 + [[9] * 6] * 2 + [[4, 8]] * 2 + [[30, 31, 32, 33]] * 2
RESPONSES = [[40, 41, 1], [42] * 5, [43, 1], [44, 45, 46, 47, 48, 1], [1], [50, 51], [52, 53, 54, 1], [55, 1]]
SCORES = [1.0, -0.5, 0.25, 2.0, -1.0, 0.75, 0.0, -2.0]

# --- by hand ----------------------------------------------------------------------------------------------------------------------


def test_rloo_by_hand() -> None:
    """With kl_coef 0.5 the sequence rewards are 3 - 1 = 2, 4 - 0 = 4, 9 - 0.5 * 2 = 8 and, in the other group, 0, 0, 3."""
    mask = tensor([[True, True], [True, False], [True, True], [True, False], [True, False], [True, True]])
    kl = tensor([[0.5, 1.5], [0.0, 99.0], [3.0, -1.0], [0.0, 99.0], [0.0, 99.0], [1.0, -1.0]])
    scores = tensor([3.0, 4.0, 9.0, 0.0, 0.0, 3.0])
    rewards, _ = kl_shaped_rewards(scores, kl, mask, 0.5)
    expected = [[-4.0, -4.0], [-1.0, 0.0], [5.0, 5.0], [-1.5, 0.0], [-1.5, 0.0], [3.0, 3.0]]
    torch.testing.assert_close(rloo(scores, rewards, mask, 3), tensor(expected), **EXACT)


def test_an_answer_without_tokens_counts_in_its_groups_baseline() -> None:
    mask = tensor([[False, False], [True, False]])
    rewards, _ = kl_shaped_rewards(tensor([5.0, 3.0]), torch.zeros(2, 2), mask, 0.1)
    assert rloo(tensor([5.0, 3.0]), rewards, mask, 2).tolist() == [[0.0, 0.0], [-2.0, 0.0]]


def test_grpo_by_hand() -> None:
    """Group 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7; a group of one score has nothing to learn from."""
    mask = tensor([[True, True]] * 5 + [[True, False]])
    advantages = grpo(tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1]), mask, 3)
    spread = math.sqrt(7.0) + 1e-4
    torch.testing.assert_close(advantages[:3], tensor([[-2.0, -2.0], [-1.0, -1.0], [3.0, 3.0]]) / spread, **EXACT)
    assert not advantages[3:].any()  # not even what rounding of 0.1 leaves
    # eps bounds what is close; with scores that differ by 1e-4 it halves: +-0.5e-4 / (sqrt(0.5) * 1e-4 + 1e-4)
    close = grpo(tensor([0.0, 1e-4]), tensor([[True], [True]]), 2)
    torch.testing.assert_close(close, tensor([[-0.5], [0.5]]) / (math.sqrt(0.5) + 1), rtol=1e-4, atol=0)


def test_groups_do_not_see_each_other_and_a_shift_of_their_scores_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, kl = torch.randn(12, generator=generator), torch.randn(12, 4, generator=generator)
    mask = torch.arange(4) < torch.randint(1, 5, (12, 1), generator=generator)

    def both(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
        rewards, _ = kl_shaped_rewards(scores, kl, mask, 0.3)
        return torch.stack([rloo(scores, rewards, mask, 4), grpo(scores, mask, 4)], 1)

    whole = both(scores, kl, mask)
    order = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(both(scores[order], kl[order], mask[order]), whole[order], **EXACT)
    torch.testing.assert_close(both(scores[4:8], kl[4:8], mask[4:8]), whole[4:8], **EXACT)
    shifted = scores + tensor([1.0, -3.0, 2.0]).repeat_interleave(4)
    torch.testing.assert_close(both(shifted, kl, mask), whole, rtol=1e-5, atol=1e-5)
    assert not bool(whole[~mask[:, None].expand_as(whole)].any())


# --- the gradient of the expected reward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 3])
def test_rloos_gradient_is_that_of_the_expected_reward(group: int) -> None:
    """All answers of a policy of three tokens (0 is EOS) and two places, and all groups of them, weighed by their probability.

    The reward has the KL from a reference, so it depends on the policy; its own gradient vanishes in expectation.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()  # at the start, after 1, after 2
    reference = torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    answers = [[0], *([first, second] for first in (1, 2) for second in range(3))]
    scores = torch.randn(len(answers), generator=generator, dtype=torch.float64)
    mask = tensor([[True, len(answer) == 2] for answer in answers])

    def logprobs(table: Tensor) -> Tensor:
        """(7, 2) of the answers' tokens."""
        after_first = [[table[0, answer[0]], table[answer[0], answer[-1]]] for answer in answers]
        return torch.where(mask, torch.stack([torch.stack(row) for row in after_first]), 0.0)

    ours = logprobs(logits.log_softmax(-1))
    difference = ours - logprobs(reference)
    probabilities = ours.sum(1).exp()
    assert float(probabilities.detach().sum()) == pytest.approx(1.0)
    expected = (probabilities * (scores - 0.3 * difference.sum(1))).sum()
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)

    groups = tensor(list(itertools.product(range(len(answers)), repeat=group)))
    rows = groups.flatten()
    rewards, _ = kl_shaped_rewards(scores[rows], difference.detach()[rows], mask[rows], 0.3)
    advantages = rloo(scores[rows], rewards, mask[rows], group)
    weights = probabilities.detach()[groups].prod(1).repeat_interleave(group)  # of the group each row is in
    loss, _ = policy_loss(ours[rows], ours.detach()[rows], advantages * weights[:, None], mask[rows], 0.2, count=group)
    (got,) = torch.autograd.grad(-loss, logits)
    assert float(wanted.abs().max()) > 0.05
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


# --- through the step --------------------------------------------------------------------------------------------------------------


def make(build: Build, make_model: Any, **settings: Any) -> PPOTrainer:
    usual = {"batch_size": 8, "mini_batch_size": 8, "samples_per_prompt": 2}
    return build(make_model(), reference=make_model("gpt_neo", 4), **{**usual, **settings})


def parameters(trainer: PPOTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


def answer_logprobs(model: Any, row: int) -> Tensor:
    query, response = QUERIES[row], RESPONSES[row]
    logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


@pytest.mark.parametrize("estimator", GROUPED)
def test_one_step_by_hand(estimator: str, build: Build, make_model: Any) -> None:
    """The gradient of the loss as it is written down, one answer at a time, moves a second model where the step moved the first.

    The first of two epochs has ratio 1; in the second the ratio is another and the clip may decide.
    """
    trainer = make(build, make_model, advantage_estimator=estimator, ppo_epochs=2, cliprange=0.01)
    trainer.kl_coef = 0.7
    model, reference = make_model(), make_model("gpt_neo", 4)
    with torch.no_grad():
        before = [answer_logprobs(model, row) for row in range(8)]
        kl = [logprobs - answer_logprobs(reference, row) for row, logprobs in enumerate(before)]
    totals = [score - 0.7 * float(kl.sum()) for score, kl in zip(SCORES, kl, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        loss, tokens = torch.zeros(()), sum(map(len, RESPONSES))
        for row in range(8):
            other = row ^ 1
            logprobs = answer_logprobs(model, row)
            advantage = totals[row] - totals[other]
            if estimator == "grpo":
                half = (SCORES[row] - SCORES[other]) / 2
                advantage = half / (abs(half) * math.sqrt(2) + 1e-4)
                lower = answer_logprobs(reference, row).detach() - logprobs
                loss = loss + 0.7 * (lower.exp() - 1 - lower).sum() / tokens
            ratio = (logprobs - before[row]).exp()
            loss = loss - torch.min(advantage * ratio, advantage * ratio.clamp(0.99, 1.01)).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    start = parameters(trainer)
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    by_hand = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(parameters(trainer), by_hand, rtol=1e-5, atol=1e-6)
    assert float((by_hand - start).abs().max()) > 1e-3
    assert stats["ppo/policy/clipfrac"] > 0.0


@pytest.mark.parametrize("estimator", GROUPED)
def test_no_value_is_trained_or_told(estimator: str, build: Build, make_model: Any) -> None:
    trainer = make(build, make_model, advantage_estimator=estimator, optimizer="adam", weight_decay=0.1)
    head = trainer.model.v_head.summary.weight.clone()
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    assert not [name for name in stats if "/val/" in name or "returns" in name or name == "ppo/loss/value"]
    assert torch.equal(trainer.model.v_head.summary.weight, head)
    assert trainer.record is not None and trainer.record.values is None and trainer.record.returns is None
    # not whitened: each prompt's answers, and not the batch's tokens, are centred
    first, second = trainer.record.advantages[:2, 0].tolist()
    assert first == pytest.approx(-second, abs=1e-5)
    assert ("ppo/loss/kl" in stats) is (estimator == "grpo")
    total = stats["ppo/loss/policy"] + (0.2 * stats["ppo/loss/kl"] if estimator == "grpo" else 0.0)
    assert stats["ppo/loss/total"] == pytest.approx(total, abs=1e-6)


def test_the_kl_is_in_rloos_rewards_and_in_grpos_loss(build: Build, make_model: Any) -> None:
    trainers = {name: make(build, make_model, advantage_estimator=name) for name in GROUPED}
    for trainer in trainers.values():
        trainer.step(QUERIES, RESPONSES, SCORES)
    in_rewards, in_loss = (trainers[name].record for name in GROUPED)
    assert in_rewards is not None and in_loss is not None
    assert float(in_rewards.non_score_rewards.abs().max()) > 1e-3 and not in_loss.non_score_rewards.any()
    totals = torch.tensor(SCORES) - 0.2 * (in_rewards.kl * in_rewards.mask).sum(1)
    torch.testing.assert_close(in_rewards.advantages[0, 0], totals[0] - totals[1], **EXACT)
    torch.testing.assert_close(in_loss.advantages[0, 0], torch.tensor(1 / math.sqrt(2)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("estimator", GROUPED)
def test_no_split_or_order_changes_the_update(
    estimator: str, build: Build, make_model: Any, in_ranks: InRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def updated(runtime: Runtime | None = None, groups: tuple[int, ...] = (0, 1, 2, 3), **settings: Any) -> Tensor:
        trainer = make(build, make_model, advantage_estimator=estimator, **{"batch_size": 2 * len(groups), **settings})
        if runtime is not None:
            trainer.runtime = runtime
        rows = [2 * group + number for group in groups for number in range(2)]
        trainer.step(*([part[row] for row in rows] for part in (QUERIES, RESPONSES, SCORES)))
        return parameters(trainer)

    whole = updated()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(updated(groups=(2, 0, 3, 1)), whole, **close)
    torch.testing.assert_close(updated(mini_batch_size=1, gradient_accumulation_steps=8), whole, **close)
    halves = in_ranks(2, lambda runtime: updated(runtime, ((0, 1), (2, 3))[runtime.rank], mini_batch_size=4))
    for half in halves:
        torch.testing.assert_close(half, whole, **close)
    monkeypatch.setitem(common_chunks.CHUNK_TOKENS, "cpu", 12)
    torch.testing.assert_close(updated(), whole, **close)


ESTIMATED: list[dict[str, Any]] = [
    {"advantage_estimator": "gae", "lam": 1.0, "vf_coef": 0.0},
    {"advantage_estimator": "rloo", "samples_per_prompt": 4},
    {"advantage_estimator": "grpo", "samples_per_prompt": 4, "init_kl_coef": 0.0},
]


@pytest.mark.parametrize("settings", ESTIMATED, ids=lambda settings: settings["advantage_estimator"])
@pytest.mark.parametrize("scores", [[0.7, 0.7000001, 0.7, 0.6999999], [0.0] * 4, [1e4, 1e4 + 0.01, 1e4, 1e4]])
def test_scores_that_are_alike_up_to_rounding_teach_nothing_and_say_so_once(
    scores: list[float], settings: dict[str, Any], build: Build, batch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adam would make steps of full size of the smallest gradient. Log-probabilities that differ by rounding are no KL either."""
    trainer = build(optimizer="adam", **settings)
    torch.nn.init.zeros_(trainer.model.v_head.summary.weight)
    for parameter in trainer.ref_model.parameters():
        parameter.data *= 1 + 1e-7
    before = parameters(trainer)
    for _ in range(2):
        trainer.step([batch.queries[0]] * 4, batch.responses, scores)
    assert torch.equal(parameters(trainer), before)
    assert capsys.readouterr().out.count("all scores alike") == 1


@pytest.mark.parametrize("settings", ESTIMATED, ids=lambda settings: settings["advantage_estimator"])
@pytest.mark.parametrize(
    "scores", [[0.7, 0.7001, 0.7, 0.7], [1e4, 1e4 + 1, 1e4, 1e4], [1e6, 1e6 + 100, 1e6, 1e6], [1e-3, 2e-3, 1e-3, 1e-3]]
)
def test_scores_that_differ_a_little_teach(
    scores: list[float], settings: dict[str, Any], build: Build, batch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(optimizer="adam", **settings)
    torch.nn.init.zeros_(trainer.model.v_head.summary.weight)
    before = parameters(trainer)
    trainer.step([batch.queries[0]] * 4, batch.responses, scores)
    assert not torch.equal(parameters(trainer), before) and "alike" not in capsys.readouterr().out


def test_what_large_values_leave_of_scores_is_rounding(build: Build, batch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build(optimizer="adam", **ESTIMATED[0])
    torch.nn.init.zeros_(trainer.model.v_head.summary.weight)
    torch.nn.init.constant_(trainer.model.v_head.summary.bias, 1e4)
    before = parameters(trainer)
    trainer.step([batch.queries[0]] * 4, batch.responses, [0.7, 0.701, 0.7, 0.7])  # float32 has steps of 1e-3 there
    assert torch.equal(parameters(trainer), before) and "all scores alike" in capsys.readouterr().out


@pytest.mark.parametrize("settings", ESTIMATED[1:], ids=lambda settings: settings["advantage_estimator"])
def test_one_answer_with_tokens_among_empty_ones_teaches(settings: dict[str, Any], build: Build, batch: Any) -> None:
    """Its advantage is the mean over all tokens, too, but not their baseline."""
    trainer = build(optimizer="adam", **settings)
    before = parameters(trainer)
    trainer.step([batch.queries[0]] * 4, [batch.responses[0], [], [], []], [1.0, 0.0, 0.0, 0.0])
    assert not torch.equal(parameters(trainer), before)


def test_alike_is_what_differs_by_rounding_alone() -> None:
    mask, advantages = tensor([[True, False]] * 3), tensor([[1.0, 9.0], [1.0 + 1e-7, 3.0], [1.1, 0.0]])
    assert are_alike(advantages[:2], mask[:2], 1.0, centre=True) and not are_alike(advantages, mask, 1.0, centre=True)
    around = tensor([[1.0, 9.0], [0.9, 9.0], [1.1, 9.0]])  # the first is their mean
    assert not are_alike(around, mask, 1.0, centre=True)
    assert not are_alike(around[:1], mask[:1], 1.0, centre=False) and not are_alike(around, ~mask & mask, 1.0, centre=True)


def test_gae_takes_several_answers_to_a_prompt_as_it_takes_any(build: Build, make_model: Any) -> None:
    grouped, plain = (make(build, make_model, samples_per_prompt=samples) for samples in (2, 1))
    for trainer in (grouped, plain):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert torch.equal(parameters(grouped), parameters(plain))


def test_a_skipped_update_has_no_loss(build: Build, make_model: Any) -> None:
    stats = make(build, make_model, advantage_estimator="grpo", ratio_threshold=0.5).step(QUERIES, RESPONSES, SCORES)
    assert stats["ppo/skipped_minibatches"] == 1.0
    assert [stats[f"ppo/loss/{name}"] for name in ("policy", "kl", "total")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", GROUPED)
def test_the_rewarded_token_is_found(estimator: str, build: Build, make_model: Any) -> None:
    settings = {"ppo_epochs": 2, "init_kl_coef": 0.01, "batch_size": 32, "mini_batch_size": 32, "learning_rate": 0.02}
    trainer = build(make_model(), optimizer="adam", advantage_estimator=estimator, samples_per_prompt=8, **settings)
    params = GenerateParams(do_sample=True, max_new_tokens=3)
    shares = []
    for number in range(20):
        rollout = trainer.rollout([QUERIES[row // 8 * 2] for row in range(32)], params, seed=1, step=number)
        hits = [sum(2 <= token < 40 for token in response) / 3 for response in rollout.responses]
        shares.append(sum(hits) / 32)
        trainer.step(rollout.queries, rollout.responses, hits, sampled=rollout)
    assert shares[0] < 0.3 and shares[-1] > 0.8


def test_the_dataloader_gives_prompts_and_not_answers(make_model: Any, tokenizer: Any) -> None:
    config = PPOConfig(batch_size=8, mini_batch_size=8, samples_per_prompt=4)
    dataset = [{"query": str(row)} for row in range(5)]
    trainer = PPOTrainer(config, with_value_head(make_model()), None, tokenizer, dataset, data_collator=list)
    assert trainer.dataloader is not None and [len(batch) for batch in trainer.dataloader] == [2, 2]


# --- what does not fit -------------------------------------------------------------------------------------------------------------


def test_rows_of_one_group_answer_one_prompt(build: Build, make_model: Any) -> None:
    trainer = make(build, make_model, advantage_estimator="rloo")
    before = parameters(trainer)
    with pytest.raises(ValueError, match="queries 2 and 3 differ: samples_per_prompt 2 consecutive rows have one query"):
        trainer.step([*QUERIES[:3], [9] * 5, *QUERIES[4:]], RESPONSES, SCORES)
    assert torch.equal(parameters(trainer), before)
    critic = Critic(make_model("gpt_neo", 7).transformer)
    with pytest.raises(ValueError, match="critic: advantage_estimator rloo needs none"):
        make(build, make_model, advantage_estimator="rloo", critic=critic)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_estimator": "rloo"}, "advantage_estimator rloo compares answers to one prompt: samples_per_prompt 1 is less than 2"),
        ({"advantage_estimator": "vine"}, "advantage_estimator: got 'vine', expected gae, rloo or grpo"),
        ({"samples_per_prompt": 3}, "batch_size 8 counts answers and is not divisible by samples_per_prompt 3"),
        ({"samples_per_prompt": 0}, "samples_per_prompt: got 0, expected a whole number >= 1"),
        ({"advantage_estimator": "grpo", "samples_per_prompt": 4, "critic_warmup_steps": 1}, "critic_warmup_steps 1: .* no value to warm"),
        ({"advantage_estimator": "grpo", "samples_per_prompt": 4, "whiten_rewards": True}, "whiten_rewards: .* takes scores as they are"),
        ({"use_score_norm": True}, "use_score_norm has no effect without use_score_scaling"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(batch_size=8, mini_batch_size=8, **settings)
