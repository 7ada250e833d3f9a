"""The plain loop does the trainer's work: same answers in, same tensors and the same update out, so their seconds compare."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.ppo import build_reward_model, build_trainer, judge, parse
from benchmarks.ppo_floor import PlainPPO, main
from benchmarks.synthetic import EOS, PAD, build_prompts, build_tokenizer
from common.checkpoint import new_manifest
from common.models.reward import RewardScorer
from common.schema import GenerateParams

TINY = [
    "--size", "xs", "--batch", "6", "--minibatch", "6", "--epochs", "1", "--new-tokens", "12", "--eos-hazard", "0.2",
    "--threads", str(torch.get_num_threads()),
]  # fmt: skip


@pytest.mark.parametrize("critic", [[], ["--critic"]])
def test_floor_and_trainer_make_the_same_update_of_the_same_answers(critic: list[str]) -> None:
    options = parse([*TINY, *critic])
    tokenizer = build_tokenizer()
    trainer = build_trainer(options, tokenizer)
    floor = PlainPPO(options)
    torch.nn.init.zeros_(floor.value_head.weight)
    torch.nn.init.zeros_(floor.value_head.bias)

    sampling = GenerateParams(max_new_tokens=options.new_tokens, do_sample=True)
    rollout = trainer.rollout(build_prompts(6), sampling, seed=0)
    lengths = [len(response) for response in rollout.responses]
    assert len(set(lengths)) > 1
    manifest = new_manifest("reward_classification", tokenizer, readout={"name": "last_token"})
    scores = judge(RewardScorer(build_reward_model(options), tokenizer=tokenizer, manifest=manifest), rollout)
    stats = trainer.step(rollout.queries, rollout.responses, scores, sampled=rollout)

    prompt = max(map(len, rollout.queries))
    ids = torch.full((6, prompt + max(lengths)), PAD)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (query, response) in enumerate(zip(rollout.queries, rollout.responses, strict=True)):
        place = slice(prompt - len(query), prompt + len(response))
        ids[row, place], real[row, place] = torch.tensor(query + response), True
    batch = floor.score(ids, real, prompt)
    record = trainer.record
    assert record is not None
    for name, tensor in (
        ("logprobs", batch.old_logprobs), ("values", batch.old_values), ("returns", batch.returns), ("advantages", batch.advantages)
    ):  # fmt: skip
        torch.testing.assert_close(tensor[batch.mask], getattr(record, name)[record.mask], atol=2e-5, rtol=2e-5)
    assert float(floor.loss(batch, torch.arange(6)).detach()) == pytest.approx(stats["ppo/loss/total"], abs=2e-6)
    floor.train(batch)
    before = PlainPPO(options).policy.state_dict()
    after = trainer.model.pretrained_model.state_dict()
    for name, parameter in floor.policy.state_dict().items():
        moved = parameter - before[name]
        # Adam's first step is the gradient's sign: it may differ where a gradient is nothing but rounding.
        assert ((moved - (after[name] - before[name])).abs() < 2e-7).float().mean() > 0.99, name


def test_answers_are_real_up_to_their_eos() -> None:
    floor = PlainPPO(parse(TINY))
    ids, real, prompt = floor.generate(build_prompts(6))
    for answer, mask in zip(ids[:, prompt:].tolist(), real[:, prompt:].tolist(), strict=True):
        end = answer.index(EOS) + 1 if EOS in answer else len(answer)
        assert mask == [True] * end + [False] * (len(answer) - end)


def test_it_prints_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--iters", "1", "--warmup", "0"]) == 0
    found = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert (found["name"], found["params"], len(found["iters"])) == ("floor", 985_856, 1)
