"""The networks of a step (policy, reference, critic) and what is asked of them: numbers per answer token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.launch.sharding import Sharding
from common.models.lower_layers import LowerLayers
from common.models.prepacked import prepacked
from rlhf.ppo.answers import Answers, Forward, Output, Trunk
from rlhf.ppo.chunks import chunks
from rlhf.ppo.kl import full_kl
from rlhf.ppo.losses import token_stats
from rlhf.ppo.models import Critic, ModelWithValueHead, reference_copy
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.static_decoding import StaticDecoding

Precision = Literal["no", "bf16"]


class Passes(NamedTuple):
    """What policy, reference and critic say about a batch before the update, each (B, T), 0 outside the answers."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    full_kl: Tensor | None
    """KL over the whole vocabulary, where it was asked for."""
    lower: LowerStates | None
    """Where the update starts from, if the layers below do not train."""


class LowerStates:
    """States that enter the lowest trained layer, of every real token of some rows of a batch: (N, D), row after row."""

    def __init__(self, layers: LowerLayers, answers: Answers, rows: Tensor) -> None:
        self.layers, self.rows = layers, rows
        ends = answers.lengths[rows].cumsum(0)
        begins = ends - answers.lengths[rows]
        self.spans = dict(zip(rows.tolist(), zip(begins.tolist(), ends.tolist(), strict=True), strict=True))
        self.states: Tensor | None = None

    def put(self, rows: Tensor, states: Tensor) -> None:
        """Store the states of some rows (N', D)."""
        if self.states is None:
            self.states = states.new_empty((max(end for _, end in self.spans.values()), states.shape[-1]))
        self.states[self._places(rows)] = states

    def of(self, rows: Tensor) -> Tensor:
        """The states of some rows (N', D)."""
        assert self.states is not None
        return self.states[self._places(rows)]

    def _places(self, rows: Tensor) -> Tensor:
        return torch.cat([torch.arange(*self.spans[row], device=rows.device) for row in rows.tolist()])


class Networks:
    """Policy with value head, frozen reference, and perhaps a critic of its own, on one device."""

    def __init__(
        self,
        model: ModelWithValueHead,
        ref_model: ModelWithValueHead | nn.Module,
        critic: Critic | None = None,
        *,
        mixed_precision: Precision = "no",
        cache_frozen_layers: bool = True,
        pack: bool = True,
        static_decoding: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        """`pack`: read batches without padding, where a model can. `static_decoding`: sample as `rlhf.ppo.static_decoding` does, too.

        `sharding`: how the networks lie in the processes; those that train are placed with their optimizer.
        """
        plain = ref_model.pretrained_model if isinstance(ref_model, ModelWithValueHead) else ref_model
        self.model, self.ref_model, self.critic = model, ref_model, critic
        self.policy, self.reference = (Forward(network, pack=pack) for network in (model.pretrained_model, plain))
        self.critic_trunk = Trunk(critic.trunk, pack=pack) if critic is not None and not self.policy.encoder_decoder else None
        trunks = [self.policy.trunk, self.reference.trunk, *([self.critic_trunk] if critic is not None else [])]
        self.packs = all(trunk is not None and trunk.packs for trunk in trunks)
        self.vocab = int(model.config.get_text_config().vocab_size)
        self.mixed_precision, self.static_decoding = mixed_precision, static_decoding
        if mixed_precision == "no":
            self._decode_statically(self.policy)
        self._short_copy: tuple[ModelWithValueHead, Forward] | None = None
        self.lower = LowerLayers.find(self.policy.trunk.module) if cache_frozen_layers and self.policy.trunk is not None else None
        self.reference_lower = None
        if self.lower is not None and self.reference.trunk is not None:
            self.reference_lower = self.lower.in_twin(self.reference.trunk.module)
        self.sharding = sharding = sharding or Sharding()
        if sharding.spreads and mixed_precision != "no":
            self._short_copy = self._copy_in_bfloat16()  # what is sharded cannot be copied any more
            sharding.place(self._short_copy[0])
        sharding.place(self.ref_model)

    @property
    def critics(self) -> list[Critic]:
        """The critic of its own, where there is one."""
        return [] if self.critic is None else [self.critic]

    @property
    def trained(self) -> list[nn.Module]:
        """The networks that an update may change."""
        return [self.model, *self.critics]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 under `mixed_precision`; weights and everything that is summed stay float32."""
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def sampler(self) -> tuple[ModelWithValueHead, Forward]:
        """The policy to sample from: itself, or under `mixed_precision` a copy of its weights as they are now, in bfloat16."""
        if self.mixed_precision == "no":
            return self.model, self.policy
        if self._short_copy is None:
            self._short_copy = self._copy_in_bfloat16()
        self.sharding.copy_weights(self.model, self._short_copy[0])
        return self._short_copy

    def _copy_in_bfloat16(self) -> tuple[ModelWithValueHead, Forward]:
        copied = reference_copy(self.model, share_frozen=False)
        for parameter in copied.pretrained_model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        forward = Forward(copied.pretrained_model, pack=False)
        self._decode_statically(forward)
        return copied, forward

    def _decode_statically(self, forward: Forward) -> None:
        if self.static_decoding:
            forward.static = StaticDecoding.find(forward)

    @contextmanager
    def _reading(self, *networks: nn.Module) -> Iterator[None]:
        """Inside, these networks are whole, to be read only, their weights laid out for the CPU's kernels.

        In float32 alone: in shorter types rounding would part these passes from the update's, and the first ratio from 1.
        """
        laid_out = prepacked(*networks, dtypes=(torch.float32,)) if self.mixed_precision == "no" else nullcontext()
        with self.sharding.gathered(*networks), laid_out:
            yield

    def switch_off_dropout(self) -> None:
        """Eval mode for every network, whatever mode the caller left it in."""
        for network in (self.model, self.ref_model, self.critic):
            if network is not None:
                network.eval()

    def kept_logprobs(self, answers: Answers, sampled: Rollout | None) -> Tensor | None:
        """Log-probabilities met while sampling, where those equal a full forward's (float32); else None."""
        if sampled is None or self.mixed_precision != "no" or next(self.policy.model.parameters()).dtype != torch.float32:
            return None
        return sampled.logprobs[:, : answers.mask.shape[1]].to(answers.ids.device)

    @torch.no_grad()
    def logprobs(self, forward: Forward, answers: Answers, temperature: float, rows: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, T) of the answers in `rows` (default: all), 0 in others and outside answers."""
        logprobs = torch.zeros(answers.mask.shape, device=answers.ids.device)
        rows = torch.arange(len(answers), device=answers.ids.device) if rows is None else rows

        def some(rows: Tensor, part: Answers) -> None:
            with self.autocast():
                logits = forward.at_answers(part).logits
            _scatter(logprobs, rows, part.present, token_stats(logits, part.targets[part.present], temperature).logprobs)

        self._walk(answers, rows, some, self.model if forward is self.policy else self.ref_model)
        return logprobs

    @torch.no_grad()
    def passes(self, answers: Answers, temperature: float, sampled: Rollout | None, own: Tensor, *, full: bool, values: bool) -> Passes:
        """Everything that a step needs before its update, of the rows `own` of the batch; all is 0 in the others.

        `full`: the KL over the vocabulary, too; `values`: whether the estimator reads values (else they are 0). Each network walks over
        the rows by itself, so that memory holds but one of them whole or laid out; only `full` needs policy and reference together.
        """
        kept = self.kept_logprobs(answers, sampled)
        if values and self.critic is None and sampled is not None and sampled.values is None:
            kept = None  # sampled from a model without value head: the forward that gives the values gives both
        logprobs, ref_logprobs, critic_values, kl = (torch.zeros(answers.mask.shape, device=answers.ids.device) for _ in range(4))
        if kept is not None:
            assert sampled is not None
            logprobs[own] = kept[own]
            if sampled.values is not None and values and self.critic is None:
                critic_values[own] = sampled.values[:, : critic_values.shape[1]].to(critic_values.device)[own]
        lower = LowerStates(self.lower, answers, own) if self.lower is not None else None
        runs_policy = kept is None or full

        def policy(rows: Tensor, part: Answers) -> Tensor | None:
            with self.autocast():
                if lower is not None and self.policy.trunk is not None:
                    lower.put(rows, self.policy.trunk.below(part, lower.layers))
                output = self.policy_at(rows, part, lower) if runs_policy else None
            if output is not None and kept is None:
                _scatter(logprobs, rows, part.present, token_stats(output.logits, part.targets[part.present], temperature).logprobs)
                if self.critic is None and values:
                    _scatter(critic_values, rows, part.present, self.model.v_head(output.states))
            return None if output is None else output.logits

        def reference(rows: Tensor, part: Answers) -> Tensor:
            with self.autocast():
                logits = self._run(self.reference, self.reference_lower, rows, part, lower).logits
            _scatter(ref_logprobs, rows, part.present, token_stats(logits, part.targets[part.present], temperature).logprobs)
            return logits

        def both(rows: Tensor, part: Answers) -> None:
            own_logits, ref_logits = policy(rows, part), reference(rows, part)
            assert own_logits is not None
            normalised = [(logits.float() / temperature).log_softmax(-1) for logits in (own_logits, ref_logits)]
            _scatter(kl, rows, part.present, full_kl(*normalised))

        def critic(rows: Tensor, part: Answers) -> None:
            assert self.critic is not None
            with self.autocast():
                states = self.critic_at(part)
            _scatter(critic_values, rows, part.present, self.critic.v_head(states))

        if full:
            self._walk(answers, own, both, self.model, self.ref_model)
        else:
            if runs_policy or lower is not None:
                self._walk(answers, own, policy, self.model)
            self._walk(answers, own, reference, self.ref_model)
        if self.critic is not None and values:
            self._walk(answers, own, critic, self.critic)
        return Passes(logprobs, ref_logprobs, critic_values, kl if full else None, lower)

    def _walk(self, answers: Answers, rows: Tensor, each: Callable[[Tensor, Answers], object], *networks: nn.Module) -> None:
        """`each(rows, their answers)` for some rows at a time, while these networks can be read."""
        with self._reading(*networks):
            for some in self.chunks(rows, answers):
                each(some, answers.select(some))

    def policy_at(self, rows: Tensor, part: Answers, lower: LowerStates | None) -> Output:
        """The policy's states and logits at the answer tokens of some rows of the batch (`part`), from `lower` upwards if given."""
        return self._run(self.policy, self.lower, rows, part, lower)

    def critic_at(self, part: Answers) -> Tensor:
        """States (M, D) of the critic's own transformer at the answer tokens."""
        assert self.critic is not None
        if self.critic_trunk is not None:
            return self.critic_trunk.at_answers(part)
        states: Tensor = self.critic.trunk(**part.inputs(), use_cache=False).last_hidden_state
        return states[part.places()]

    @staticmethod
    def _run(forward: Forward, layers: LowerLayers | None, rows: Tensor, part: Answers, lower: LowerStates | None) -> Output:
        if lower is None or layers is None:
            return forward.at_answers(part)
        return forward.at_answers(part, layers, lower.of(rows))

    def chunks(self, rows: Tensor, answers: Answers) -> list[Tensor]:
        """The rows (numbers in `answers`) in forwards that memory holds."""
        return chunks(rows, answers, self.vocab, packed=self.packs)


def _scatter(buffer: Tensor, rows: Tensor, present: Tensor, flat: Tensor) -> None:
    """Write per-token numbers (N,) of some rows into their places of `buffer` (B, T)."""
    padded = torch.zeros(present.shape, device=buffer.device).masked_scatter_(present, flat.to(buffer.dtype))
    buffer[rows, : present.shape[1]] = padded
