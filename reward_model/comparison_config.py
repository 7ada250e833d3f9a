"""Settings of a comparison of readouts: those of a training of reward models, and what is compared."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from common.readout_settings import DEFAULTS, READS, ReadoutName, ReadoutSettings, readout_problems
from common.schema import KeyedProblems, NonNegativeInt, PositiveFloat, Seed
from reward_model.config import ClassificationConfig, ClassificationParams, RegressionConfig, RegressionParams, RewardConfig
from reward_model.logged import PAIR_METRICS, SCORE_METRICS

ObjectiveName = Literal["pairs", "scores"]
_READOUT_NAMES = get_args(ReadoutName)
_OWN: dict[ObjectiveName, type[ClassificationParams] | type[RegressionParams]] = {"pairs": ClassificationParams, "scores": RegressionParams}


def _from_its_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in _READOUT_NAMES:
        close = difflib.get_close_matches(value, _READOUT_NAMES, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"got {value!r}, expected a readout: {', '.join(_READOUT_NAMES)}{meant}")
    return {"name": value}


Readout = Annotated[ReadoutSettings, BeforeValidator(_from_its_name)]
"""A readout with its settings, or its name alone."""


class ComparisonParams(ClassificationParams, RegressionParams):
    """Those of both kinds; a setting of the other kind is refused by the comparison."""


class ComparisonConfig(RewardConfig):
    """`compare_readouts.py`. `seed` is that of a backbone that `model_init` builds, and of the intervals."""

    objective: ObjectiveName = Field(description="`pairs`: Bradley-Terry on preferences; `scores`: regression.")
    readouts: list[Readout] | None = Field(
        None, description="Readouts, by name or each with its settings; null: every one that makes sense over the backbone."
    )
    seeds: list[Seed] = Field(
        default_factory=lambda: [1, 2, 3], min_length=1, description="Each readout is trained with each: its weights, the order of rows."
    )
    learning_rates: list[PositiveFloat] | None = Field(
        None,
        min_length=1,
        description="Each readout is trained with each, and counts with the one whose `monitor` is best on average; null: the one of "
        "`model_params`.",
    )
    bootstrap_samples: NonNegativeInt = Field(1000, description="Resamples (by question) behind each interval; 0: none.")
    keep_models: bool = Field(False, description="Keep the checkpoints of every run; false: of each readout those of its best seed.")
    model_params: ComparisonParams = Field(default_factory=ComparisonParams, description="Optimizer, freezing, loss.")

    @property
    def monitored(self) -> dict[str, str]:
        return PAIR_METRICS if self.objective == "pairs" else SCORE_METRICS

    @model_validator(mode="after")
    def _only_what_is_compared(self) -> Self:
        params = self.model_params
        defaults = ComparisonParams().model_dump()
        foreign = set(ComparisonParams.model_fields) - set(_OWN[self.objective].model_fields)
        problems: dict[tuple[Any, ...], str] = {
            ("model_params", name): f"got {getattr(params, name)}, expected nothing here: objective {self.objective} has no such setting"
            for name in sorted(foreign & params.model_fields_set)
            if getattr(params, name) != defaults[name]  # a config that a comparison wrote names them all
        }
        if params.readout != ReadoutSettings():
            problems["model_params", "readout"] = "expected nothing here: `readouts` lists those to compare"
        if self.trainer.ckpt_path is not None:
            problems["trainer", "ckpt_path"] = "expected null: every readout starts fresh; model_name names the backbone"
        if self.use_multi_gpu_if_available or self.trainer.params.get("devices", 1) != 1:
            key = ("use_multi_gpu_if_available",) if self.use_multi_gpu_if_available else ("trainer", "params", "devices")
            problems[key] = "expected nothing here: the runs of a comparison follow one another in one process"
        if self.launch.engine != "local" or (self.launch.num_training_workers or 1) > 1:
            problems["launch",] = "expected nothing here: the runs of a comparison follow one another in one process"
        for name in ("readouts", "seeds", "learning_rates"):
            values = getattr(self, name) or []
            for number, value in enumerate(values):
                if value in values[:number]:
                    problems[name, number] = "stands there twice"
        if problems:
            raise KeyedProblems(problems)
        return self

    @model_validator(mode="after")
    def _readout_fits_the_model(self) -> Self:
        """Of each readout, where a single training asks it of its own."""
        kind, layers = self.known_model()
        if kind is None:
            return self
        problems: dict[tuple[Any, ...], str] = {}
        for number, readout in enumerate(self.readouts or []):
            for name, problem in readout_problems(readout, kind, layers).items():
                problems["readouts", number, name] = problem
        if problems:
            raise KeyedProblems(problems)
        return self

    @property
    def candidates(self) -> list[ReadoutSettings]:
        """The readouts to compare, before it is known which of them make sense over the backbone."""
        return list(self.readouts) if self.readouts is not None else [ReadoutSettings(name=name) for name in READS]

    @property
    def rates(self) -> list[float]:
        return self.learning_rates or [self.model_params.learning_rate]

    def run(
        self, readout: ReadoutSettings, learning_rate: float, seed: int, *, backbone: str, folder: Path, cache: Path
    ) -> ClassificationConfig | RegressionConfig:
        """The config of one training, whose directory will lie below `folder`; its states are in `cache`."""
        schema = ClassificationConfig if self.objective == "pairs" else RegressionConfig
        values = {name: value for name, value in self.model_dump().items() if name in schema.model_fields}
        params = {name: value for name, value in values["model_params"].items() if name in _OWN[self.objective].model_fields}
        params |= {"readout": readout.model_dump(), "learning_rate": learning_rate}
        if self.model_params.kept_states is not None:
            params["cache_dir"] = self.model_params.cache_dir or str(cache)
        return schema.model_validate(
            {
                **values,
                "model_params": params,
                "model_name": backbone,
                "model_init": None,
                "seed": seed,
                "desc": self.run_desc(readout, learning_rate),
                "index": seed,
                "results_root": str(folder),
                "launch": {},
                "require_clean_git": False,
            }
        )

    def run_desc(self, readout: ReadoutSettings, learning_rate: float) -> str:
        """Name of the runs of one readout and learning rate; their index is the seed."""
        rate = "" if self.learning_rates is None else f"-lr-{learning_rate}"  # which may be others when a comparison goes on
        return label(readout).replace(", ", "-").replace(" ", "-").replace("+", "") + rate


def label(readout: ReadoutSettings) -> str:
    """A readout's name, and those of its settings that are no defaults: `layerwise_attention, n_layers 2`."""
    changed = {name: value for name, value in readout.model_dump().items() if name != "name" and value != DEFAULTS[name]}
    shown = {name: "-".join(map(str, value)) if isinstance(value, list) else value for name, value in changed.items()}
    return ", ".join([readout.name, *(f"{name} {value}" for name, value in shown.items())])
