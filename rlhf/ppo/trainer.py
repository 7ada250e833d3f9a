"""The classic PPO step, `PPOTrainer.step(queries, responses, scores)`, on plain tensors.

One step: log-probabilities and values of the answers, the reference's log-probabilities, KL-shaped rewards, advantages, then some
epochs of clipped updates. Dropout is off throughout. The loop around it stands in `loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.launch.runtime import Runtime
from common.launch.sharding import Sharding
from common.models.load import set_dropout
from common.models.parts import without_adapters
from common.models.recompute import recompute_activations
from common.notes import say
from common.optim import make_optimizer
from common.schema import GenerateParams
from common.tracking import Tracker
from rlhf.ppo import logs, loop
from rlhf.ppo.advantages import are_alike, classic_whitened_rewards
from rlhf.ppo.answers import Answers, gather_answers
from rlhf.ppo.classic_attributes import ClassicAttributes
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.estimators import ESTIMATORS
from rlhf.ppo.kl import adapted_kl_coef, kl_per_token
from rlhf.ppo.masked import masked_rescale, masked_whiten
from rlhf.ppo.models import Critic, ModelWithValueHead, freeze_below, reference_copy
from rlhf.ppo.networks import Networks, Passes
from rlhf.ppo.prompts import as_ids
from rlhf.ppo.record import StepRecord
from rlhf.ppo.rewards import RunningMoments, kl_shaped_rewards, transform_scores
from rlhf.ppo.rollout import Rollout, collect_rollout, joined
from rlhf.ppo.sharing import roll_out, share
from rlhf.ppo.statistics import Stats, step_statistics
from rlhf.ppo.update import Update
from rlhf.sampling_options import check_sampling_options

if TYPE_CHECKING:
    from accelerate import Accelerator

Ids = Sequence[int] | Tensor


class NonFiniteError(UserError):
    """A score, log-probability, loss or gradient that is no finite number; raised before the optimizer touches a parameter."""


class _Batch(NamedTuple):
    """What `step` is given, as ids."""

    queries: list[list[int]]
    responses: list[list[int]]
    scores: Tensor
    masks: list[list[int]] | None
    sampled: Rollout | None


class PPOTrainer(ClassicAttributes):
    """Trains a policy with a value head (`model`) against its reference.

    The arguments have the classic order. `ref_model`: None for a frozen copy of `model` as it is now (LoRA: adapters included).
    `optimizer`: None for the one that `config` describes. `dataset`, `data_collator` make `dataloader`, and `train` takes its
    prompts from the dataset. `num_shared_layers`: embeddings and this many layers from below are frozen and shared with the reference.
    `lr_scheduler` steps once per PPO step. `reward`: what judges answers in `train`. `critic`: a value model of its own instead of the
    value head. `runtime`: this process among others; without it a model that lies on the CPU moves to the GPU where there is one.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: ModelWithValueHead | None = None,
        ref_model: ModelWithValueHead | nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable[[list[Any]], Any] | None = None,
        *,
        reward: Any = None,
        critic: Critic | None = None,
        runtime: Runtime | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        _check_arguments(config, model, ref_model, tokenizer, num_shared_layers, training_data_collator)
        assert model is not None
        self.config = config or PPOConfig()
        self.estimator = ESTIMATORS[self.config.advantage_estimator]
        if critic is not None and not self.estimator.reads_values:
            raise ValueError(f"critic: advantage_estimator {self.config.advantage_estimator} needs none")
        self.runtime = runtime or Runtime.local(model.device if model.device.type != "cpu" else None)
        self.sharding = sharding or Sharding()
        spreads = self.sharding.spreads
        if spreads and optimizer is not None:
            raise ValueError("optimizer: sharded weights have one of their own; leave it out")
        device = torch.device("cpu") if spreads else self.runtime.device  # sharding moves them, a block at a time
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer
        self.reward = reward
        self.critic = critic.eval().to(device) if critic is not None else None
        if num_shared_layers is not None:
            freeze_below(model.pretrained_model, num_shared_layers)
        if critic is not None or not self.estimator.reads_values:
            model.v_head.requires_grad_(False)  # the critic's head takes its place, or nothing reads it
        reference = ref_model if ref_model is not None else reference_copy(model, share_frozen=not spreads)
        self.ref_model = reference.eval().requires_grad_(False).to(device) if ref_model is not None else reference
        transformers = [without_adapters(model.pretrained_model), *([critic.trunk] if critic is not None else [])]
        if self.config.gradient_checkpointing:
            for transformer in transformers:
                recompute_activations(transformer)
        self.recomputing = [transformer for transformer in transformers if _recomputes(transformer)]
        """Those whose activations are computed again in backward."""
        # They are in training mode only; with every dropout at 0 the modes do not differ.
        for transformer in self.recomputing:
            set_dropout(transformer, 0.0)
        self.networks = Networks(
            model,
            self.ref_model,
            self.critic,
            mixed_precision=self.config.mixed_precision,
            cache_frozen_layers=self.config.cache_frozen_layers and not spreads,
            # What others set up to be recomputed in backward knows no line there; on a GPU each text would start kernels of its own.
            pack=self.config.padding_free
            and bool(self.recomputing) is self.config.gradient_checkpointing
            and self.runtime.device.type == "cpu",
            static_decoding=self.config.static_decoding and self.runtime.device.type == "cuda" and not spreads,
            sharding=self.sharding,
        )
        self.policy = self.networks.policy
        trained = nn.ModuleList([model] if critic is None else [model, critic])
        kinds = {parameter.dtype for parameter in trained.parameters() if parameter.requires_grad}
        if not kinds:
            raise ValueError("no parameter is left to train: every one has requires_grad=False")
        rounded = sorted(str(kind).removeprefix("torch.") for kind in kinds & {torch.bfloat16, torch.float16})
        if rounded and optimizer is None:
            raise ValueError(
                f"the weights to train are {', '.join(rounded)}, where updates as small as Adam's are lost in rounding; load them as "
                "float32, train LoRA adapters (float32) over them, or pass an optimizer that keeps float32 copies"
            )
        new_optimizer = partial(
            make_optimizer,
            trained,
            self.config.optimizer,
            learning_rate=self.config.learning_rate,
            eps=self.config.adam_eps,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        self.optimizer = self.sharding.train(self.networks.trained, lambda: optimizer or new_optimizer())
        self.parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self.lr_scheduler = lr_scheduler
        self.dataset = dataset
        self.dataloader = self.prepare_dataloader(dataset, data_collator) if dataset is not None else None
        self.kl_coef = self.config.init_kl_coef
        self.moments = RunningMoments()
        self.steps_done = 0
        self.optimizer_steps = 0
        self.sampled_rows = 0
        self._said_alike = False
        self.record: StepRecord | None = None
        """Tensors of the last step."""

    # --- what classic scripts ask a trainer -----------------------------------------------------------------------------------------

    @cached_property
    def accelerator(self) -> Accelerator:
        """accelerate's own object, for scripts that ask it for `device`, `num_processes`, `is_main_process`, `unwrap_model` …"""
        from accelerate import Accelerator

        return Accelerator(cpu=self.current_device.type == "cpu")

    @property
    def current_device(self) -> torch.device:
        return self.runtime.device

    @property
    def is_encoder_decoder(self) -> bool:
        return self.policy.encoder_decoder

    @cached_property
    def tracker(self) -> Tracker | None:
        """Where `log_stats` logs, in a run directory made now; None where `config` asks for no log."""
        return logs.own_tracker(self.config, is_main=self.runtime.is_main)

    log_stats = logs.log_stats
    train = loop.train

    # --- sampling ------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Answers to one prompt (ids (S,) -> (1, S + T)) or a list of prompts (-> list of ids), as tensors without padding.

        `length_sampler` draws `max_new_tokens`, for each `batch_size` prompts anew. With `generate_ref_response` also the reference's
        answers, as a second result. `generation_kwargs` are those of a config's `generation_config`. An encoder-decoder's answers contain
        neither the prompt nor the decoder's start token.
        """
        single = isinstance(query_tensor, Tensor)
        if isinstance(query_tensor, Tensor) and query_tensor.ndim > 1 and len(query_tensor) > 1:
            raise ValueError(f"query_tensor of shape {tuple(query_tensor.shape)}: one prompt is a tensor (S,), several are a list of those")
        queries = [as_ids(query_tensor)] if isinstance(query_tensor, Tensor) else [as_ids(query) for query in query_tensor]
        generation_kwargs.pop("pad_token_id", None)  # padding is told by position here
        # Numbers among the queries of all processes, which bring as many each.
        first = self.sampled_rows + self.runtime.rank * len(queries)
        self.sampled_rows += len(queries) * self.runtime.world_size
        results: tuple[list[Tensor], ...] = ([], []) if generate_ref_response else ([],)
        part = batch_size if length_sampler is not None else max(1, len(queries))
        for begin in range(0, len(queries), part):
            if length_sampler is not None:
                generation_kwargs["max_new_tokens"] = int(length_sampler())
            params = GenerateParams.model_validate(generation_kwargs)
            check_sampling_options(params, setting="generate")
            asked = queries[begin : begin + part]
            rows = range(first + begin, first + begin + len(asked))
            options: dict[str, Any] = {"seed": self.config.seed, "step": self.steps_done, "rows": rows, "batch_size": batch_size}
            networks = (self.networks.sampler(), (self.ref_model, self.networks.reference))
            for answers, (model, forward) in zip(results, networks, strict=False):
                with self.sharding.gathered(model):
                    rollout = collect_rollout(model, self.tokenizer, asked, params, forward=forward, **options)
                for query, response in zip(asked, rollout.responses, strict=True):
                    with_prompt = return_prompt and not self.is_encoder_decoder
                    answers.append(torch.tensor([*query, *response] if with_prompt else response, device=self.current_device))
        shaped = tuple(answers[0][None] if single else answers for answers in results)
        return shaped if generate_ref_response else shaped[0]

    def rollout(self, queries: Sequence[Sequence[int]], params: GenerateParams, **options: Any) -> Rollout:
        """`collect_rollout` of the policy; options are its keyword arguments."""
        model, forward = self.networks.sampler()
        with self.sharding.gathered(model):
            return collect_rollout(model, self.tokenizer, queries, params, forward=forward, **options)

    def rollout_of_all(self, queries: Sequence[Sequence[int]], params: GenerateParams, *, group: int = 1, **options: Any) -> Rollout:
        """As `rollout`, of prompts that all processes know, numbered from 0; they share the work, and each gets all answers.

        `group` answers to a prompt stand side by side.
        """
        return roll_out(self.runtime, queries, lambda some, rows: self.rollout(some, params, rows=rows, **options), group)

    @torch.no_grad()
    def sampled_kl(self, rollout: Rollout, temperature: float = 1.0) -> list[float]:
        """KL of each answer (nats, k1 estimate) from the reference: sum over tokens of log p - log p_ref.

        Processes that were started together share the work: all of them ask, with one rollout.
        """
        self.networks.switch_off_dropout()
        answers = gather_answers(rollout.queries, rollout.responses, self.policy.model.config, device=self.model.device)
        own = share(answers.sizes, self.runtime)
        logprobs = self.networks.kept_logprobs(answers, rollout)
        if logprobs is None:
            logprobs = self.runtime.sum(self.networks.logprobs(self.policy, answers, temperature, own))
        difference = logprobs - self.runtime.sum(self.networks.logprobs(self.networks.reference, answers, temperature, own))
        return [float(value) for value in torch.where(answers.present, difference, 0.0).sum(1)]

    # --- the step ------------------------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Sequence[Ids],
        responses: Sequence[Ids],
        scores: Sequence[float] | Sequence[Tensor] | Tensor,
        response_masks: Sequence[Ids] | None = None,
        *,
        temperature: float = 1.0,
        sampled: Rollout | None = None,
    ) -> Stats:
        """One PPO step on `config.batch_size` answers of each process; returns statistics under their classic names.

        With `config.samples_per_prompt` k, rows i * k to (i + 1) * k - 1 are answers to one prompt.
        `queries`, `responses`: token ids, responses with their EOS. `scores`: one number per answer. `response_masks`: 1 on response
        tokens that count. `temperature`: what the responses were sampled at. `sampled`: the rollout they come from, whose
        log-probabilities and values then need no forward (float32 models).

        Raises ValueError for lists that do not fit together, NonFiniteError before anything non-finite reaches a parameter.
        """
        started = time.perf_counter()
        query_ids, response_ids = [as_ids(query) for query in queries], [as_ids(response) for response in responses]
        if sampled is not None and (sampled.queries, sampled.responses) != (query_ids, response_ids):
            raise ValueError("sampled holds other queries or responses than those given")
        if sampled is not None and sampled.temperature != temperature:
            raise ValueError(f"temperature {temperature} is not the {sampled.temperature} that the rollout was sampled at")
        masks = None if response_masks is None else [as_ids(mask) for mask in response_masks]
        raw_scores = torch.tensor([float(score) for score in scores], dtype=torch.float32)
        batch = self._batch_of_all(_Batch(query_ids, response_ids, raw_scores, masks, sampled))
        self.networks.switch_off_dropout()
        if self.policy.encoder_decoder and batch.sampled is None:  # a rollout of ours has no start token; a first token like it was sampled
            self._strip_start(batch.responses, batch.masks)
        answers = gather_answers(
            batch.queries, batch.responses, self.policy.model.config, response_masks=batch.masks, device=self.model.device
        )
        self.record, update = self._prepare(answers, batch.scores.to(self.model.device), temperature, batch.sampled)
        prepared = time.perf_counter()
        for transformer in self.recomputing:
            transformer.train()
        updates = update.run()
        for transformer in self.recomputing:
            transformer.eval()
        self.optimizer_steps = update.optimizer_steps
        stats = step_statistics(self.record, updates, kl_coef=self.kl_coef)
        stats["ppo/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if self.config.adap_kl_ctrl:
            self.kl_coef = adapted_kl_coef(self.kl_coef, stats["objective/kl"], self.config.target, len(answers), self.config.horizon)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps_done += 1
        stats["time/ppo/prepare"] = prepared - started
        stats["time/ppo/optimize"] = time.perf_counter() - prepared
        stats["time/ppo/total"] = time.perf_counter() - started
        return stats

    def _batch_of_all(self, own: _Batch) -> _Batch:
        """The rows of all processes, one process's behind the other's, in every process; what is wrong with them is raised in all."""
        parts = self.runtime.gather([own])
        for part in parts:
            counts = {"queries": len(part.queries), "responses": len(part.responses), "scores": len(part.scores)}
            if part.masks is not None:
                counts["response_masks"] = len(part.masks)
            for name, count in counts.items():
                if count != self.config.batch_size:
                    raise ValueError(f"{name}: got {count}, expected batch_size {self.config.batch_size} of them")
        batch = own
        if len(parts) > 1:
            masks = [part.masks or [[1] * len(response) for response in part.responses] for part in parts]
            rollouts = [part.sampled for part in parts if part.sampled is not None]
            batch = _Batch(
                [query for part in parts for query in part.queries],
                [response for part in parts for response in part.responses],
                torch.cat([part.scores for part in parts]),
                [mask for part in masks for mask in part] if any(part.masks is not None for part in parts) else None,
                joined(rollouts) if len(rollouts) == len(parts) else None,
            )
        group = self.config.samples_per_prompt
        for row, query in enumerate(batch.queries):
            if query != batch.queries[row - row % group]:
                raise ValueError(
                    f"queries {row - row % group} and {row} differ: samples_per_prompt {group} consecutive rows have one query"
                )
        self._refuse_rows("scores", ~torch.isfinite(batch.scores))
        return batch

    def _strip_start(self, responses: list[list[int]], masks: list[list[int]] | None) -> None:
        """transformers' `generate` puts the decoder's start token before an encoder-decoder's answer; it was not sampled."""
        for row, response in enumerate(responses):
            if response[:1] == [self.policy.model.config.decoder_start_token_id]:
                responses[row] = response[1:]
                if masks is not None and len(masks[row]) == len(response):
                    masks[row] = masks[row][1:]

    def _refuse_rows(self, what: str, bad: Tensor, rows: Tensor | None = None) -> None:
        """Raise where a row of `bad` (B,) or (B, T) is True; `rows` are the batch's numbers of these rows.

        All processes know of all rows, so that they raise together and none waits for another that is gone.
        """
        wrong = bad.reshape(len(bad), -1).any(1)
        if not bool(wrong.any()):
            return
        numbers = wrong.nonzero().squeeze(1) if rows is None else rows[wrong]
        shown = ", ".join(map(str, sorted(numbers.tolist())))
        raise NonFiniteError(f"PPO step {self.steps_done}: {what} of rows {shown} are not finite; nothing was updated with them")

    # --- before the update -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, answers: Answers, scores: Tensor, temperature: float, sampled: Rollout | None) -> tuple[StepRecord, Update]:
        config, estimator, mask = self.config, self.estimator, answers.mask
        own = share(answers.sizes, self.runtime)
        passes = self.networks.passes(answers, temperature, sampled, own, full=config.kl_penalty == "full", values=estimator.reads_values)
        logprobs, ref_logprobs, values, full_kl = self._of_all(passes)
        for name, tensor in (("log-probabilities", logprobs), ("the reference's log-probabilities", ref_logprobs), ("values", values)):
            self._refuse_rows(name, ~torch.isfinite(tensor))
        scores = transform_scores(
            scores, self.moments, scale=config.use_score_scaling, centre=config.use_score_norm, clip=config.score_clip
        )
        kl = kl_per_token(logprobs, ref_logprobs, config.kl_penalty) if full_kl is None else full_kl
        rewards, non_score = kl_shaped_rewards(scores, kl, mask, 0.0 if estimator.kl_in_loss else self.kl_coef)
        shaped = rewards
        if config.whiten_rewards and config.classic_quirks:
            shaped = classic_whitened_rewards(rewards, mask, answers.lengths.max() - answers.lengths)
        elif config.whiten_rewards:
            shaped = masked_rescale(rewards, mask)
        extra = shaped.shape[1] - mask.shape[1]
        advantages, returns = estimator.estimate(
            scores, shaped, nn.functional.pad(values, (0, extra)), nn.functional.pad(mask, (0, extra)), config
        )
        advantages = advantages[:, : mask.shape[1]]
        if self._tell_nothing(advantages, mask, scores, values):
            advantages = torch.zeros_like(advantages)
        elif estimator.whitens:
            advantages = masked_whiten(advantages, mask)
        record = StepRecord(
            answers=answers,
            scores=scores,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=torch.where(mask, values, 0.0) if estimator.reads_values else None,
            kl=kl,
            rewards=rewards,
            non_score_rewards=non_score,
            advantages=advantages,
            returns=None if returns is None else returns[:, : mask.shape[1]],
        )
        update = Update(
            config,
            self.networks,
            self.optimizer,
            self.parameters,
            self.runtime,
            self._refuse_rows,
            record,
            passes.lower,
            temperature,
            self.kl_coef if estimator.kl_in_loss else None,
            self.steps_done,
            self.optimizer_steps,
        )
        return record, update

    def _of_all(self, passes: Passes) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probabilities, the reference's, values and perhaps the full KL, each (B, T), with the rows of all processes."""
        if self.runtime.world_size == 1:
            return passes.logprobs, passes.ref_logprobs, passes.values, passes.full_kl
        kl = [] if passes.full_kl is None else [passes.full_kl]
        summed = self.runtime.sum(torch.stack([passes.logprobs, passes.ref_logprobs, passes.values, *kl]))
        return summed[0], summed[1], summed[2], summed[3] if kl else None

    def _tell_nothing(self, advantages: Tensor, mask: Tensor, scores: Tensor, values: Tensor) -> bool:
        """Whether advantages (B, T), before they are whitened, are rounding alone; says so once."""
        # GRPO's, which are in deviations of their group, have been told from rounding there.
        scale: Tensor | float = 0.0
        if not self.estimator.kl_in_loss:
            # Log-probabilities are right to about 1e-6 nats, and the KL coefficient times that enters.
            scale = scores.abs().max() + torch.where(mask, values, 0.0).abs().max() + self.kl_coef
        alike = are_alike(advantages, mask, scale, centre=self.estimator.whitens)
        if alike and not self._said_alike:
            self._said_alike = True
            say(
                f"PPO step {self.steps_done}: all scores alike, so that advantages would be rounding alone; they are 0 then, and teach the "
                "policy nothing (said once)"
            )
        return alike

    # --- state -----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model's own weights that the next step depends on; sharded, whole in the main process alone."""
        return {
            "v_head": self.sharding.whole_weights(self.model.v_head),
            "critic": None if self.critic is None else self.sharding.whole_weights(self.critic),
            "optimizer": self.sharding.optimizer_state(self.optimizer),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_coef,
            "moments": vars(self.moments).copy(),
            "steps_done": self.steps_done,
            "optimizer_steps": self.optimizer_steps,
            "sampled_rows": self.sampled_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the model's own weights are the caller's to load.

        Raises ValueError, before anything changes, where the state is of a trainer with a critic or scheduler and this one has none, or
        the other way round.
        """
        for name in ("critic", "lr_scheduler"):
            has, had = getattr(self, name) is not None, state[name] is not None
            if has is not had:
                owners = ("the state", "this trainer") if had else ("this trainer", "the state")
                raise ValueError(f"{name}: {owners[0]} has one and {owners[1]} has none; make the trainer as the one that was saved")
        self.sharding.load_weights(self.model.v_head, state["v_head"])
        if self.critic is not None:
            self.sharding.load_weights(self.critic, state["critic"])
        self.sharding.load_optimizer_state(self.optimizer, state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.kl_coef = state["kl_coef"]
        self.moments = RunningMoments(**state["moments"])
        self.steps_done, self.optimizer_steps, self.sampled_rows = (
            state[name] for name in ("steps_done", "optimizer_steps", "sampled_rows")
        )

    def save_pretrained(self, folder: str) -> None:
        """Write the policy as a plain Hugging Face directory with its tokenizer and `value_head.safetensors`."""
        with self.sharding.whole(self.model) as model:
            if self.runtime.is_main:
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)


def _check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, num_shared_layers: int | None, training_data_collator: Any
) -> None:
    if config is not None and not isinstance(config, PPOConfig):
        raise ValueError(f"config: got {type(config).__module__}.{type(config).__name__}, expected rlhf.ppo.PPOConfig")
    if model is None or tokenizer is None:
        raise ValueError("PPOTrainer needs a model with a value head and its tokenizer")
    if not isinstance(model, ModelWithValueHead):
        raise ValueError(
            f"model: got {type(model).__name__}, expected AutoModelForCausalLMWithValueHead.from_pretrained(…) or, for encoder-decoders, "
            "AutoModelForSeq2SeqLMWithValueHead.from_pretrained(…); both take a name, a directory or a model"
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if ref_model is not None and any(id(parameter) in trained for parameter in ref_model.parameters()):
        raise ValueError("ref_model holds weights that model trains, so that it would change with it; leave it out for a frozen copy")
    if ref_model is not None and num_shared_layers is not None:
        raise ValueError("num_shared_layers shares layers with the copy that is made without ref_model; leave one of them out")
    if training_data_collator is not None:
        raise ValueError(
            "training_data_collator has nothing to do here: prompts and answers are padded by position, and padding changes no number; "
            "leave it out (data_collator makes the dataloader's batches)"
        )


def _recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
