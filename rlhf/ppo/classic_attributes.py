"""What scripts written for trl 0.11.4 read of its trainer: there with the old meaning, or an error that says what to use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from common.lora import is_lora
from rlhf.ppo.config import PPOConfig

if TYPE_CHECKING:
    from common.launch.runtime import Runtime
    from rlhf.ppo.models import ModelWithValueHead
    from rlhf.ppo.rewards import RunningMoments

_OWN_STEP = "it is a part of step; the pure functions of rlhf.ppo.{} are for scripts that compute themselves"
_HUB = "use save_pretrained(FOLDER), then huggingface_hub.upload_folder"
_BEST = "use train(save_to=FOLDER), which keeps the best model"

INSTEAD: dict[str, str] = {
    "push_to_hub": _HUB,
    "from_pretrained": "load the model with AutoModelForCausalLMWithValueHead.from_pretrained(FOLDER), and make a trainer of it",
    "create_model_card": "train(save_to=FOLDER) writes one beside the model",
    "push_to_hub_kwargs": _BEST,
    "compare_step": _BEST,
    "highest_reward": _BEST,
    "model_params": "use parameters: those of model (and critic) that train",
    "data_collator": "prompts and answers are padded by position, without one; the dataloader's own is dataloader.collate_fn",
    "optional_peft_ctx": "use ref_model, which exists with LoRA, too",
    "is_using_text_environment": "text environments are not here; sample as they did and pass response_masks to step",
    "prepare_model_inputs": "use rlhf.ppo.answers.gather_answers",
    "batched_forward_pass": "after a step, record has its logprobs, ref_logprobs and values",
    "compute_rewards": "after a step, record has its rewards and kl; " + _OWN_STEP.format("rewards"),
    "compute_advantages": "after a step, record has its advantages and returns; " + _OWN_STEP.format("advantages"),
    "loss": _OWN_STEP.format("losses"),
    "train_minibatch": _OWN_STEP.format("update"),
    "record_step_stats": _OWN_STEP.format("statistics"),
    "gather_stats": _OWN_STEP.format("statistics"),
}
"""Attribute or method of trl's trainer that is not here -> what to use instead."""


KEPT_COLUMNS = frozenset({"input_ids", "attention_mask", "label", "query", "response"})
"""Of a `datasets.Dataset`, with `remove_unused_columns`."""


class KLController:
    """The KL coefficient as `value`, which may be set."""

    def __init__(self, trainer: ClassicAttributes) -> None:
        self._trainer = trainer

    @property
    def value(self) -> float:
        return self._trainer.kl_coef

    @value.setter
    def value(self, coef: float) -> None:
        self._trainer.kl_coef = float(coef)


class ClassicAttributes:
    """Of a `PPOTrainer`, whose own attributes these are made of."""

    config: PPOConfig
    kl_coef: float
    model: ModelWithValueHead
    moments: RunningMoments
    runtime: Runtime
    steps_done: int

    if not TYPE_CHECKING:  # which finds what is not there itself

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property that itself asked for something missing: its own error is the one to show
                return object.__getattribute__(self, name)
            hint = INSTEAD.get(name)
            raise AttributeError(f"PPOTrainer has no {name}" + (f": {hint}" if hint else ""), name=name, obj=self)

    @property
    def kl_ctl(self) -> KLController:
        return KLController(self)

    @property
    def current_step(self) -> int:
        """Steps done. (trl counted calls of `log_stats`.)"""
        return self.steps_done

    @property
    def running(self) -> RunningMoments:
        """Moments of the scores so far, as numbers."""
        return self.moments

    @property
    def is_peft_model(self) -> bool:
        return is_lora(self.model.pretrained_model)

    @property
    def is_distributed(self) -> bool:
        return self.runtime.world_size > 1

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None) -> torch.utils.data.DataLoader[Any]:
        """Whole batches of `config.batch_size / config.samples_per_prompt` rows in the seed's order, others in each process."""
        rows, of = self.config.prompts_per_batch, "batch_size" if self.config.samples_per_prompt == 1 else "batch_size / samples_per_prompt"
        if len(dataset) < rows * self.runtime.world_size:
            together = f" in each of {self.runtime.world_size} processes" if self.is_distributed else ""
            raise ValueError(f"dataset: {len(dataset)} rows make no batch of {of} {rows}{together}")
        if self.config.remove_unused_columns and hasattr(dataset, "remove_columns"):
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in KEPT_COLUMNS])
        generator = torch.Generator().manual_seed(self.config.seed)
        if self.is_distributed:
            batches = _OwnRows(dataset, rows, self.runtime, generator)
            return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=data_collator, generator=generator)
        return torch.utils.data.DataLoader(
            dataset, batch_size=rows, collate_fn=data_collator, shuffle=True, drop_last=True, generator=generator
        )


class _OwnRows(torch.utils.data.Sampler[list[int]]):
    """This process's rows of each batch that all processes make together."""

    def __init__(self, dataset: Any, rows: int, runtime: Runtime, generator: torch.Generator) -> None:
        self.rows, self.runtime = rows, runtime
        order = torch.utils.data.RandomSampler(dataset, generator=generator)
        self.batches = torch.utils.data.BatchSampler(order, rows * runtime.world_size, drop_last=True)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.runtime.rank * self.rows : (self.runtime.rank + 1) * self.rows]

    def __len__(self) -> int:
        return len(self.batches)
