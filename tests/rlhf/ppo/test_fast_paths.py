"""Every fast path is exact: switched off, losses, gradients and sampled tokens change by no more than float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.launch.sharding import Sharding
from common.lora import add_lora
from common.models import packed
from common.models.fused import set_fused
from common.schema import GenerateParams, LoraSettings
from rlhf.ppo import PPOConfig, PPOTrainer, losses
from rlhf.ppo.answers import Forward, gather_answers
from rlhf.ppo.chunks import chunks
from rlhf.ppo.losses import token_stats
from rlhf.ppo.models import Critic, with_value_head
from rlhf.ppo.rollout import collect_rollout

QUERIES = [[5, 6, 7], [9] * 6, [4, 8], [30, 31, 32, 33], [7, 7], [50, 60, 70], [3, 2], [11, 12, 13]]
RESPONSES = [[40, 41, 1], [42] * 5, [43, 1], [44, 45, 46, 47, 48, 1], [], [50, 51], [52, 53, 54, 1], [55, 1]]
SCORES = [1.0, -0.5, 0.25, 2.0, -1.0, 0.75, 0.0, -2.0]
SAMPLED = GenerateParams(do_sample=True, max_new_tokens=8)


def run(
    make_model: Any,
    tokenizer: Any,
    kind: str,
    *,
    queries: list[list[int]] = QUERIES,
    critic: bool = False,
    shared: int | None = None,
    **settings: Any,
) -> Any:
    """A step of a fresh trainer with plain gradient descent: trainer, statistics, trained weights."""
    policy = with_value_head(make_model(kind))
    torch.nn.init.normal_(policy.v_head.summary.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    usual = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 0.05, "classic_quirks": False, "entropy_coef": 0.01}
    config = PPOConfig(**{**usual, **settings})
    network = Critic(make_model(kind, 7).base_model) if critic else None
    reference = None if shared else make_model(kind, 4)
    trainer = PPOTrainer(config, policy, reference, tokenizer, critic=network, num_shared_layers=shared)
    trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=config.learning_rate)
    stats = trainer.step(queries, RESPONSES, SCORES)
    return trainer, stats, torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


def assert_same(one: Any, other: Any) -> None:
    for name, value in one[1].items():
        if isinstance(value, float) and not name.startswith("time/"):
            assert other[1][name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    torch.testing.assert_close(one[2], other[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_texts_in_a_line_give_the_step_of_padded_rows(kind: str, critic: bool, make_model: Any, tokenizer: Any) -> None:
    line = run(make_model, tokenizer, kind, critic=critic)
    padded = run(make_model, tokenizer, kind, critic=critic, padding_free=False)
    assert padded[0].policy.trunk is not None and not padded[0].policy.trunk.packs
    assert line[0].policy.trunk is not None and line[0].policy.trunk.packs
    assert_same(line, padded)


@pytest.mark.parametrize(("settings", "most"), [({"mixed_precision": "bf16"}, 1), ({}, 1), ({"kl_penalty": "full"}, 2)])
def test_one_network_is_whole_at_a_time_before_an_update(
    settings: dict[str, Any], most: int, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[set[nn.Module]] = []

    @contextmanager
    def remember(self: Sharding, *networks: nn.Module) -> Iterator[None]:
        gathered.append(set(networks))
        yield

    monkeypatch.setattr(Sharding, "gathered", remember)
    trainer, *_ = run(make_model, tokenizer, "gpt2", critic=True, **settings)
    assert max(map(len, gathered)) == most
    assert set().union(*gathered) == {trainer.model, trainer.networks.ref_model, trainer.networks.critic}


PROMPTS = [list(range(5, 17)), list(range(20, 30))]


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("shared", [None, 1])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_a_prompt_read_once_for_its_answers_gives_the_step_of_prompts_read_for_each(
    kind: str, shared: int | None, critic: bool, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four answers to each of two prompts, in minibatches of four that hold answers to both."""
    results, tokens = [], []
    for least in (packed.SHARED_TOKENS, 10**6):
        monkeypatch.setattr(packed, "SHARED_TOKENS", least)
        read: list[int] = []
        monkeypatch.setattr(packed.Line, "states", counted(packed.Line.states, read))
        results.append(run(make_model, tokenizer, kind, queries=[PROMPTS[row // 4] for row in range(8)], critic=critic, shared=shared))
        monkeypatch.undo()
        tokens.append(sum(read))
    assert_same(*results)
    assert results[0][1]["ppo/policy/approxkl"] > 0 and tokens[0] < 0.75 * tokens[1]


def counted(states: Callable[..., Tensor], tokens: list[int]) -> Callable[..., Tensor]:
    """`Line.states` that notes how many tokens a line has."""

    def count(line: packed.Line, trunk: torch.nn.Module) -> Tensor:
        tokens.append(line.ids.shape[1])
        return states(line, trunk)

    return count


def test_answers_to_one_prompt_meet_in_a_forward(make_model: Any) -> None:
    """Whatever their lengths, and in whatever order a minibatch names them."""
    answers = gather_answers([[4] * 1100] * 2 + [[5] * 1100] * 2, [[7], [8] * 50, [9], [6] * 50], make_model().config)
    assert [chunk.tolist() for chunk in chunks(torch.tensor([2, 0, 3, 1]), answers, 10, packed=True)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("shared", "critic"), [(None, False), (1, False), (None, True)])
@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_texts_stay_in_a_line_where_activations_of_policy_and_critic_are_recomputed(
    kind: str, shared: int | None, critic: bool, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_model(kind)
    attention, counts = type(first.transformer.h[0].attn if kind == "gpt_neo" else first.model.layers[0].self_attn), [0]
    forward = attention.forward

    def counted(*given: Any, **named: Any) -> Any:
        counts[-1] += torch.is_grad_enabled()
        return forward(*given, **named)

    monkeypatch.setattr(attention, "forward", counted)
    kept = run(make_model, tokenizer, kind, shared=shared, critic=critic)
    counts.append(0)
    recomputed = run(make_model, tokenizer, kind, shared=shared, critic=critic, gradient_checkpointing=True)
    assert len(recomputed[0].recomputing) == 1 + critic and recomputed[0].networks.packs
    assert not any(module.training for network in recomputed[0].recomputing for module in network.modules())
    layers = (1 if shared else 2) + (2 if critic else 0)
    assert counts[1] - counts[0] == layers * 2 * 2  # once more in backward: layers x epochs x minibatches
    assert_same(recomputed, kept)


def test_rows_share_a_forward_by_tokens_alone_only_where_every_network_reads_lines(make_model: Any, tokenizer: Any) -> None:
    """Else a network that pads would have a whole forward padded to its longest row."""
    reference = make_model("gpt_neo")
    set_fused(reference, False)
    policies = [with_value_head(make_model("gpt_neo")) for _ in range(2)]
    line, mixed = (PPOTrainer(PPOConfig(), policy, other, tokenizer) for policy, other in zip(policies, (None, reference), strict=True))
    answers = gather_answers([[5]] * 7 + [[5] * 300], [[6]] * 8, line.policy.model.config)
    groups = [trainer.networks.chunks(torch.arange(8), answers) for trainer in (line, mixed)]
    assert [sorted(map(len, group)) for group in groups] == [[8], [1, 7]]


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_starting_above_frozen_layers_gives_the_step_of_the_whole_model(
    kind: str, padding_free: bool, make_model: Any, tokenizer: Any
) -> None:
    kept = run(make_model, tokenizer, kind, shared=1, padding_free=padding_free)
    whole = run(make_model, tokenizer, kind, shared=1, padding_free=padding_free, cache_frozen_layers=False)
    assert kept[0].networks.lower is not None and kept[0].networks.reference_lower is not None and whole[0].networks.lower is None
    assert len(kept[0].networks.lower.below) == 1 and kept[1]["ppo/policy/approxkl"] > 0
    assert_same(kept, whole)


def test_the_frozen_layers_run_once_per_step(make_model: Any, tokenizer: Any) -> None:
    """Two epochs of two minibatches, policy and reference: one forward for all of them, which eight short rows fit into."""
    for cached, expected in ((True, 1), (False, 1 + 1 + 4)):
        calls: list[int] = []
        trainer, _, _ = run(make_model, tokenizer, "gpt2", shared=1, cache_frozen_layers=cached)
        for model in {id(network): network for network in (trainer.policy.model, trainer.networks.reference.model)}.values():
            model.transformer.h[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.step(QUERIES, RESPONSES, SCORES)
        assert len(calls) == expected


def test_adapters_in_the_upper_layer_leave_the_lower_one_to_be_kept(make_model: Any, tokenizer: Any) -> None:
    results = []
    for cached in (True, False):
        model = add_lora(make_model("gpt2"), LoraSettings(), seed=1)
        for name, parameter in model.named_parameters():
            if ".h.0." in name:
                parameter.requires_grad_(False)
        config = PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=2, learning_rate=0.01, cache_frozen_layers=cached)
        trainer = PPOTrainer(config, with_value_head(model), None, tokenizer)
        assert (trainer.networks.lower is not None) is cached
        stats = trainer.step(QUERIES, RESPONSES, SCORES)
        results.append((trainer, stats, torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])))
    assert_same(*results)


@pytest.mark.parametrize("kind", ["gpt_neo", "llama", "t5"])
def test_prompts_that_are_alike_are_read_once_and_answered_each_in_its_own_way(kind: str, make_model: Any, tokenizer: Any) -> None:
    model = with_value_head(make_model(kind))
    queries = [[5, 6, 7], [9, 9], [5, 6, 7], [5, 6, 7], [9, 9]]
    read: list[int] = []
    forward = Forward(model.pretrained_model)
    trunk = model.pretrained_model.get_encoder() if kind == "t5" else model.pretrained_model.base_model
    trunk.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    together = collect_rollout(model, tokenizer, queries, SAMPLED, seed=3, forward=forward)
    assert read[0] == 2 and read[1:2] in ([], [5])
    alone = [collect_rollout(model, tokenizer, [query], SAMPLED, seed=3, rows=[row], forward=forward) for row, query in enumerate(queries)]
    assert together.responses == [rollout.responses[0] for rollout in alone]
    assert together.responses[0] != together.responses[2]
    for row, rollout in enumerate(alone):
        width = rollout.logprobs.shape[1]
        torch.testing.assert_close(together.logprobs[row, :width], rollout.logprobs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [22, 2**18])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_token_stats_and_their_gradient_are_those_of_log_softmax(
    temperature: float, entropy_gradient: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tokens at once, and of two and then one of them."""
    monkeypatch.setitem(losses.BLOCK_LOGITS, "cpu", block)
    generator = torch.Generator().manual_seed(0)
    logits, tokens = 3 * torch.randn(5, 11, generator=generator), torch.randint(0, 10, (5,), generator=generator)
    logits[:, 10] = -torch.inf
    weights = torch.randn(2, 5, generator=generator)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    stats = token_stats(ours, tokens, temperature, entropy=True, entropy_gradient=entropy_gradient)
    everything = (plain / temperature).log_softmax(-1)
    chosen = everything.gather(-1, tokens[:, None]).squeeze(-1)
    finite = everything[:, :10]
    entropy = -(finite.exp() * finite).sum(-1)
    torch.testing.assert_close(stats.logprobs, chosen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-5, atol=1e-6)
    assert stats.entropy is not None and stats.entropy.requires_grad is entropy_gradient
    loss = (weights[0] * stats.logprobs).sum() + (weights[1] * stats.entropy).sum()
    loss.backward()
    ((weights[0] * chosen).sum() + ((weights[1] * entropy).sum() if entropy_gradient else 0.0)).backward()
    assert ours.grad is not None and plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad.nan_to_num(0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt_neo", "t5"])
def test_bfloat16_stays_near_float32_and_trains_float32_weights(kind: str, make_model: Any, tokenizer: Any) -> None:
    exact, short = (run(make_model, tokenizer, kind, mixed_precision=precision) for precision in ("no", "bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in short[0].parameters)
    difference = (exact[0].record.logprobs - short[0].record.logprobs).abs()
    assert 1e-5 < float(difference.max()) < 0.2  # logits of these models reach 10
    assert short[1]["ppo/policy/ratio"] == pytest.approx(exact[1]["ppo/policy/ratio"], rel=0.05)
    moved, start = short[2], torch.cat([parameter.detach().flatten() for parameter in with_value_head(make_model(kind)).parameters()])
    assert len(moved) == len(start) and float((moved - exact[2]).norm() / (exact[2] - start).norm()) < 0.2


def test_sampling_in_bfloat16_reads_the_weights_as_they_are_now(make_model: Any, tokenizer: Any) -> None:
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=8, mixed_precision="bf16"), with_value_head(make_model()), None, tokenizer)
    first = trainer.rollout(QUERIES, SAMPLED, seed=0)
    model, _ = trainer.networks.sampler()
    assert {parameter.dtype for parameter in model.pretrained_model.parameters()} == {torch.bfloat16}
    answers = gather_answers(first.queries, first.responses, trainer.policy.model.config)
    with torch.no_grad():
        full = token_stats(Forward(trainer.policy.model).at_answers(answers).logits, answers.targets[answers.present]).logprobs
    sampled = first.logprobs[answers.present]
    assert 0 < float((full - sampled).abs().max()) < 0.2
    trainer.policy.model.get_input_embeddings().weight.data.mul_(-1)
    assert trainer.rollout(QUERIES, SAMPLED, seed=0).responses != first.responses
    assert trainer.networks.kept_logprobs(answers, first) is None
