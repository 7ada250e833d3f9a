"""Decoding in static buffers writes what the usual path writes. Here it runs without the graph, which needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from common.lora import add_lora
from common.models.fused import set_fused
from common.schema import GenerateParams, LoraSettings
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.answers import Forward, Output
from rlhf.ppo.models import with_value_head
from rlhf.ppo.networks import Networks
from rlhf.ppo.rollout import Rollout, collect_rollout
from rlhf.ppo.static_decoding import COLUMNS, KEPT, StaticDecoding, StaticStep

QUERIES = [[5, 6, 7], [9] * 11, [4, 8], [30, 31, 32, 33, 34], [7, 7], [4, 8], [50, 60, 70, 80]]
ENDS = [1, *range(20, 50)]
"""Many ids that end an answer, so that answers of random models do end."""
SAMPLED = GenerateParams.model_validate({"do_sample": True, "max_new_tokens": 6, "eos_token_id": ENDS, "repetition_penalty": 1.2})
SYNCHRONISING = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.lift_fresh_copy.default}
"""Operations that wait for the GPU or copy to it, which no graph can hold."""
KINDS = ("gpt2", "llama", "gpt_neo")


def fused_policy(make_model: Any, kind: str, **changes: Any) -> Any:
    model = make_model(kind, **changes)
    set_fused(model)
    policy = with_value_head(model).eval()
    torch.nn.init.normal_(policy.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    return policy


def static_forward(policy: Any) -> Forward:
    forward = Forward(policy.pretrained_model)
    forward.static = StaticDecoding.find(forward)
    assert forward.static is not None
    return forward


def assert_same(got: Rollout, expected: Rollout) -> None:
    assert got.responses == expected.responses and got.ended == expected.ended
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert got.values is not None and expected.values is not None
    torch.testing.assert_close(got.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_logprobs_and_values_are_those_of_the_usual_path(kind: str, make_model: Any, tokenizer: Any) -> None:
    policy = fused_policy(make_model, kind)
    forward = static_forward(policy)
    for options in ({}, {"batch_size": 3}, {"pad_to": 20, "step": 1}):
        usual = collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=3, **options)
        assert len({len(response) for response in usual.responses}) > 2 and len(set(usual.ended)) == 2  # some early, some cut
        assert_same(collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=3, forward=forward, **options), usual)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_there_serves_other_prompts_and_other_weights(kind: str, make_model: Any, tokenizer: Any) -> None:
    policy = fused_policy(make_model, kind)
    forward = static_forward(policy)
    assert forward.static is not None
    collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=3, forward=forward)
    (step,) = forward.static.steps.values()
    assert isinstance(step, StaticStep) and step.mask.shape == (7, 1, 1, COLUMNS)
    for buffer in (step.cache.layers[0].keys, step.cache.layers[0].values):
        assert buffer is not None
        buffer.fill_(torch.nan)
    with torch.no_grad():
        for parameter in policy.pretrained_model.parameters():
            parameter.mul_(1.1)
    others = [[*query[::-1], 90] for query in QUERIES]
    again = collect_rollout(policy, tokenizer, others, SAMPLED, seed=4, forward=forward)
    assert list(forward.static.steps.values()) == [step]
    assert_same(again, collect_rollout(policy, tokenizer, others, SAMPLED, seed=4))


class Recorded:
    """The operations of a step on its tensors, as a CUDA graph has them: repeated without the Python around them."""

    def __init__(self, step: StaticStep) -> None:
        self.step, self.replays = step, 0
        self.operations = make_fx(lambda: tuple(step._run()[:2]))()  # raises where a number is read from a tensor

    def replay(self) -> None:
        self.replays += 1
        self.step.output = Output(*self.operations())


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_can_be_repeated(kind: str, make_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fused_policy(make_model, kind)
    forward = static_forward(policy)
    make = StaticStep.__init__

    def make_and_record(step: StaticStep, *arguments: Any) -> None:
        make(step, *arguments)
        step.graph = Recorded(step)  # type: ignore[assignment]

    monkeypatch.setattr(StaticStep, "__init__", make_and_record)
    for seed in (3, 4):
        usual = collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=seed)
        assert_same(collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=seed, forward=forward), usual)
    assert forward.static is not None
    (step,) = forward.static.steps.values()
    assert isinstance(step.graph, Recorded) and step.graph.replays == 10
    assert not any(node.target in SYNCHRONISING for node in step.graph.operations.graph.nodes)


def test_only_the_steps_used_last_stay_and_none_where_weights_moved(make_model: Any, tokenizer: Any) -> None:
    policy = fused_policy(make_model, "gpt2")
    forward = static_forward(policy)
    assert forward.static is not None
    for count in (1, 2, 1, 3):
        collect_rollout(policy, tokenizer, QUERIES[:count], SAMPLED, seed=3, forward=forward)
    assert list(forward.static.steps) == [(1, COLUMNS), (3, COLUMNS)] and KEPT == 2
    weight = policy.pretrained_model.get_output_embeddings().weight
    weight.data = weight.data.clone()
    collect_rollout(policy, tokenizer, QUERIES[:1], SAMPLED, seed=3, forward=forward)
    assert list(forward.static.steps) == [(1, COLUMNS)]


def test_what_cannot_decode_statically_is_left_on_the_usual_path(make_model: Any) -> None:
    unfused = make_model("gpt_neo")  # a local window of 4
    set_fused(unfused, False)  # transformers counts local windows from the cache's end
    assert StaticDecoding.find(Forward(unfused)) is None
    assert StaticDecoding.find(Forward(make_model("t5"))) is None
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
    assert StaticDecoding.find(Forward(MistralForCausalLM(MistralConfig(**sizes, **more, sliding_window=None)).eval())) is not None
    assert StaticDecoding.find(Forward(MistralForCausalLM(MistralConfig(**sizes, **more, sliding_window=64)).eval())) is None
    assert StaticDecoding.find(Forward(BloomForCausalLM(BloomConfig(**sizes)).eval())) is None  # places come from its mask


def test_adapters_decode_statically(make_model: Any, tokenizer: Any) -> None:
    model = add_lora(make_model("llama"), LoraSettings(r=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    policy = with_value_head(model).eval()
    usual = collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=3)
    assert_same(collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=3, forward=static_forward(policy)), usual)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_network_that_samples_decodes_statically_where_asked(precision: Any, make_model: Any) -> None:
    policy, reference = (fused_policy(make_model, "gpt_neo") for _ in range(2))
    for asked in (False, True):
        networks = Networks(policy, reference, mixed_precision=precision, static_decoding=asked)
        assert (networks.sampler()[1].static is not None) is asked
        assert networks.reference.static is None


def test_a_trainer_on_the_cpu_decodes_as_usual(make_model: Any, tokenizer: Any) -> None:
    trainer = PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=2, static_decoding=True), fused_policy(make_model, "gpt2"), None, tokenizer
    )
    expected = trainer.current_device.type == "cuda"
    assert (trainer.policy.static is not None) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_writes_what_the_usual_path_writes(kind: str, make_model: Any, tokenizer: Any) -> None:
    policy = fused_policy(make_model, kind).cuda()
    forward = static_forward(policy)
    for seed in (3, 4):
        usual = collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=seed)
        assert_same(collect_rollout(policy, tokenizer, QUERIES, SAMPLED, seed=seed, forward=forward), usual)
    assert forward.static is not None and all(step.graph is not None for step in forward.static.steps.values())
