"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from common.schema import (
    DataSettings,
    GenerateParams,
    ModelInit,
    ModelName,
    ModelParams,
    PositiveInt,
    RunSettings,
    Section,
    TrainerSettings,
    WandbSettings,
)


class SFTData(DataSettings):
    batching: Literal["random", "bucketed", "packed"] = Field(
        "random", description="`random`; `bucketed`: rows of like length together; `packed`: rows one after another without padding."
    )


class SFTEvaluation(Section):
    num_generated: PositiveInt = Field(32, description="Validation questions answered for BLEU/ROUGE and the sample table.")
    generate_params: GenerateParams = Field(default_factory=GenerateParams, description="How those answers are generated.")


class SFTConfig(RunSettings):
    data: SFTData = Field(description="Training data.")
    model_name: ModelName | None = Field(None, description="Model directory or hub name to start from.")
    model_init: ModelInit | None = Field(None, description="Build the model from a configuration instead of `model_name`.")
    model_params: ModelParams = Field(default_factory=ModelParams, description="Optimizer, freezing, memory.")
    evaluation: SFTEvaluation = Field(default_factory=SFTEvaluation, description="Generated answers during validation.")
    trainer: TrainerSettings = Field(default_factory=TrainerSettings, description="Checkpoints and Lightning's trainer.")
    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases.")

    @model_validator(mode="after")
    def _one_model(self) -> SFTConfig:
        if (self.model_name is None) == (self.model_init is None):
            raise ValueError("exactly one of model_name and model_init is needed")
        return self
