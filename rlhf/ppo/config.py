"""Settings of `PPOTrainer` under their classic names, with the classic defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from common.config_report import shown_value
from common.errors import UserError
from common.schema import Fraction, NonNegativeFloat, NonNegativeInt, OptimizerName, PositiveFloat, PositiveInt
from common.schema_types import type_words
from rlhf.ppo.classic_names import CONFIG_METHODS, ELSEWHERE, unknown_lines
from rlhf.ppo.kl import KLPenalty
from rlhf.setting_rules import AdvantageEstimator, check_settings

if TYPE_CHECKING:
    from rlhf.config import PPOParams


@dataclass(frozen=True)
class PPOConfig:
    """What the trainer itself needs; `rlhf.config.PPOParams`, the section of a config file, maps into it."""

    learning_rate: NonNegativeFloat = 1.41e-5
    """Of the optimizer that the trainer makes where none is passed."""
    optimizer: OptimizerName = "AdamW"
    adam_eps: PositiveFloat = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    weight_decay: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 128
    """Answers per step and process."""
    mini_batch_size: PositiveInt = 128
    """Answers per forward in the update."""
    gradient_accumulation_steps: PositiveInt = 1
    """Minibatches per optimizer step."""
    ppo_epochs: PositiveInt = 4
    """Passes over a batch."""
    max_grad_norm: PositiveFloat | None = None
    init_kl_coef: NonNegativeFloat = 0.2
    adap_kl_ctrl: bool = True
    target: PositiveFloat = 6.0
    """KL per answer (nats) that the adaptive controller aims at."""
    horizon: PositiveFloat = 10000.0
    """Answers over which it adapts."""
    kl_penalty: KLPenalty = "kl"
    advantage_estimator: AdvantageEstimator = "gae"
    """See `rlhf.ppo.estimators`. `gamma`, `lam`, `cliprange_value` and `vf_coef` belong to gae."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt, side by side in a batch."""
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: PositiveFloat = 0.2
    cliprange_value: PositiveFloat = 0.2
    vf_coef: NonNegativeFloat = 0.1
    entropy_coef: NonNegativeFloat = 0.0
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    whiten_rewards: bool = False
    classic_quirks: bool = True
    """Two faults of trl 0.11.4, kept so that its numbers come out: `whiten_rewards` lets padding leak into shorter answers, and
    `max_grad_norm` clips the trainer's first optimizer step only. False: padding is masked, every step is clipped."""
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: PositiveFloat | None = None
    ratio_threshold: PositiveFloat = 10.0
    early_stopping: bool = False
    target_kl: PositiveFloat = 1.0
    critic_warmup_steps: NonNegativeInt = 0
    """First steps that train the value alone."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: matrix products in bfloat16 over float32 weights; log-probabilities then differ by about 1e-2 nats from float32."""
    padding_free: bool = True
    """Read prompts and answers one behind the other instead of padding them, a prompt once for all its answers in a forward; on a CPU, for
    models that can (most causal ones)."""
    cache_frozen_layers: bool = True
    """Run the layers below the lowest trained one once per batch, not in every epoch; costs their states of the batch in memory."""
    static_decoding: bool = True
    """Launch a decoding step as one CUDA graph; on a GPU, for causal models that can (see `rlhf.ppo.static_decoding`)."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward, a critic's too."""
    on_nan: Literal["stop", "skip"] = "stop"
    """An update whose loss or gradient is not finite ends the training, or is left out and counted. Scores and log-probabilities that are
    not finite end it in any case."""
    seed: NonNegativeInt = 0
    """Of the order of minibatches and of sampling."""
    steps: PositiveInt | None = None
    """PPO steps (batches) of `PPOTrainer.train`; None: passes over the prompts decide."""
    remove_unused_columns: bool = True
    """Of a `datasets.Dataset` the dataloader keeps `input_ids`, `attention_mask`, `label`, `query` and `response` alone."""
    log_with: Literal["wandb", "tensorboard"] | None = None
    """Where `log_stats` and `train` log, beside files; None: `log_stats` does nothing unless `project_kwargs` names a folder."""
    tracker_project_name: str | None = None
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `wandb.init`, flat or under `wandb`."""
    project_kwargs: dict[str, str | Path] = field(default_factory=dict)
    """`logging_dir` (or `project_dir`): folder for the runs of `log_stats`; default `runs`."""
    exp_name: str = "ppo"
    """Such a run is `desc-EXP_NAME,index-N` there."""
    task_name: str | None = None
    model_name: str | None = None
    query_dataset: str | None = None
    reward_model: str | None = None
    """These four are for the script that reads them and for the tracker's record."""

    def __new__(cls, *values: Any, **settings: Any) -> Self:
        """Raises UserError for settings of trl that stand elsewhere here, saying where, and for names that are none."""
        if lines := unknown_lines(settings, [own.name for own in fields(cls)]):
            raise UserError(*lines)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raises UserError with a line for each value that is not of its kind, ValueError for settings that contradict each other."""
        problems: list[str] = []
        for name, (adapter, words) in _kinds().items():
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, adapter.validate_python(_plain_number(given)))
            except ValidationError:
                problems.append(f"{name}: got {_shown(given, name)}, expected {words}")
        if problems:
            raise UserError(*problems)
        if unknown := sorted(self.project_kwargs.keys() - {"logging_dir", "project_dir"}):
            raise ValueError(f"project_kwargs: got {', '.join(unknown)}, expected logging_dir or project_dir")
        check_settings(self, self.mini_batch_size)

    if not TYPE_CHECKING:  # which finds what is not there itself

        def __getattr__(self, name: str) -> Any:
            hint = CONFIG_METHODS.get(name) or ELSEWHERE.get(name)
            raise AttributeError(f"PPOConfig has no {name}" + (f": {hint}" if hint else ""), name=name, obj=self)

    @property
    def backward_batch_size(self) -> int:
        """Answers per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_batch(self) -> int:
        """Per step and process."""
        return self.batch_size // self.samples_per_prompt

    @classmethod
    def from_params(cls, params: PPOParams, seed: int, on_nan: Literal["stop", "skip"] = "stop") -> PPOConfig:
        """The settings of a config file; there, the classic trainer's faults are mended."""
        shared = {own.name: getattr(params, own.name) for own in fields(cls) if own.name in type(params).model_fields}
        return cls(**{**shared, "mini_batch_size": params.minibatch, "seed": seed, "on_nan": on_nan, "classic_quirks": False})


@cache
def _kinds() -> dict[str, tuple[TypeAdapter[Any], str]]:
    """What checks each setting's value, and what that expects in words. "8" is no number, 0.5 no whole one."""
    hints = get_type_hints(PPOConfig, include_extras=True)
    strict = ConfigDict(strict=True)
    return {own.name: (TypeAdapter(hints[own.name], config=strict), _in_python(type_words(hints[own.name]))) for own in fields(PPOConfig)}


def _shown(value: Any, name: str) -> str:
    return repr(value) if value is None or isinstance(value, bool | float) else shown_value(value, (name,))


def _in_python(words: str) -> str:
    """The words of YAML as Python has them."""
    return words.replace("null", "None").replace("true or false", "True or False")


def _plain_number(value: Any) -> Any:
    """Numbers of numpy are numbers."""
    if isinstance(value, bool | int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value
