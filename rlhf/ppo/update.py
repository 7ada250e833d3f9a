"""The update of one PPO step: epochs over the batch in minibatches, each a clipped loss, its gradient and a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.launch.runtime import Runtime
from common.launch.sharding import Sharding
from common.sampling import Stream, stream_keys
from rlhf.ppo.answers import Answers
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.kl import kl_per_token
from rlhf.ppo.losses import policy_loss, token_stats, value_loss
from rlhf.ppo.masked import masked_moments, masked_sum
from rlhf.ppo.networks import LowerStates, Networks
from rlhf.ppo.record import StepRecord
from rlhf.ppo.sharing import share

Refuse = Callable[..., None]
"""`refuse(what, bad, rows=None)`: raises where a row is bad (`PPOTrainer._refuse_rows`)."""


@dataclass
class Update:
    """The update of step number `step` (from 0) on what `record` holds."""

    config: PPOConfig
    networks: Networks
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    runtime: Runtime
    refuse: Refuse
    record: StepRecord
    lower: LowerStates | None
    temperature: float
    kl_loss_coef: float | None
    """Weight of the KL in the loss; None where the rewards have it."""
    step: int
    optimizer_steps: int
    """Of the trainer so far; counts on."""

    def run(self) -> list[dict[str, float]]:
        """All epochs; returns one dict of figures per optimizer step."""
        config = self.config
        updates: list[dict[str, float]] = []
        for epoch in range(config.ppo_epochs):
            order = minibatch_order(len(self.record.answers), config.seed, self.step, epoch)
            for rows in order.to(self.networks.device).split(config.backward_batch_size * self.runtime.world_size):
                updates.append(self.optimizer_step(rows))
            if config.early_stopping and updates[-1]["policy/policykl"] > 1.5 * config.target_kl:
                updates[-1]["early_stopped"] = 1.0
                break
        return updates

    def optimizer_step(self, rows: Tensor) -> dict[str, float]:
        """Gradient of the loss over `rows` (those of all processes) and one step of the optimizer.

        Each process takes its share of the rows, in forwards of `mini_batch_size` at most.
        """
        config, record = self.config, self.record
        count = record.mask[rows].sum().float()
        self.drop_gradients()
        sums: dict[str, Tensor] = {}
        unusable = torch.zeros(len(record.answers), dtype=torch.bool, device=rows.device)
        own = self.own(rows)
        if len(own) == 0 and self.lower is not None:  # the sums below have a part of every process
            sums, _ = self.backward(self.lower.rows[:1], count.clamp(min=1), counts=False)
        chunks = [chunk for part in own.split(config.mini_batch_size) for chunk in self.networks.chunks(part, record.answers)]
        most = max(self.runtime.gather([len(chunks)])) if self.sharding.spreads else len(chunks)
        for number in range(most):  # as many in each process where they go in step, the last ones without effect
            chunk = chunks[min(number, len(chunks) - 1)]
            figures_of_chunk, bad = self.backward(chunk, count.clamp(min=1), number < len(chunks), last=number == most - 1)
            unusable[chunk] |= bad  # one that is there again has no effect, and is never bad
            for name, value in figures_of_chunk.items():
                sums[name] = sums[name] + value if name in sums else value
        names = list(sums)
        summed = self.runtime.sum(torch.cat([torch.stack([sums[name] for name in names]), unusable.float()]))
        not_finite = self.not_finite("losses", summed[len(names) :] > 0)
        figures = dict(zip(names, summed[: len(names)].tolist(), strict=True))
        for name, tensor in (("returns", record.returns), ("val", record.values)):
            if tensor is not None:
                mean, var = masked_moments(tensor[rows], record.mask[rows])
                figures |= {f"{name}/mean": float(mean), f"{name}/var": float(var)}
        figures |= {"skipped": 0.0, "empty": 0.0, "not_finite": 0.0, "early_stopped": 0.0, "gradient_norm": 0.0}
        if not_finite:
            self.drop_gradients()
            return {**figures, "not_finite": 1.0}
        if float(count) == 0:  # nothing to learn from; a step of Adam would move by its momentum alone
            self.drop_gradients()
            return {**figures, "empty": 1.0}
        if figures["policy/ratio"] > config.ratio_threshold:
            self.drop_gradients()
            return {**figures, "skipped": 1.0, **{name: 0.0 for name in figures if name.startswith("loss/")}}
        norm = self.apply_gradients(rows)
        return {**figures, "not_finite": 1.0} if norm is None else {**figures, "gradient_norm": norm}

    @property
    def sharding(self) -> Sharding:
        """How the networks lie in the processes."""
        return self.networks.sharding

    def drop_gradients(self) -> None:
        self.sharding.drop_gradients(self.optimizer)

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of some rows: those whose lower states it holds, else as many as any other process has, of like length."""
        if self.runtime.world_size == 1:
            return rows
        if self.lower is None:
            return rows[share(self.record.answers.sizes[rows], self.runtime)]
        return rows[torch.isin(rows, self.lower.rows)]

    def not_finite(self, what: str, bad: Tensor, rows: Tensor | None = None) -> bool:
        """Whether a row is bad and its update is to be left out; where it is not to be, raises."""
        if self.config.on_nan == "skip":
            return bool(bad.any())
        self.refuse(what, bad, rows)
        return False

    def backward(self, rows: Tensor, count: Tensor, counts: bool = True, *, last: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """Add the gradient of some rows, unless their loss is not finite; without `counts` it is 0, as is all that is returned.

        `last`: of those before a step of the optimizer.
        Returns their part of each figure (a sum over tokens divided by `count`), and which rows' losses are not finite (B,).
        """
        loss, figures, bad = self.sharding.forward(self.networks.trained, lambda: self.loss(rows, count, counts))
        # Where processes go in step, none leaves out a backward: what is not finite is dropped with the whole update.
        if loss.requires_grad and (self.sharding.spreads or not bool(bad.any())):
            self.sharding.backward(loss, last=last)
        return {**figures, "loss/total": loss.detach()}, bad

    def loss(self, rows: Tensor, count: Tensor, counts: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of some rows, and what `backward` returns beside it."""
        config, record, networks = self.config, self.record, self.networks
        warming = self.step < config.critic_warmup_steps
        answers = record.answers.select(rows)
        width = answers.mask.shape[1]
        mask, targets = answers.mask[answers.present] & counts, answers.targets[answers.present]

        def flat(tensor: Tensor) -> Tensor:
            return tensor[rows, :width][answers.present]

        old_logprobs, advantages = flat(record.logprobs), flat(record.advantages)
        with networks.autocast(), torch.set_grad_enabled(not warming):
            output = networks.policy_at(rows, answers, self.lower)
        with torch.set_grad_enabled(not warming):
            stats = token_stats(output.logits, targets, self.temperature, entropy=True, entropy_gradient=config.entropy_coef > 0)
        logprobs, entropy = stats.logprobs, stats.entropy
        assert entropy is not None
        loss_p, clipped_p = policy_loss(logprobs, old_logprobs, advantages, mask, config.cliprange, dual_clip=config.dual_clip, count=count)
        means, figures = {"policy/entropy": entropy}, {"loss/policy": loss_p, "policy/clipfrac": clipped_p}
        checked, loss = logprobs, torch.zeros_like(loss_p)
        if record.returns is not None:
            assert record.values is not None
            values, old_values, returns = self.values(output.states, answers), flat(record.values), flat(record.returns)
            loss_v, clipped_v = value_loss(values, old_values, returns, mask, config.cliprange_value, count=count)
            means |= {"val/vpred": values, "val/error": (values - returns).square()}
            figures |= {"loss/value": loss_v, "val/clipfrac": clipped_v}
            checked, loss = logprobs + values, config.vf_coef * loss_v
        if not warming:
            loss = loss + loss_p
            if config.entropy_coef > 0:
                loss = loss - config.entropy_coef * masked_sum(entropy, mask) / count
        if self.kl_loss_coef is not None:
            figures["loss/kl"] = masked_sum(kl_per_token(logprobs, flat(record.ref_logprobs), "k3"), mask) / count
            loss = loss + self.kl_loss_coef * figures["loss/kl"]
        bad = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if not bool(torch.isfinite(loss)):
            per_token = torch.zeros_like(answers.mask).masked_scatter_(answers.present, ~torch.isfinite(checked))
            bad = (per_token if bool(per_token.any()) else answers.present).any(1)
        with torch.no_grad():
            moved = logprobs - old_logprobs
            means |= {
                "policy/approxkl": 0.5 * moved.square(),
                "policy/policykl": -moved,
                "policy/ratio": moved.exp(),
                "policy/advantages_mean": advantages,
            }
            figures |= {name: masked_sum(tensor, mask) / count for name, tensor in means.items()}
        return loss, {name: figure.detach() for name, figure in figures.items()}, bad

    def values(self, states: Tensor, answers: Answers) -> Tensor:
        """Values (N,) at the answers' places: of the head on the policy's `states` (N, D), or of the critic."""
        critic, head = self.networks.critic, self.networks.model.v_head
        if critic is not None:
            head = critic.v_head
            with self.networks.autocast():
                states = self.networks.critic_at(answers)
        values: Tensor = head(states)
        return values

    def sum_gradients(self) -> None:
        """Over processes, where sharding has not. A parameter without a gradient in some gets the others', one without in all none."""
        if self.runtime.world_size == 1 or self.sharding.spreads:
            return
        there = self.runtime.sum(torch.tensor([float(parameter.grad is not None) for parameter in self.parameters])).tolist()
        parameters = [parameter for parameter, count in zip(self.parameters, there, strict=True) if count]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.runtime.sum_in_place([parameter.grad for parameter in parameters if parameter.grad is not None])

    def apply_gradients(self, rows: Tensor) -> float | None:
        """Sum gradients over processes, clip, and step; returns the norm before clipping.

        Gradients that are not finite are refused, or change nothing, and the norm is None.
        """
        self.sum_gradients()
        norm = self.sharding.gradient_norm(self.parameters)
        if not bool(torch.isfinite(norm)):
            self.drop_gradients()
            if self.not_finite("gradients", torch.ones(len(rows), dtype=torch.bool), rows):
                return None
        clips = not (self.config.classic_quirks and self.optimizer_steps)
        self.optimizer_steps += 1
        if self.config.max_grad_norm is not None and clips:
            self.sharding.clip_gradients(self.parameters, self.config.max_grad_norm, norm)
        self.sharding.step(self.optimizer)
        return float(norm)


def minibatch_order(count: int, seed: int, step: int, epoch: int) -> Tensor:
    """Row numbers 0 … count - 1 (of all processes) in an order of their own for each step and epoch."""
    key = stream_keys(seed, step, torch.tensor([0]), epoch, Stream.MINIBATCHES)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(key)))
