"""Settings of the evaluation of text generators (`test_sft.py`, `test_ppo.py`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from common.schema import CSVPath, GenerateParams, ModelName, NonNegativeInt, PositiveInt, RowSettings, Section, StagePath, WandbSettings


class EvaluationData(RowSettings):
    data_dir: StagePath = Field(description="Data file with questions and answers.")
    split: Literal["train", "val", "test"] = Field("test", description="Split that is answered.")
    max_prompt_length: PositiveInt | None = Field(None, description="Prompt tokens at most; null: what the model's positions allow.")
    truncate_prompt: bool = Field(True, description="Cut longer prompts; false: an error.")
    padding: bool | Literal["longest", "max_length"] = Field(
        True, description="Pad to the longest prompt of a batch, or to `max_prompt_length`; false: answer questions one by one."
    )
    padding_side: Literal["left"] = Field("left", description="Side of the padding; generation needs the left one.")
    batch_size: PositiveInt = Field(16, description="Questions answered at once.")
    max_rows: PositiveInt | None = Field(None, description="Only the first rows of the split.")
    prompt_format: Literal["qa", "chat"] | None = Field(None, description="Null: what the model's manifest says, else `qa`.")

    @field_validator("padding_side", mode="before")
    @classmethod
    def _left(cls, side: Any) -> Any:
        if side != "left":
            raise ValueError(f"got {side!r}: an answer goes on where its prompt ends, so padding comes first; set left, or remove the key")
        return side


class TestParams(Section):
    __test__ = False  # the name is pytest's pattern, the class is not a test

    test_model_path: ModelName | None = Field(None, description="Model to evaluate; default: `model_name`.")
    log_file: CSVPath = Field("models/evaluation.csv", description="CSV of answers and metrics.", validate_default=True)
    save_steps: PositiveInt = Field(50, description="Rows between two appends to the CSV.")
    do_compute_metrics: bool = Field(True, description="Compute BLEU and ROUGE.")
    use_cache: bool = Field(True, description="Keep keys and values while generating.")


class GenerationTestConfig(Section):
    """`test_sft.py` and `test_ppo.py`."""

    cuda: bool = Field(False, description="Use the GPU; an error where there is none.")
    seed: NonNegativeInt = Field(42, description="Seed of sampling.")
    model_name: ModelName = Field(description="Model directory or hub name (also the tokenizer's).")
    model_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type the weights are loaded in.")
    trust_remote_code: bool = Field(False, description="Allow model directories to run code of their own.")
    data: EvaluationData = Field(description="Questions to answer.")
    generate_params: GenerateParams = Field(default_factory=GenerateParams, description="How answers are generated.")
    test_params: TestParams = Field(default_factory=TestParams, description="What is computed and where it goes.")
    wandb: WandbSettings = Field(default_factory=lambda: WandbSettings(mode="disabled"), description="Weights & Biases.")
