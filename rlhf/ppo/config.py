"""Settings of `PPOTrainer` under their classic names, with the classic defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from common.errors import UserError
from rlhf.ppo.classic_names import elsewhere_lines
from rlhf.ppo.kl import KLPenalty
from rlhf.setting_rules import AdvantageEstimator, check_settings

if TYPE_CHECKING:
    from rlhf.config import PPOParams


@dataclass(frozen=True)
class PPOConfig:
    """What the trainer itself needs; `rlhf.config.PPOParams`, the section of a config file, maps into it."""

    learning_rate: float = 1.41e-5
    """Of the Adam that the trainer makes where none is passed."""
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    batch_size: int = 128
    """Answers per step and process."""
    mini_batch_size: int = 128
    """Answers per forward in the update."""
    gradient_accumulation_steps: int = 1
    """Minibatches per optimizer step."""
    ppo_epochs: int = 4
    """Passes over a batch."""
    max_grad_norm: float | None = None
    init_kl_coef: float = 0.2
    adap_kl_ctrl: bool = True
    target: float = 6.0
    """KL per answer (nats) that the adaptive controller aims at."""
    horizon: float = 10000.0
    """Answers over which it adapts."""
    kl_penalty: KLPenalty = "kl"
    advantage_estimator: AdvantageEstimator = "gae"
    """See `rlhf.ppo.estimators`. `gamma`, `lam`, `cliprange_value` and `vf_coef` belong to gae."""
    samples_per_prompt: int = 1
    """Answers to each prompt, side by side in a batch."""
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    dual_clip: float | None = None
    whiten_rewards: bool = False
    classic_quirks: bool = True
    """Two faults of trl 0.11.4, kept so that its numbers come out: `whiten_rewards` lets padding leak into shorter answers, and
    `max_grad_norm` clips the trainer's first optimizer step only. False: padding is masked, every step is clipped."""
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    ratio_threshold: float = 10.0
    early_stopping: bool = False
    target_kl: float = 1.0
    critic_warmup_steps: int = 0
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
    """Recompute activations in backward."""
    seed: int = 0
    """Of the order of minibatches and of sampling."""
    steps: int | None = None
    """PPO steps (batches) of `PPOTrainer.train`; None: passes over the prompts decide."""
    remove_unused_columns: bool = True
    """Of a `datasets.Dataset` the dataloader keeps `input_ids`, `attention_mask`, `label`, `query` and `response` alone."""
    log_with: Literal["wandb", "tensorboard"] | None = None
    """Where `log_stats` and `train` log, beside files; None: `log_stats` does nothing unless `project_kwargs` names a folder."""
    tracker_project_name: str | None = None
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `wandb.init`, flat or under `wandb`."""
    project_kwargs: dict[str, str] = field(default_factory=dict)
    """`logging_dir` (or `project_dir`): folder for the runs of `log_stats`; default `runs`."""
    exp_name: str = "ppo"
    """Such a run is `desc-EXP_NAME,index-N` there."""
    task_name: str | None = None
    model_name: str | None = None
    query_dataset: str | None = None
    reward_model: str | None = None
    """These four are for the script that reads them and for the tracker's record."""

    def __new__(cls, *values: Any, **settings: Any) -> Self:
        """Raises UserError for settings of trl that stand elsewhere here, saying where."""
        if lines := elsewhere_lines(list(settings)):
            raise UserError(*lines)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if unknown := sorted(self.project_kwargs.keys() - {"logging_dir", "project_dir"}):
            raise ValueError(f"project_kwargs: got {', '.join(unknown)}, expected logging_dir or project_dir")
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ValueError(f"log_with: got {self.log_with}, expected wandb, tensorboard or None")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision: got {self.mixed_precision}, expected no or bf16")
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.advantage_estimator not in get_args(AdvantageEstimator):
            raise ValueError(f"advantage_estimator: got {self.advantage_estimator}, expected gae, rloo or grpo")
        check_settings(self, self.mini_batch_size)
        if self.kl_penalty not in ("kl", "abs", "mse", "k3", "full"):
            raise ValueError(f"kl_penalty: got {self.kl_penalty}, expected kl, abs, mse, k3 or full")

    @property
    def backward_batch_size(self) -> int:
        """Answers per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_batch(self) -> int:
        """Per step and process."""
        return self.batch_size // self.samples_per_prompt

    @classmethod
    def from_params(cls, params: PPOParams, seed: int) -> PPOConfig:
        """The settings of a config file; there, the classic trainer's faults are mended."""
        shared = {own.name: getattr(params, own.name) for own in fields(cls) if own.name in type(params).model_fields}
        return cls(**{**shared, "mini_batch_size": params.minibatch, "seed": seed, "classic_quirks": False})
