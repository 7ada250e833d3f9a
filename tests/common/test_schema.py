"""The schema's words, and the tables of settings that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from common.evaluation.config import GenerationTestConfig
from common.schema import (
    CommandLineValue,
    FiniteFloat,
    Fraction,
    FreezeSettings,
    ModelName,
    ModelParams,
    PositiveInt,
    Section,
    StagePath,
    WandbSettings,
    resolve_monitor,
)
from common.schema_docs import settings_table
from common.schema_types import choices_of, section_of, type_at, type_words, walk_fields
from reward_model.config import ClassificationConfig, RegressionConfig, RewardTestConfig
from rlhf.config import PPORunConfig
from sft.config import SFTConfig

SCHEMAS = (SFTConfig, ClassificationConfig, RegressionConfig, PPORunConfig, GenerationTestConfig, RewardTestConfig)


class Inner(Section):
    size: PositiveInt = Field(3, description="A size.")
    names: list[str] = Field(default_factory=list, description="Names, a | b.")


class Outer(Section):
    inner: Inner = Field(default_factory=lambda: Inner(size=5), description="Inside.")
    perhaps: Inner | None = Field(None, description="Perhaps.")
    parts: list[Inner] = Field(default_factory=list, description="Parts.")
    rate: Fraction = Field(description="A rate.")
    free: dict[str, Any] = Field(default_factory=dict, description="Anything.")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (PositiveInt, "a whole number >= 1"),
        (PositiveInt | None, "a whole number >= 1 or null"),
        (PositiveInt | Literal["auto"], "a whole number >= 1 or auto"),
        (Fraction, "a number >= 0 and <= 1"),
        (Annotated[float, Field(gt=0, lt=0.5)], "a number > 0 and < 0.5"),
        (FiniteFloat, "a number"),
        (bool, "true or false"),
        (bool | Literal["longest", "max_length"], "true, false, longest or max_length"),
        (Literal["qa", "chat"] | None, "qa, chat or null"),
        (Literal["left"], "left"),
        (str, "text"),
        (StagePath | None, "a path or null"),
        (ModelName, "a model directory or hub name"),
        (list[str] | Literal["all-linear"], "a list of texts or all-linear"),
        (list[PositiveInt], "a list of whole numbers >= 1"),
        (tuple[Fraction, Fraction], "a list of 2 numbers >= 0 and <= 1"),
        (list[Inner], "a list of sections"),
        (dict[str, Any], "a mapping"),
        (Inner, "a section"),
        (Inner | None, "a section or null"),
        (Any, "any value"),
    ],
)
def test_type_words(annotation: Any, words: str) -> None:
    assert type_words(annotation) == words


def test_type_at_walks_sections_lists_mappings_and_unions() -> None:
    assert type_words(type_at(Outer, ("inner", "size"))) == "a whole number >= 1"
    assert type_words(type_at(Outer, ("perhaps", "names", 4))) == "text"
    assert type_words(type_at(Outer, ("parts", 0, "size"))) == "a whole number >= 1"
    assert type_at(Outer, ("free", "any", "thing")) is Any
    assert type_at(Outer, ("rate", "x")) is None
    assert type_at(Outer, ("parts", "x")) is None
    assert type_at(SFTConfig, ("evaluation", "generate_params", "num_beams")) is Any  # an open section
    assert type_at(SFTConfig, ("model_params", "adam_betas", 2)) is None
    assert section_of(type_at(Outer, ("perhaps",))) is Inner
    assert choices_of(Literal["a", "b"] | None) == ["a", "b"]


def test_walk_fields_goes_section_by_section() -> None:
    assert [".".join(path) for path, _ in walk_fields(Outer)] == [
        "rate", "inner", "inner.size", "inner.names", "perhaps", "perhaps.size", "perhaps.names", "parts", "free",
    ]  # fmt: skip


def test_a_table_has_a_row_for_every_key() -> None:
    assert settings_table(Outer) == (
        "| key | type | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `rate` | number >= 0 and <= 1 | required | A rate. |\n"
        "| **`inner`** | section | `size: 5` | Inside. |\n"
        "| `inner.size` | whole number >= 1 | `3` | A size. |\n"
        "| `inner.names` | list of texts | `[]` | Names, a \\| b. |\n"
        "| **`perhaps`** | section | `null` | Perhaps. |\n"
        "| `perhaps.size` | whole number >= 1 | `3` | A size. |\n"
        "| `perhaps.names` | list of texts | `[]` | Names, a \\| b. |\n"
        "| `parts` | list of sections | `[]` | Parts. |\n"
        "| `free` | mapping | `{}` | Anything. |\n"
    )


@pytest.mark.parametrize("schema", [GenerationTestConfig, RewardTestConfig])
def test_a_csv_is_not_written_under_another_name(schema: type[Section]) -> None:
    given = {"model_name": "m", "data": {"data_dir": "d"}, "test_params": {"log_file": "answers.jsonl"}}
    with pytest.raises(ValidationError, match=r"got .*answers\.jsonl, expected a name that ends in \.csv"):
        schema.model_validate(given)
    assert schema.model_validate({**given, "test_params": {"log_file": "answers.CSV"}})


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_of_every_stage_is_described(schema: type[Section]) -> None:
    fields = list(walk_fields(schema))
    assert len(fields) > 15
    for path, field in fields:
        assert field.description and field.description.endswith("."), path
        assert type_words(field.annotation)
    assert settings_table(schema).count("\n") == len(fields) + 2


# --- sections ----------------------------------------------------------------------------------------------------------------------


def all_sections(schema: type[BaseModel]) -> set[type[BaseModel]]:
    return {schema} | {inner for _, field in walk_fields(schema) if (inner := section_of(field.annotation))}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_sections_are_frozen_and_strict(schema: type[Section]) -> None:
    for section in all_sections(schema):
        assert section.model_config["frozen"] and section.model_config["strict"], section
        assert section.model_config["extra"] == ("allow" if section.__name__ in {"GenerateParams", "PPOGeneration"} else "forbid"), section


@pytest.mark.parametrize(
    ("flags", "active"),
    [({}, False), ({"freeze_ln": True}, True), ({"freeze_ln": True, "do_freeze": False}, False), ({"do_freeze": True}, True)],
)
def test_a_missing_do_freeze_means_true_when_anything_is_frozen(flags: dict[str, bool], active: bool) -> None:
    assert FreezeSettings(**flags).active is active


@pytest.mark.parametrize("value", ["yes", 1, "true"])
def test_no_text_or_number_is_a_boolean(value: Any) -> None:
    with pytest.raises(ValidationError):
        FreezeSettings.model_validate({"freeze_ln": value})


def test_whole_floats_are_whole_numbers() -> None:
    assert FreezeSettings.model_validate({"layers_not_to_freeze": [0.0, -1.0]}).layers_not_to_freeze == [0, -1]
    with pytest.raises(ValidationError):
        FreezeSettings.model_validate({"layers_not_to_freeze": [0.5]})


def test_two_betas_are_taken_as_a_list_but_not_as_text() -> None:
    assert ModelParams.model_validate({"adam_betas": [0, 0.5]}).adam_betas == (0.0, 0.5)
    for wrong in ([0.9], [0.9, 0.95, 0.99], ["0.9", 0.95], "99"):
        with pytest.raises(ValidationError):
            ModelParams.model_validate({"adam_betas": wrong})


def test_a_wandb_project_is_found_in_both_places() -> None:
    assert WandbSettings().project == "rlhf-qa"
    assert WandbSettings.model_validate({"args": {"project_name": "a"}}).project == "a"
    assert WandbSettings.model_validate({"args": {"project_name": "a"}, "project_name": "b"}).project == "b"


def test_paths_keep_no_dots_and_command_line_values_become_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Paths(Section):
        path: StagePath
        text: str

    monkeypatch.chdir(tmp_path)
    read = Paths.model_validate({"path": "../a", "text": CommandLineValue("x")}, context={"base_dir": Path("/stage/configs")})
    assert (read.path, type(read.text)) == ("/stage/a", str)
    assert Paths.model_validate({"path": CommandLineValue("b"), "text": ""}, context={"base_dir": Path("/s")}).path == str(tmp_path / "b")


def test_a_model_directory_is_the_real_one_and_a_hub_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Models(Section):
        model: ModelName

    def read(name: str) -> str:
        return Models.model_validate({"model": name}, context={"base_dir": tmp_path}).model

    for number in (0, 1):
        (tmp_path / "models" / f"run-{number}" / "step-1").mkdir(parents=True)
        (tmp_path / "models" / f"run-{number}" / "best").symlink_to("step-1")
    link = tmp_path / "models" / "latest"
    link.symlink_to("run-0/best")
    before = read("models/latest")
    link.unlink()
    link.symlink_to("run-1/best")  # another run publishes
    assert before == read(before) == str(tmp_path / "models" / "run-0" / "step-1")
    assert read(str(link)) == str(tmp_path / "models" / "run-1" / "step-1")
    link.unlink()
    link.symlink_to("gone")
    assert read("models/latest") == str(link)  # what is wrong with it is said under its own name
    assert read("org/name") == "org/name"


@pytest.mark.parametrize("monitor", ["val/loss", "val_loss"])
def test_monitor_is_found_in_both_spellings(monitor: str) -> None:
    assert resolve_monitor(monitor, ("val/accuracy", "val/loss")) == "val/loss"
    assert resolve_monitor("val_token_accuracy", ("val/token_accuracy",)) == "val/token_accuracy"


def test_an_unknown_monitor_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="got 'val_los', expected one of: val/accuracy, val/loss"):
        resolve_monitor("val_los", ("val/loss", "val/accuracy"))
