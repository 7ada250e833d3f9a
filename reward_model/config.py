"""Settings that both kinds of reward model share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.model_source import BackboneKind, kind_in, layers_in, start_config
from common.readout_settings import PARTS, Part, ReadoutSettings, readout_problems
from common.schema import (
    CSVPath,
    DataSettings,
    KeyedProblems,
    ModelName,
    ModelParams,
    NonNegativeInt,
    PositiveInt,
    RowSettings,
    Section,
    StagePath,
    TrainingSettings,
    WandbSettings,
)
from reward_model.logged import PAIR_MEMBER_METRICS, PAIR_METRICS, SCORE_MEMBER_METRICS, SCORE_METRICS


class RewardData(DataSettings):
    batching: Literal["random", "bucketed", "by_question"] = Field(
        "bucketed",
        description="`random`; `bucketed`: rows of like length together, which pads less and gives the same gradient for a row; "
        "`by_question`: rows with the same question together, divided only where a batch is full.",
    )
    max_prompt_length: PositiveInt | None = Field(None, description="Prompt tokens at most; null: only `max_length` limits it.")


class RewardModelParams(ModelParams):
    readout: ReadoutSettings = Field(default_factory=ReadoutSettings, description="How the score is read out.")
    freeze_backbone: bool = Field(False, description="Train the readout alone. The states that it reads are computed once, into a cache.")

    @property
    def kept_states(self) -> Literal["float32", "bfloat16"] | None:
        """Type of the states in the cache; None: there is none."""
        return "float32" if self.freeze_backbone and self.cache_states is None else super().kept_states

    def frozen_part_problems(self) -> dict[tuple[str, ...], str]:
        """What is wrong with the settings of the cache, and of what it is of, by key."""
        if not self.freeze_backbone:
            whole = "" if self.lora is not None else ", or freeze_backbone: true"
            return {key: problem + whole for key, problem in super().frozen_part_problems().items()}
        acting = {
            "lora": self.lora is not None and "adapters train it",
            self.switch: self.active and "nothing is left for freeze_* to freeze",
            "layers_not_to_freeze": bool(self.layers_not_to_freeze) and f"got {self.layers_not_to_freeze}",
            "dropout": bool(self.dropout) and f"got {self.dropout}; it runs without dropout (readout.dropout is the head's)",
            "gradient_checkpointing": self.gradient_checkpointing and "got true, but no activations are kept",
        }
        return {(name,): f"{why}, and freeze_backbone is true; remove one of them" for name, why in acting.items() if why}


class RewardConfig(TrainingSettings):
    data: RewardData = Field(description="Training data.")
    use_multi_gpu_if_available: bool = Field(
        False, description="Train on every GPU of the machine, where it has several; `data.batch_size` rows go to each."
    )
    model_params: RewardModelParams

    @model_validator(mode="after")
    def _one_number_of_devices(self) -> Self:
        if self.use_multi_gpu_if_available and "devices" in self.trainer.params:
            given = self.trainer.params["devices"]
            raise ValueError(f"use_multi_gpu_if_available is true, and trainer.params.devices is {given}; remove one of them")
        return self

    def known_model(self) -> tuple[BackboneKind | None, dict[Part, int]]:
        """Kind of the model and layers of its parts, as far as they are known here: built here, or a directory."""
        model = start_config(self)
        kind = kind_in(model)
        return kind, {part: count for part in (PARTS[kind] if kind else ()) if (count := layers_in(model, part))}

    @model_validator(mode="after")
    def _readout_fits_the_model(self) -> Self:
        kind, layers = self.known_model()
        if kind is not None and (problems := readout_problems(self.model_params.readout, kind, layers)):
            raise KeyedProblems({("model_params", "readout", name): problem for name, problem in problems.items()})
        return self


class ClassificationParams(RewardModelParams):
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="Probability that a preference is taken as reversed.")
    centring_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the centring term: the squared mean of chosen and rejected score of a pair."
    )
    margin_use: Literal["subtract", "weigh", "ignore"] = Field(
        "subtract",
        description="What a row's `margin` m does, times `margin_scale` s: `subtract`: -log sigmoid(chosen - rejected - s m), as Llama 2 "
        "has it; `weigh`: s m times the loss without it; `ignore`: nothing. Rows without one are pairs like any other.",
    )
    margin_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="Units of score (`subtract`) or pairs (`weigh`) that a margin of 1 stands for."
    )

    @model_validator(mode="after")
    def _scale_is_read(self) -> Self:
        if self.margin_use == "ignore" and self.margin_scale != 1.0:
            raise ValueError(f"margin_scale is {self.margin_scale:g}, but margin_use is ignore; remove one of them")
        return self


class ClassificationConfig(RewardConfig):
    model_params: ClassificationParams = Field(default_factory=ClassificationParams, description="Optimizer, freezing, loss.")

    @property
    def monitored(self) -> dict[str, str]:
        return PAIR_METRICS | (PAIR_MEMBER_METRICS if self.model_params.readout.ensemble > 1 else {})


class RegressionParams(RewardModelParams):
    loss: Literal["mse", "mae", "huber"] | None = Field(
        None, description="Loss on the transformed score; null: mse, or mae when `mae_loss`."
    )
    mae_loss: bool = Field(False, description="The original's switch: mean absolute instead of squared error.")
    huber_delta: Annotated[float, Field(gt=0)] = Field(1.0, description="Where Huber's loss turns linear.")
    score_transform: Literal["none", "standardize", "log1p", "minmax"] = Field(
        "standardize", description="Applied to train scores before the loss, undone in every output."
    )

    @property
    def loss_name(self) -> Literal["mse", "mae", "huber"]:
        return self.loss or ("mae" if self.mae_loss else "mse")

    @model_validator(mode="after")
    def _one_loss(self) -> RegressionParams:
        if self.mae_loss and self.loss not in (None, "mae"):
            raise ValueError(f"mae_loss is true, but loss is {self.loss}; remove one of them")
        return self


class RegressionConfig(RewardConfig):
    model_params: RegressionParams = Field(default_factory=RegressionParams, description="Optimizer, freezing, loss.")

    @property
    def monitored(self) -> dict[str, str]:
        return SCORE_METRICS | (SCORE_MEMBER_METRICS if self.model_params.readout.ensemble > 1 else {})


class RewardTestData(RowSettings):
    data_dir: StagePath = Field(description="Data file with rows of this stage's kind.")
    split: Literal["train", "val", "test"] = Field("test", description="Split that is scored.")
    batch_size: PositiveInt = Field(16, description="Rows scored at once.")
    max_length: PositiveInt | None = Field(None, description="Tokens of prompt + answer at most; null: the manifest's.")
    max_prompt_length: PositiveInt | None = Field(None, description="Prompt tokens at most; null: the manifest's.")
    truncate_prompt: bool = Field(True, description="Cut longer prompts; false: an error.")


class RewardTestParams(Section):
    test_model_path: ModelName | None = Field(None, description="Reward model to evaluate; default: `model_name`.")
    log_file: CSVPath = Field("models/evaluation.csv", description="CSV of scores.", validate_default=True)
    table_name: str = Field("scores", description="Name of the table in wandb.")
    save_steps: PositiveInt = Field(200, description="Rows between two appends to the CSV.")
    bootstrap_samples: NonNegativeInt = Field(1000, description="Resamples (by question) behind each interval; 0: none.")
    breakdown_by: list[str] = Field(
        default_factory=list,
        description="Further columns of the rows, a subject or a source, say: the main figure for each of their values.",
    )


class RewardTestConfig(Section):
    """`test_reward.py` of both kinds."""

    cuda: bool = Field(False, description="Use the GPU; an error where there is none.")
    seed: NonNegativeInt = Field(42, description="Seed of the bootstrap.")
    model_name: ModelName = Field(description="Reward model directory.")
    trust_remote_code: bool = Field(False, description="Allow model directories to run code of their own.")
    data: RewardTestData = Field(description="Rows to score.")
    test_params: RewardTestParams = Field(default_factory=RewardTestParams, description="What is computed and where it goes.")
    wandb: WandbSettings = Field(default_factory=lambda: WandbSettings(mode="disabled"), description="Weights & Biases.")
