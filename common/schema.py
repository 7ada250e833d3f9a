"""The config sections that stages share: frozen, typed, each field with its unit and meaning.

Nothing here imports torch: a config is read, checked and refused in well under a second.
The tables of settings in the README are generated from these descriptions (`python docs/tables.py`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from common.lightning_arguments import lightning_argument_problems
from common.schema_types import Words, dotted

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# What a `wandb.api` of the shipped examples holds; never a key.
API_PLACEHOLDERS = frozenset({"", "text", "null", "none", "your_api_key", "your-api-key", "YOUR_API_KEY"})


class KeyedProblems(ValueError):
    """Problems with single keys below a value: the key's path -> what is wrong with it."""

    def __init__(self, keyed: Mapping[tuple[Any, ...], str]) -> None:
        self.keyed = keyed
        super().__init__("; ".join(f"{dotted(path)}: {problem}" for path, problem in keyed.items()))


def resolve_monitor(monitor: str, choices: Iterable[str]) -> str:
    """The logged name that `monitor` means (`val_loss` is `val/loss`). Raises ValueError with the choices for an unknown one."""
    names = tuple(choices)
    for candidate in (monitor, monitor.replace("_", "/", 1)):
        if candidate in names:
            return candidate
    close = difflib.get_close_matches(monitor.replace("_", "/", 1), names, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"got {monitor!r}, expected one of: {', '.join(sorted(names))}{meant}")


class CommandLineValue(str):
    """A string given on the command line: relative paths in it count from the working directory, not the stage folder."""


def _absolute(value: str, info: ValidationInfo, name: str | None = None) -> Path:
    """`name` (default: the value itself) as a path: from the working directory on the command line, else from the stage folder."""
    base = Path.cwd() if isinstance(value, CommandLineValue) else Path((info.context or {}).get("base_dir", Path.cwd()))
    try:
        path = base / Path(value if name is None else name).expanduser()
    except RuntimeError:
        raise ValueError(f"got {str(value)!r}, which names the home folder of an unknown user") from None
    return Path(os.path.normpath(path.absolute()))


def _resolve_path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or value.startswith("hf:"):
        return value
    if not value.strip():
        raise ValueError("got an empty text, expected a path")
    return str(_absolute(value, info))


def _check_csv(path: str) -> str:
    if not path.lower().endswith(".csv"):
        raise ValueError(f"got {path}, expected a name that ends in .csv: a CSV file is what is written")
    return path


def _resolve_model(value: Any, info: ValidationInfo) -> Any:
    """A hub name or a URL, kept as it is, or a directory, made absolute: where it or its parent folder exists, or it can be no hub name.

    Links are followed here, once: `models/latest` may point to another run before the last of its files is read.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("got an empty text, expected a model directory or a hub name")
    path = _absolute(value, info)
    try:
        is_path = not (HUB_NAME.fullmatch(value) or "://" in value) or path.exists()
        # `models/latest` before the first run is a path whose end is missing, no name on the hub
        is_path = is_path or path.is_symlink() or ("/" in value and path.parent.is_dir())
        if path.is_dir():
            return os.path.realpath(path)
    except OSError:  # too long a name, say: no path
        is_path = False
    return str(path) if is_path else str(value)


def _resolve_function(value: Any, info: ValidationInfo) -> Any:
    """`file.py:function` with the file made absolute; `module:function` as it is."""
    if not isinstance(value, str) or (info.context is None and not isinstance(value, CommandLineValue)):
        return value
    place, _, function = value.rpartition(":")
    return f"{_absolute(value, info, place)}:{function}" if place.endswith(".py") else str(value)


def _whole_number(value: Any) -> Any:
    """2.0 is the whole number 2 (the classic examples write `top_k: 0.0`)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


StagePath = Annotated[str, BeforeValidator(_resolve_path), Words("a path")]
"""A file or folder; relative ones count from the stage folder (in a config) or the working directory (command line)."""
CSVPath = Annotated[StagePath, AfterValidator(_check_csv)]
"""A `StagePath` of a CSV file."""
ModelName = Annotated[str, BeforeValidator(_resolve_model), Words("a model directory or hub name")]
"""A model directory (relative like `StagePath`; one that exists without links) or a hub name."""
FunctionName = Annotated[str, BeforeValidator(_resolve_function), Words("module:function or file.py:function")]
"""A Python function; a relative file counts like `StagePath`."""

WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
PositiveInt = Annotated[int, Field(ge=1), BeforeValidator(_whole_number)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_whole_number)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole_number), Words("a whole number >= 0 (below 2^63)")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200),
    Words("letters, digits, dashes, underscores and inner dots, 200 at most"),
]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, `"yes"` is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class RowSettings(Section):
    """How the rows of a data file are read, in every stage."""

    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames columns: our name to the file's name, e.g. `{Question: title}`."
    )
    validation_file: StagePath | None = Field(None, description="File whose rows become the validation split.")
    validation_split_percentage: Annotated[float, Field(ge=0, lt=100)] = Field(
        5.0, description="Per cent of train questions held out when the data has no `val` split."
    )
    unusable_rows: Literal["error", "drop"] = Field(
        "error",
        description="A row of the right shape that cannot be used (an empty question or answer, a pair of equal answers, a dialogue that "
        "does not fit, no answer token left): refuse it, or drop and count it.",
    )


class DataSettings(RowSettings):
    """What every training stage that reads rows has in common (SFT and reward models)."""

    data_dir: StagePath = Field(
        description="Data file (JSON with splits or JSON Lines, gzip or plain), a folder of files named by split, or "
        "`hf:NAME[/FOLDER][:CONFIG]`."
    )
    cache_dir: StagePath | None = Field(
        None,
        description="Folder of the token ids of JSON Lines above 64 MiB, which stay on disk; null: `token_cache` beside the runs. It may "
        "be deleted while no run uses it.",
    )
    batch_size: PositiveInt = Field(8, description="Rows per process and optimizer micro-batch.")
    val_batch_size: PositiveInt | None = Field(None, description="Rows per validation batch; default: `batch_size`.")
    max_length: PositiveInt = Field(512, description="Tokens of prompt + answer + EOS at most.")
    truncate_prompt: bool = Field(True, description="Cut the prompt (not the answer) where both do not fit; false: such a row is an error.")
    on_tpu: bool = Field(False, description="Pad every batch to `max_length` (static shapes).")
    padding_free: bool = Field(
        True,
        description="On a CPU, read rows one behind the other instead of padding them, for models that can (most causal ones), and rows "
        "of like length together for others; equal to float32 rounding.",
    )
    num_workers: NonNegativeInt = Field(0, description="Processes that collate batches beside the training one.")
    prompt_format: Literal["qa", "chat"] = Field(
        "qa", description="`qa`: the plain question/answer text; `chat`: the tokenizer's own template."
    )


class FreezeSettings(Section):
    """Which parameters stay as they are. A fresh score or value head always trains."""

    do_freeze: bool | None = Field(None, description="Master switch; missing means true when any `freeze_*` is true.")
    freeze_emb: bool = Field(False, description="Freeze embeddings (a tied output layer counts as embeddings).")
    freeze_ln: bool = Field(False, description="Freeze layer norms.")
    freeze_attn: bool = Field(False, description="Freeze attention.")
    freeze_ff: bool = Field(False, description="Freeze feed-forward blocks.")
    freeze_other: bool = Field(False, description="Freeze everything that belongs to no other group.")
    layers_not_to_freeze: list[WholeNumber] = Field(
        default_factory=list, description="Layers that train whatever the flags say; negative counts from the end."
    )

    @property
    def active(self) -> bool:
        flags = (self.freeze_emb, self.freeze_ln, self.freeze_attn, self.freeze_ff, self.freeze_other)
        return any(flags) if self.do_freeze is None else self.do_freeze

    @property
    def switch(self) -> str:
        """The setting that makes `active` true, as it stands in the config."""
        flags = ("freeze_emb", "freeze_ln", "freeze_attn", "freeze_ff", "freeze_other")
        return next((flag for flag in flags if self.do_freeze is None and getattr(self, flag)), "do_freeze")


class LoraSettings(Section):
    """LoRA adapters (peft) instead of full or frozen weights."""

    r: PositiveInt = Field(8, description="Rank of the update.")
    lora_alpha: PositiveFloat = Field(16.0, description="Scale of the update is lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the adapter.")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="Module names that get an adapter.")


OptimizerName = Literal["AdamW", "Adam", "Adafactor", "SGD"]
ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
_READ_BY_OPTIMIZER: dict[str, tuple[OptimizerName, ...]] = {
    "adam_betas": ("AdamW", "Adam"),
    "adam_eps": ("AdamW", "Adam"),
    "momentum": ("SGD",),
}
_READ_BY_SCHEDULE: dict[str, ScheduleName] = {
    "num_cycles": "cosine_with_restarts",
    "min_lr_rate": "cosine_with_min_lr",
    "power": "polynomial",
    "lr_end": "polynomial",
    "timescale": "inverse_sqrt",
    "num_decay_steps": "warmup_stable_decay",
}


class ScheduleSettings(Section):
    """What single learning-rate schedules read, under transformers' names."""

    num_cycles: PositiveInt | None = Field(None, description="cosine_with_restarts: cycles; null: 1.")
    min_lr_rate: Fraction | None = Field(None, description="cosine_with_min_lr: its end as a share of the peak; null: 0.1.")
    power: PositiveFloat | None = Field(None, description="polynomial: its power; null: 1.")
    lr_end: NonNegativeFloat | None = Field(None, description="polynomial: learning rate at the end; null: 1e-7.")
    timescale: PositiveInt | None = Field(None, description="inverse_sqrt: its steps; null: those of the warm-up, or 10,000 without one.")
    num_decay_steps: PositiveInt | None = Field(None, description="warmup_stable_decay: last steps, that fall to 0; null: a tenth of all.")


def idle_optimizer_settings(params: BaseModel, optimizer: str, schedule: str, schedule_key: str) -> dict[tuple[str, ...], str]:
    """Settings of an optimizer or schedule other than the chosen ones, by key: they would have no effect."""
    problems: dict[tuple[str, ...], str] = {}
    for name, readers in _READ_BY_OPTIMIZER.items():
        field = type(params).model_fields.get(name)
        if field is not None and optimizer not in readers and (value := getattr(params, name)) != field.default:
            belongs = f"got {value}, which belongs to {' and '.join(readers)}"
            problems[(name,)] = f"{belongs}, but optimizer is {optimizer}; remove one of them"
    for name, reader in _READ_BY_SCHEDULE.items():
        if schedule != reader and (value := getattr(params.lr_scheduler_kwargs, name)) is not None:  # type: ignore[attr-defined]
            problems["lr_scheduler_kwargs", name] = f"got {value:g}, which belongs to {reader}, but {schedule_key} is {schedule}; remove it"
    return problems


class ModelParams(FreezeSettings):
    """Optimizer, freezing and memory settings of SFT and reward models."""

    optimizer: OptimizerName = Field(
        "AdamW", description="`Adam` couples its weight decay with the gradient; `Adafactor` is transformers', at the rate given here."
    )
    learning_rate: PositiveFloat = Field(2e-5, description="Peak learning rate.")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), strict=False, description="Betas of AdamW and Adam."
    )
    adam_eps: PositiveFloat = Field(1e-8, description="Epsilon of AdamW and Adam.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Momentum of SGD.")
    weight_decay: NonNegativeFloat = Field(
        0.001, description="Weight decay on matrices, not on norms and biases; decoupled but for Adam, SGD."
    )
    warmup_steps_per_cent: Fraction = Field(0.01, description="Share of all optimizer steps (0-1) that warms up linearly.")
    lr_scheduler: ScheduleName = Field(
        "constant", description="What follows the warm-up, by transformers' names; `constant` warms up as well, as all of them do."
    )
    lr_scheduler_kwargs: ScheduleSettings = Field(default_factory=ScheduleSettings, description="What single schedules read.")
    use_cache: bool = Field(False, description="Keep keys and values in generation during training-time evaluation.")
    do_compute_metrics: bool = Field(False, description="Metrics that cost extra (SFT: BLEU/ROUGE of generated answers) in validation.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, about a third more time.")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Sets every dropout of the model; null keeps the model's own."
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Type the weights are loaded in. Weights that train are float32: the shorter types need `lora`, whose adapters are.",
    )
    lora: LoraSettings | None = Field(None, description="LoRA adapters; excludes `freeze_*`.")
    cache_states: Literal["float32", "bfloat16", "never"] | None = Field(
        None,
        description="Type in which states that training does not change are kept on disk: those that enter the lowest layer that trains, "
        "where only upper ones do (null: not kept); those that the readout reads of a frozen backbone (null: float32). `never`: none.",
    )
    cache_dir: StagePath | None = Field(
        None,
        description="Folder of such caches, which runs may share; null: `state_cache` beside the runs. It may be deleted at any time.",
    )

    @property
    def kept_states(self) -> Literal["float32", "bfloat16"] | None:
        """Type of the states in the cache; None: there is none."""
        return None if self.cache_states in (None, "never") else self.cache_states  # type: ignore[return-value]

    def frozen_part_problems(self) -> dict[tuple[str, ...], str]:
        """What is wrong with the settings of the cache, and of what it is of, by key."""
        if self.kept_states is None:
            return {("cache_dir",): f"got {self.cache_dir}, which needs cache_states"} if self.cache_dir else {}
        if self.lora is not None:
            every = self.lora.target_modules == "all-linear"
            return {("cache_states",): f"got {self.cache_states}, but lora trains adapters in every layer"} if every else {}
        names = [f"freeze_{group}" for group in ("emb", "ln", "attn", "ff")]
        trains = [f"{name}: true" for name in names if not (self.active and getattr(self, name))]
        if not trains:
            return {}
        return {("cache_states",): f"got {self.cache_states}, but the lowest layers train; it needs {', '.join(trains)}"}

    @model_validator(mode="after")
    def _frozen_part_is_frozen(self) -> Self:
        if problems := self.frozen_part_problems():
            raise KeyedProblems(problems)
        return self

    @model_validator(mode="after")
    def _optimizer_reads_its_settings(self) -> Self:
        if problems := idle_optimizer_settings(self, self.optimizer, self.lr_scheduler, "lr_scheduler"):
            raise KeyedProblems(problems)
        return self

    @model_validator(mode="after")
    def _trained_weights_are_float32(self) -> ModelParams:
        if self.model_dtype != "float32" and self.lora is None:
            raise ValueError(
                f"model_dtype: got {self.model_dtype}, in which small updates of the weights are lost to rounding; use float32 "
                f"(trainer.params.precision: bf16-mixed computes in bfloat16), or {self.model_dtype} with lora, whose adapters stay float32"
            )
        return self

    @model_validator(mode="after")
    def _lora_excludes_freezing(self) -> ModelParams:
        if self.lora is not None and self.active:
            raise ValueError("lora and freeze_* both decide what trains; keep one of them")
        return self


class ModelInit(Section):
    """A model built from its configuration, for runs with nothing but this repository."""

    model_type: str = Field("gpt_neo", description="transformers' model type: gpt_neo, gpt2, llama, qwen2, opt, bert, t5 ...")
    config: dict[str, Any] = Field(default_factory=dict, description="Arguments of that type's configuration class.")
    vocab_size: PositiveInt = Field(512, description="Entries of the byte-level BPE tokenizer trained on the training split.")


class CheckpointSettings(Section):
    dirpath: StagePath = Field("models", description="Folder for runs; each run makes `desc-DESC,index-N` in it.", validate_default=True)
    every_n_train_steps: PositiveInt | None = Field(None, description="Optimizer steps between saves; null: at each validation.")
    monitor: str = Field("val/loss", description="Logged metric that chooses the best checkpoint (`val_loss` is read as `val/loss`).")
    mode: Literal["min", "max"] = Field("min", description="Whether less or more of it is better.")
    keep_last: PositiveInt = Field(2, description="How many of the newest checkpoints stay on disk; a resumed run falls back by one.")
    keep_best: PositiveInt = Field(1, description="How many of the best checkpoints by `monitor` stay on disk.")

    @property
    def kept(self) -> int:
        """Checkpoints that stay on disk, at most."""
        return self.keep_last + self.keep_best


class TrainerSettings(Section):
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings, description="Where and when checkpoints are written.")
    ckpt_path: ModelName | None = Field(None, description="Checkpoint directory whose weights the run starts from.")
    process_timeout_s: PositiveFloat = Field(
        600.0, description="Seconds that processes which train together wait for one another, a save included, before all of them end."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Any argument of `pl.Trainer`.")

    @field_validator("params")
    @classmethod
    def _known_arguments(cls, params: dict[str, Any]) -> dict[str, Any]:
        if problems := lightning_argument_problems(params):
            raise KeyedProblems({(name,): problem for name, problem in problems.items()})
        return params


class WandbArgs(Section):
    group: str | None = Field(None, description="wandb group.")
    job_type: str | None = Field(None, description="wandb job type.")
    name: str | None = Field(None, description="Run name shown in wandb.")
    project_name: str | None = Field(None, description="The same as `wandb.project_name`.")


class WandbSettings(Section):
    api: str | None = Field(
        None, description="Placeholder kept for old files; keys belong into the environment (WANDB_API_KEY).", repr=False
    )
    args: WandbArgs = Field(default_factory=WandbArgs, description="Arguments of `wandb.init`.")
    project_name: str | None = Field(None, description="wandb project.")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="`auto`: online with a key in the environment, else offline. `disabled`: no wandb at all."
    )
    log_model: bool = Field(False, description="Upload the final checkpoint as an artifact.")

    @property
    def project(self) -> str:
        return self.project_name or self.args.project_name or "rlhf-qa"


class WorkerResources(Section):
    """What each Ray worker gets; Ray starts a worker where that much is free."""

    CPU: PositiveInt = Field(1, description="Cores of a worker, and threads that it computes with.")
    GPU: Annotated[int, Field(ge=0, le=1), BeforeValidator(_whole_number)] = Field(
        0, description="GPUs of a worker: 1, or 0 to train on CPUs."
    )


class LaunchSettings(Section):
    """Where the processes of a training run."""

    engine: Literal["local", "ray"] = Field(
        "local", description="`local`: this process and those that it or torchrun starts; `ray`: workers of a Ray cluster."
    )
    num_training_workers: PositiveInt | None = Field(
        None,
        description="Processes that train together, on all machines; `ray` starts as many, `local` refuses another number. Null: as many "
        "as were started (`ray` needs a number).",
    )
    resources_per_worker: WorkerResources = Field(default_factory=WorkerResources, description="ray: what each worker gets.")
    address: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="ray: `HOST:PORT` of the cluster to join, or `auto`; null: a cluster on this machine, for this run alone."
    )
    storage_path: StagePath | None = Field(
        None, description="Root for runs (`ROOT/STAGE/desc-…`) that every worker reaches under this path; null: the runs folder."
    )
    max_failures: NonNegativeInt = Field(
        0, description="ray: how often the workers start again from the last checkpoint after one of them was lost."
    )

    @model_validator(mode="after")
    def _ray_knows_its_workers(self) -> Self:
        if self.engine == "ray" and self.num_training_workers is None:
            raise KeyedProblems({("num_training_workers",): "got null, and engine is ray; expected how many workers train"})
        return self


class RunSettings(Section):
    """What names a run and makes it repeatable; every stage's config starts with these keys."""

    seed: Seed = Field(42, description="Seed of sample order, dropout, sampling and fresh weights.")
    desc: RunName = Field("run", description="Short name of the run, part of its directory.")
    index: NonNegativeInt | Literal["auto"] = Field("auto", description="Number of the run; `auto` takes the next free one.")
    results_root: StagePath | None = Field(
        None, description="Root for runs (`ROOT/STAGE/desc-…`) instead of the checkpoint folder; also RESULTS_ROOT_DIR."
    )
    require_clean_git: bool = Field(False, description="Refuse to start while files of this repository are changed or untracked.")
    trust_remote_code: bool = Field(False, description="Allow model directories to run code of their own.")
    fused: bool = Field(
        True,
        description="Tanh-GELU and GPT-Neo's attention in one kernel each, equal to float32 rounding; false: as transformers has them.",
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite: end the run before the optimizer's step, or leave that step out and count it.",
    )
    tensorboard: bool = Field(False, description="Write TensorBoard event files beside the metrics.")
    launch: LaunchSettings = Field(default_factory=LaunchSettings, description="One process, several, or workers of a Ray cluster.")

    @property
    def runs_root(self) -> str | None:
        """Root for runs that the config names; None: the checkpoint folder holds them."""
        return self.launch.storage_path or self.results_root

    @model_validator(mode="after")
    def _one_root(self) -> Self:
        if self.launch.storage_path is not None and self.results_root is not None:
            raise ValueError(
                f"results_root is {self.results_root}, and launch.storage_path is {self.launch.storage_path}; remove one of them"
            )
        return self


class TrainingSettings(RunSettings):
    """What SFT and reward models have in common: the model to start from, Lightning's trainer, tracking."""

    model_name: ModelName | None = Field(None, description="Model directory or hub name to start from.")
    model_init: ModelInit | None = Field(None, description="Build the model from a configuration instead of `model_name`.")
    trainer: TrainerSettings = Field(default_factory=TrainerSettings, description="Checkpoints and Lightning's trainer.")
    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases.")

    @property
    def monitored(self) -> Mapping[str, str]:
        """Metrics that validation logs under these settings, with their definitions: what `monitor` may name."""
        raise NotImplementedError

    @property
    def more_to_monitor(self) -> str:
        """What a user may be told who asks for another one."""
        return ""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model_name is None) == (self.model_init is None):
            mend = "to start from model_name, remove model_init (or add model_init=null)" if self.model_name else "neither is there"
            raise ValueError(f"exactly one of model_name and model_init is needed; {mend}")
        return self

    @model_validator(mode="after")
    def _optimizer_fits_the_strategy(self) -> Self:
        strategy = str(self.trainer.params.get("strategy"))
        if getattr(getattr(self, "model_params", None), "optimizer", None) == "Adafactor" and strategy.startswith(("fsdp", "deepspeed")):
            whole = f"got Adafactor, which needs whole weights, but trainer.params.strategy is {strategy}; use AdamW or ddp"
            raise KeyedProblems({("model_params", "optimizer"): whole})
        return self

    @model_validator(mode="after")
    def _weights_are_spread_over_several(self) -> Self:
        strategy, launch = str(self.trainer.params.get("strategy")), self.launch
        if launch.engine == "ray" and launch.num_training_workers == 1 and strategy in ("fsdp", "deepspeed"):
            alone = f"got {strategy}, but launch.num_training_workers is 1; set that to 2 or more, or use auto"
            raise KeyedProblems({("trainer", "params", "strategy"): alone})
        return self

    @model_validator(mode="after")
    def _known_monitor(self) -> Self:
        monitor = self.trainer.checkpoint.monitor
        try:
            resolve_monitor(monitor, self.monitored)
        except ValueError as error:
            raise KeyedProblems({("trainer", "checkpoint", "monitor"): f"{error}{self.more_to_monitor}"}) from None
        return self


class GenerateParams(Section):
    """Options of generation; every other option of transformers' GenerationConfig is accepted as well."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, protected_namespaces=())

    do_sample: bool = Field(False, description="Sample instead of taking the likeliest token.")
    max_new_tokens: PositiveInt = Field(64, description="Answer tokens at most, EOS included.")
    min_length: Annotated[int, Field(ge=-1), BeforeValidator(_whole_number)] = Field(
        0, description="Answer tokens before EOS at least; -1 and 0 mean none."
    )
    temperature: PositiveFloat = Field(1.0, description="Divides the logits.")
    top_k: NonNegativeInt = Field(0, description="Sample among the k likeliest tokens; 0: all.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Sample among the likeliest tokens of this total probability.")
    repetition_penalty: PositiveFloat = Field(1.0, description="Above 1 discourages tokens that stand in the text already.")
    no_repeat_ngram_size: NonNegativeInt = Field(0, description="No n-gram of this size twice; 0: off.")
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Texts that end an answer; cut off before scoring."
    )
