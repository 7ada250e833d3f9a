"""Settings of PPO. Keys keep their classic names (`cliprange`, `lam`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from common.schema import (
    FiniteFloat,
    Fraction,
    FreezeSettings,
    FunctionName,
    GenerateParams,
    KeyedProblems,
    LoraSettings,
    ModelName,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    RowSettings,
    RunSettings,
    ScheduleName,
    ScheduleSettings,
    Section,
    Seed,
    StagePath,
    WandbSettings,
    idle_optimizer_settings,
)
from common.schema_types import Words
from common.tracking import init_argument_problems
from rlhf.setting_rules import WITHOUT_VALUES, AdvantageEstimator, Combine, Normalise, check_settings


class PPOData(RowSettings):
    data_file_path: StagePath = Field(description="Data file (or folder) with questions; answers in it are not used.")
    max_prompt_length: PositiveInt | None = Field(None, description="Prompt tokens at most; null: positions minus `max_new_tokens`.")
    truncate_prompt: bool = Field(True, description="Cut longer prompts; false: an error.")
    padding: bool | Literal["longest", "max_length"] = Field(
        True, description="Pad to the longest prompt of a batch, or to `max_prompt_length`."
    )
    prompt_format: Literal["qa", "chat"] | None = Field(None, description="Null: what the policy's manifest says, else `qa`.")
    cache_dir: StagePath | None = Field(
        None,
        description="Folder of the token ids of JSON Lines above 64 MiB, which stay on disk; null: `token_cache` beside the runs. It may "
        "be deleted while no run uses it.",
    )
    unique_prompts: bool = Field(True, description="Use a question once per pass, however many rows hold it.")


class PPOGeneration(GenerateParams):
    do_sample: bool = Field(True, description="Sample; PPO needs it.")


class PPOParams(Section):
    """The classic trainer's settings."""

    model_name: ModelName = Field(description="Policy (and reference) to start from: an SFT run, or a hub name.")
    model_pretrain: ModelName | None = Field(
        None,
        description="Weights loaded over `model_name`: a model directory of its architecture, which brings its own tokenizer and prompt "
        "format, or bare weights (a file, or a folder of them); null: those of `model_name`.",
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Type the weights are loaded in. Weights that train are float32: the shorter types need `lora`, whose adapters are.",
    )
    seed: Seed | None = Field(None, description="Seed; default: the top-level `seed`.")
    steps: PositiveInt | None = Field(None, description="PPO steps (batches) at most; null: as many as `global_epochs` gives.")
    batch_size: PositiveInt = Field(64, description="Answers per step and process.")
    mini_batch_size: PositiveInt | None = Field(None, description="Answers per forward in the update; null: `batch_size`.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Minibatches per optimizer step.")
    ppo_epochs: PositiveInt = Field(4, description="Passes over a batch.")
    optimizer: OptimizerName = Field(
        "AdamW", description="`Adam` couples its weight decay with the gradient; `Adafactor` is transformers', at the rate given here."
    )
    learning_rate: PositiveFloat = Field(1.41e-5, description="Peak learning rate.")
    lr_schedule: ScheduleName = Field("constant", description="Learning rate over the PPO steps, by transformers' names.")
    lr_scheduler_kwargs: ScheduleSettings = Field(default_factory=ScheduleSettings, description="What single schedules read.")
    warmup_steps_per_cent: Fraction = Field(0.0, description="Share of all PPO steps (0-1) that warms up linearly.")
    adam_eps: PositiveFloat = Field(1e-8, description="Epsilon of AdamW and Adam (the 2019 original: 1e-5).")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Momentum of SGD.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay on matrices; decoupled but for Adam, SGD.")
    max_grad_norm: PositiveFloat | None = Field(None, description="Clip the gradient's norm to this; null: never.")
    init_kl_coef: NonNegativeFloat = Field(0.2, description="KL coefficient at the start.")
    adap_kl_ctrl: bool = Field(True, description="Adapt the coefficient to `target`; false: fixed.")
    target: PositiveFloat = Field(6.0, description="KL per answer (nats) that the adaptive controller aims at.")
    horizon: PositiveFloat = Field(10000.0, description="Answers over which the controller adapts.")
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = Field(
        "kl", description="KL estimator per token (`grpo`: of what is logged and controlled; its loss has `k3`)."
    )
    advantage_estimator: AdvantageEstimator = Field(
        "gae",
        description="`gae`: value head or critic. `rloo`, `grpo`: several answers to a prompt are compared, no value is trained.",
    )
    samples_per_prompt: PositiveInt = Field(
        1, description="Answers to each prompt: a step takes `batch_size / samples_per_prompt` prompts. `rloo` and `grpo` need 2 or more."
    )
    gamma: Fraction = Field(1.0, description="Discount.")
    lam: Fraction = Field(0.95, description="GAE's lambda.")
    cliprange: PositiveFloat = Field(0.2, description="Clip range of the policy's ratio.")
    cliprange_value: PositiveFloat = Field(0.2, description="Clip range of the value.")
    vf_coef: NonNegativeFloat = Field(0.1, description="Weight of the value loss.")
    entropy_coef: NonNegativeFloat = Field(0.0, description="Weight of the entropy bonus.")
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(None, description="Dual clip constant for negative advantages; null: off.")
    whiten_rewards: bool = Field(False, description="Whiten rewards (keeping their mean) before advantages.")
    use_score_scaling: bool = Field(False, description="Divide scores by their running standard deviation.")
    use_score_norm: bool = Field(False, description="With scaling: subtract the running mean too.")
    score_clip: PositiveFloat | None = Field(None, description="Clip scores to +- this after scaling; null: never.")
    missing_eos_penalty: NonNegativeFloat | None = Field(None, description="Subtracted from the score of an answer without EOS.")
    missing_eos_score: FiniteFloat | None = Field(None, description="Replaces the score of an answer without EOS.")
    length_penalty: NonNegativeFloat = Field(0.0, description="Subtracted from the score per answer token.")
    ratio_threshold: PositiveFloat = Field(10.0, description="Minibatches whose mean ratio exceeds this are skipped and counted.")
    early_stopping: bool = Field(False, description="Stop a batch's updates when the policy moved too far from the sampling one.")
    target_kl: PositiveFloat = Field(1.0, description="Early stop at mean(old_logp - logp) > 1.5 * target_kl.")
    critic: Literal["head", "model"] = Field(
        "head", description="`head` on the policy's trunk; `model`: its own, started from the reward model."
    )
    critic_warmup_steps: NonNegativeInt = Field(0, description="First steps that train the value only.")
    log_with: Literal["wandb", "tensorboard"] | None = Field(None, description="Tracker beside the CSV; null: none.")
    tracker_project_name: str | None = Field(None, description="wandb project.")
    tracker_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of `wandb.init`, flat or under `wandb`.")
    use_cache: bool = Field(True, description="Keep keys and values while sampling.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="`bf16`: matrix products in bfloat16 over float32 weights, for speed; log-probabilities move by about 1e-2 nats."
    )
    padding_free: bool = Field(
        True,
        description="Update and passes over answers without padding, and over a prompt once for its answers; on a CPU, for models that "
        "can. False: padded rows.",
    )
    cache_frozen_layers: bool = Field(
        True,
        description="Run frozen layers below the lowest trained one once per batch, not in every epoch; costs memory for their states.",
    )
    static_decoding: bool = Field(
        True,
        description="Launch a decoding step as one CUDA graph, on a GPU and for causal models that can; costs memory for a second cache. "
        "Needs `use_cache`.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward.")
    process_timeout_s: PositiveFloat = Field(
        600.0, description="Seconds that processes which train together wait for one another, a save included, before all of them end."
    )
    lora: LoraSettings | None = Field(None, description="LoRA adapters; excludes `freeze_config`.")

    @field_validator("tracker_kwargs")
    @classmethod
    def _free_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if problems := init_argument_problems(arguments):
            raise KeyedProblems(problems)
        return arguments

    @property
    def minibatch(self) -> int:
        return self.mini_batch_size or self.batch_size

    @property
    def prompts_per_batch(self) -> int:
        """Per step and process."""
        return self.batch_size // self.samples_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> PPOParams:
        check_settings(self, self.minibatch)
        if problems := idle_optimizer_settings(self, self.optimizer, self.lr_schedule, "lr_schedule"):
            raise KeyedProblems(problems)
        if self.model_dtype != "float32" and self.lora is None:
            raise ValueError(
                f"model_dtype: got {self.model_dtype}, in which small updates of the weights are lost to rounding; use float32, or "
                f"{self.model_dtype} with lora, whose adapters stay float32"
            )
        if self.critic == "model" and self.advantage_estimator in WITHOUT_VALUES:
            raise ValueError(f"critic: model: advantage_estimator {self.advantage_estimator} needs no critic; leave it at head")
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError("missing_eos_penalty and missing_eos_score exclude each other")
        return self


HubName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"), Words("a repository's name such as user/model")
]

_PART_SETTINGS: dict[str, tuple[str, ...]] = {
    "model": ("model_name", "batch_size", "normalise", "combine", "std_coef"),
    "function": ("path", "timeout_s"),
    "length": ("min_words", "max_words"),
    "repetition": ("ngram",),
    "regex": ("pattern",),
    "must_end": ("endings",),
    "sum": ("members",),
    "ensemble": ("members", "combine", "std_coef"),
}


class RewardComponent(Section):
    """One part of the reward; a tree of these is what PPO maximises."""

    type: Literal["model", "function", "length", "repetition", "regex", "must_end", "sum", "ensemble"] = Field(
        description="What kind of part this is."
    )
    name: str | None = Field(None, description="Name in the metrics (`reward/NAME`); default: the type, numbered when repeated.")
    weight: FiniteFloat = Field(1.0, description="Factor inside a `sum`.")
    model_name: ModelName | None = Field(None, description="model: reward model directory.")
    batch_size: PositiveInt | None = Field(None, description="model: answers scored at once; default: `reward_config.batch_size`.")
    normalise: Normalise = Field(
        "manifest",
        description="model: subtract mean and divide by scale of the training set, of the reference's first answers, or neither.",
    )
    path: FunctionName | None = Field(None, description="function: `module:function` or `file.py:function`.")
    timeout_s: PositiveFloat | None = Field(None, description="function: seconds a call may take.")
    min_words: NonNegativeInt | None = Field(None, description="length: fewer words cost 1 each.")
    max_words: PositiveInt | None = Field(None, description="length: more words cost 1 each.")
    ngram: PositiveInt = Field(3, description="repetition: n of the n-grams; scores minus the share that repeats.")
    pattern: str | None = Field(None, description="regex: 1 where it is found, else 0.")
    endings: list[str] = Field(
        default_factory=lambda: [".", "!", "?"], description="must_end: 1 where the answer ends in one of these, else 0."
    )
    members: list[RewardComponent] = Field(default_factory=list, description="sum, ensemble: its parts.")
    combine: Combine = Field(
        "mean", description="ensemble: how members are combined; model: how the readouts of a model are that was trained with several."
    )
    std_coef: NonNegativeFloat = Field(1.0, description="ensemble, model: factor of the spread in `mean_minus_std`.")

    @model_validator(mode="after")
    def _complete(self) -> RewardComponent:
        needed = {"model": "model_name", "function": "path", "regex": "pattern", "sum": "members", "ensemble": "members"}.get(self.type)
        if needed and not getattr(self, needed):
            raise ValueError(f"a reward part of type {self.type} needs {needed}")
        if self.type == "length" and self.min_words is None and self.max_words is None:
            raise ValueError("a reward part of type length needs min_words or max_words")
        idle = self.model_fields_set - {"type", "name", "weight", *_PART_SETTINGS[self.type]}
        if idle:
            raise ValueError(f"a reward part of type {self.type} does not read {', '.join(sorted(idle))}")
        weighed = [member.name or member.type for member in self.members if "weight" in member.model_fields_set]
        if self.type == "ensemble" and weighed:
            raise ValueError(f"weight of {', '.join(weighed)} has no effect in an ensemble; members of a sum have weights")
        return self


class RewardSettings(Section):
    reward_model_name: ModelName | None = Field(None, description="Reward model directory (any tokenizer).")
    rm_pretrain: ModelName | None = Field(
        None,
        description="Weights loaded over `reward_model_name`, which then may lack a head: a reward model directory of its architecture, or "
        "bare weights with a head `score.weight` or `value_head.weight`; null: those of `reward_model_name`.",
    )
    batch_size: PositiveInt = Field(32, description="Answers scored at once.")
    model_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type the reward models' weights are loaded in; `bfloat16` is faster and moves scores by about 1 %."
    )
    offload: bool = Field(False, description="Keep reward models in the CPU's memory, and have them on the GPU only while they score.")
    pipeline: RewardComponent | None = Field(None, description="Reward built of parts, instead of `reward_model_name` alone.")

    @model_validator(mode="after")
    def _one_source(self) -> RewardSettings:
        if (self.reward_model_name is None) == (self.pipeline is None):
            both = "to use the pipeline, remove reward_model_name (or add reward_config.reward_model_name=null)"
            raise ValueError(f"exactly one of reward_model_name and pipeline is needed; {both if self.pipeline else 'neither is there'}")
        if self.rm_pretrain is not None and self.pipeline is not None:
            raise ValueError("rm_pretrain is loaded over reward_model_name, but pipeline is there instead; name the model in it")
        if self.pipeline is not None and "weight" in self.pipeline.model_fields_set:
            raise ValueError("weight has no effect on the whole pipeline; members of a sum have weights")
        return self


class PPOEvaluation(Section):
    num_prompts: PositiveInt = Field(64, description="Held-out prompts of the fixed evaluation.")
    every_n_steps: PositiveInt = Field(10, description="PPO steps between two evaluations.")
    num_samples_logged: PositiveInt = Field(8, description="Rows of the sample table.")


class SaveSettings(Section):
    checkpoint_dir: StagePath = Field(
        "models", description="Folder for runs; each run makes `desc-DESC,index-N` in it.", validate_default=True
    )
    save_interval: PositiveInt = Field(100, description="PPO steps between two checkpoints.")
    keep_last: PositiveInt = Field(2, description="How many of the newest checkpoints stay on disk; a resumed run falls back by one.")
    keep_best: PositiveInt = Field(1, description="How many of the best checkpoints by `eval/score` stay on disk.")


class PPORunConfig(RunSettings):
    """`train_ppo.py`."""

    data_config: PPOData = Field(description="Prompts.")
    freeze_config: FreezeSettings = Field(default_factory=FreezeSettings, description="Which parameters stay as they are.")
    generation_config: PPOGeneration = Field(default_factory=PPOGeneration, description="How answers are sampled.")
    global_epochs: PositiveInt = Field(1, description="Passes over the prompts, ended early by `ppo_config.steps`.")
    hf_hub_name: HubName | None = Field(
        None, description="Hub repository to push to after the local save, a private one if new; null: none."
    )
    ppo_config: PPOParams = Field(description="The classic trainer's settings.")
    reward_config: RewardSettings = Field(description="What is maximised.")
    evaluation: PPOEvaluation = Field(default_factory=PPOEvaluation, description="Fixed evaluation prompts.")
    save_config: SaveSettings = Field(default_factory=SaveSettings, description="Checkpoints.")
    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases; used when `log_with: wandb`.")

    @model_validator(mode="after")
    def _lora_excludes_freezing(self) -> PPORunConfig:
        if self.ppo_config.lora is not None and self.freeze_config.active:
            raise ValueError("ppo_config.lora and freeze_config both decide what trains; keep one of them")
        return self
