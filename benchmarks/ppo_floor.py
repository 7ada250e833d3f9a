"""The plain loop that PPO trainers are measured against: torch and transformers' `generate`, without any trick, trainer or log.

    OMP_WAIT_POLICY=passive OMP_PROC_BIND=true python benchmarks/ppo_floor.py [--size s] [--eos-hazard 0.04] [--critic]

Options, settings and the printed line are those of benchmarks/ppo.py. Prompts are padded on the left and answers on the right, every
forward is over the whole padded batch, and logits are taken at all answer columns. It needs torch and transformers alone, so that it
runs in a peer's environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import GPTNeoForCausalLM, GPTNeoForSequenceClassification

from benchmarks.synthetic import (
    EOS,
    PAD,
    CpuLog,
    argument_parser,
    build_judge,
    build_policy,
    build_prompts,
    phase_seconds,
    print_result,
    result,
)

KL_COEF, LAMBDA, CLIP, VALUE_CLIP, VF_COEF = 0.05, 0.95, 0.2, 0.2, 0.1


@dataclass
class Batch:
    """B rows of P prompt columns and T answer columns, S = P + T."""

    ids: Tensor  # (B, S)
    real: Tensor  # (B, S) True on tokens
    prompt: int  # P
    old_logprobs: Tensor  # (B, T), like all below
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T) True on answer tokens."""
        return self.real[:, self.prompt :]


class PlainPPO:
    """Policy, value function, reference and reward model, and the three phases of an iteration."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.policy = build_policy(options.size, eos_hazard=options.eos_hazard)
        self.reference = build_policy(options.size, eos_hazard=options.eos_hazard).eval()
        self.judge = build_judge(options.size).eval()
        self.critic: GPTNeoForSequenceClassification | None = build_judge(options.size, seed=2) if options.critic else None
        self.value_head = nn.Linear(self.policy.config.hidden_size, 1)
        trained = [*self.policy.parameters(), *(self.critic or self.value_head).parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=options.lr)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, int]:
        """Ids (B, S), where they are real (B, S), and the prompt columns P. Answers go on to their EOS."""
        columns = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (columns - len(prompt)) + list(prompt) for prompt in prompts])
        real = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        written = self.policy.generate(
            input_ids=ids,
            attention_mask=real,
            max_new_tokens=self.options.new_tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        answers = written[:, columns:]
        ends_before = (answers == EOS).cumsum(1) - (answers == EOS).long()
        return written, torch.cat([real.bool(), ends_before == 0], 1), columns

    @torch.no_grad()
    def score(self, ids: Tensor, real: Tensor, prompt: int) -> Batch:
        """Log-probabilities, values, KL-shaped rewards, advantages and returns of sampled answers."""
        mask = real[:, prompt:]
        logprobs, values = self.logprobs_and_values(ids, real, prompt)
        reference = self.answer_logprobs(self.reference, ids, real, prompt)[0]
        rows, last = torch.arange(len(ids)), mask.sum(1) - 1
        hidden = self.judge.transformer(input_ids=ids, attention_mask=real.long(), position_ids=positions(real), use_cache=False)[0]
        scores = self.judge.score(hidden[rows, prompt + last]).squeeze(-1)
        rewards = -KL_COEF * (logprobs - reference) * mask
        rewards[rows, last] += scores
        values = values * mask
        advantages, running = torch.zeros_like(values), torch.zeros(len(ids))
        for column in reversed(range(mask.shape[1])):  # delta + lambda * what follows, gamma = 1
            following = values[:, column + 1] if column + 1 < mask.shape[1] else 0.0
            running = rewards[:, column] + following - values[:, column] + LAMBDA * running
            advantages[:, column] = running
        returns = advantages + values
        mean = masked_mean(advantages, mask)
        spread = ((advantages - mean).square() * mask).sum() / (mask.sum() - 1)
        return Batch(ids, real, prompt, logprobs, values, (advantages - mean) * torch.rsqrt(spread + 1e-8) * mask, returns)

    def train(self, batch: Batch) -> None:
        """Clipped updates over shuffled minibatches."""
        for _ in range(self.options.epochs):
            for rows in torch.randperm(len(batch.ids)).split(self.options.minibatch):
                self.loss(batch, rows).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Batch, rows: Tensor) -> Tensor:
        """max(-A r, -A clip(r)) + vf_coef * max((v - R)^2, (clip(v) - R)^2) / 2, each a mean over tokens."""
        mask, advantages, returns, old_values = (x[rows] for x in (batch.mask, batch.advantages, batch.returns, batch.old_values))
        logprobs, values = self.logprobs_and_values(batch.ids[rows], batch.real[rows], batch.prompt)
        ratio = (logprobs - batch.old_logprobs[rows]).exp()
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
        error = torch.maximum((values - returns).square(), (clipped - returns).square())
        return masked_mean(surrogate, mask) + VF_COEF * 0.5 * masked_mean(error, mask)

    def logprobs_and_values(self, ids: Tensor, real: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """Both (B, T)."""
        logprobs, hidden = self.answer_logprobs(self.policy, ids, real, prompt)
        if self.critic is not None:
            inputs = {"input_ids": ids, "attention_mask": real.long(), "position_ids": positions(real)}
            values = self.critic.score(self.critic.transformer(**inputs, use_cache=False)[0])
        else:
            values = self.value_head(hidden)
        return logprobs, values.squeeze(-1)[:, prompt - 1 : -1]

    @staticmethod
    def answer_logprobs(model: GPTNeoForCausalLM, ids: Tensor, real: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) of the answer columns, hidden states (B, S, D)."""
        hidden = model.transformer(input_ids=ids, attention_mask=real.long(), position_ids=positions(real), use_cache=False)[0]
        logits = model.lm_head(hidden)[:, prompt - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1), hidden


def positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--critic", action="store_true", help="a critic of its own, of the policy's size, instead of a value head")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ppo = PlainPPO(options)
    prompts = build_prompts(options.batch * (options.warmup + options.iters))
    torch.manual_seed(0)
    iterations = []
    with CpuLog() as cpu:
        for first in range(0, len(prompts), options.batch):
            marks = [time.perf_counter()]
            sampled = ppo.generate(prompts[first : first + options.batch])
            marks.append(time.perf_counter())
            batch = ppo.score(*sampled)
            marks.append(time.perf_counter())
            ppo.train(batch)
            marks.append(time.perf_counter())
            iterations.append(phase_seconds(marks, cpu, int(batch.mask.sum())))
    parameters = sum(parameter.numel() for parameter in ppo.policy.parameters())
    name = "floor-critic" if options.critic else "floor"
    print_result(result(name, options.size, options.batch, iterations[options.warmup :], params=parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
