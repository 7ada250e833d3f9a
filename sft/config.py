"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.schema import DataSettings, GenerateParams, ModelParams, PositiveInt, Section, TrainingSettings
from sft.metrics import GENERATION_METRICS, VALIDATION_METRICS


class SFTData(DataSettings):
    batching: Literal["random", "bucketed", "packed"] = Field(
        "random", description="`random`; `bucketed`: rows of like length together; `packed`: rows one after another without padding."
    )


class SFTEvaluation(Section):
    num_generated: PositiveInt = Field(32, description="Validation questions answered for BLEU/ROUGE and the sample table.")
    generate_params: GenerateParams = Field(default_factory=GenerateParams, description="How those answers are generated.")


class SFTConfig(TrainingSettings):
    data: SFTData = Field(description="Training data.")
    model_params: ModelParams = Field(default_factory=ModelParams, description="Optimizer, freezing, memory.")
    evaluation: SFTEvaluation = Field(default_factory=SFTEvaluation, description="Generated answers during validation.")

    @property
    def monitored(self) -> dict[str, str]:
        return {**VALIDATION_METRICS, **(GENERATION_METRICS if self.model_params.do_compute_metrics else {})}

    @property
    def more_to_monitor(self) -> str:
        return "" if self.model_params.do_compute_metrics else " (model_params.do_compute_metrics: true adds others)"
