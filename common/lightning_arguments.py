"""What `trainer.params` may hold: the keyword arguments of `pl.Trainer`, checked without importing it."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from common.schema_types import Words, choices_of, type_words

_Whole = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
_OrEndless = Annotated[int, Field(ge=-1)]
_Limit = Literal[-1] | _Positive
_Time = Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$"), Words("a time such as 00:12:00:00 (days:hours:minutes:seconds)")]
_TimeParts = Annotated[dict[Literal["weeks", "days", "hours", "minutes", "seconds"], _Whole], Words("a mapping such as {hours: 12}")]
_DeviceNames = Annotated[str, Field(pattern=r"^(auto|-1|\d+|\d+(,\d+)*,?)$"), Words("auto")]
_Share = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Precision = Literal[
    "32", "32-true", "bf16-mixed", "bf16-true", "bf16", "16-mixed", "16-true", "16", "64", "64-true",
    "transformer-engine", "transformer-engine-float16", 32, 16, 64,
]  # fmt: skip

Strategy = Literal[
    "auto", "single_device", "ddp", "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true", "fsdp", "deepspeed", "single_xla", "xla",
]  # fmt: skip

# Argument -> what it may be. A test compares the names with the signature of `pl.Trainer`.
ARGUMENTS: dict[str, Any] = {
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"],
    "strategy": Strategy,
    "devices": _Limit | Annotated[list[_Whole], Field(min_length=1)] | _DeviceNames,
    "num_nodes": _Positive,
    "precision": _Precision | None,
    "fast_dev_run": bool | _Whole,
    "max_epochs": _Limit | None,
    "min_epochs": _Whole | None,
    "max_steps": _Limit,
    "min_steps": _Whole | None,
    "max_time": _Time | _TimeParts | None,
    "limit_train_batches": _Share | None,
    "limit_val_batches": _Share | None,
    "limit_test_batches": _Share | None,
    "limit_predict_batches": _Share | None,
    "overfit_batches": _Share,
    "val_check_interval": _Positive | Annotated[float, Field(gt=0, le=1)] | _Time | None,
    "check_val_every_n_epoch": _Positive | None,
    "num_sanity_val_steps": _OrEndless | None,
    "log_every_n_steps": _Whole | None,
    "enable_progress_bar": bool | None,
    "enable_model_summary": bool | None,
    "accumulate_grad_batches": _Positive,
    "gradient_clip_val": Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "deterministic": bool | Literal["warn"] | None,
    "benchmark": bool | None,
    "inference_mode": bool,
    "profiler": Literal["simple", "advanced", "pytorch", "xla"] | None,
    "detect_anomaly": bool,
    "barebones": bool,
    "sync_batchnorm": bool,
    "reload_dataloaders_every_n_epochs": _Whole,
    "enable_autolog_hparams": bool,
}
STAGE_OWNED_ARGUMENTS = frozenset(
    {"logger", "callbacks", "enable_checkpointing", "default_root_dir", "use_distributed_sampler", "plugins", "model_registry"}
)
PACKAGES = {"tpu": "torch_xla", "xla": "torch_xla", "deepspeed": "deepspeed"}
"""Part of the name of an accelerator or strategy -> the package that it needs."""
_FLOAT16 = frozenset({"16", "16-mixed", "16-true"})


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(ARGUMENTS[name], config=ConfigDict(strict=True))


def lightning_argument_problems(params: dict[str, Any]) -> dict[str, str]:
    """What is wrong with `trainer.params`: argument -> problem."""
    problems: dict[str, str] = {}
    for name, value in params.items():
        if name in STAGE_OWNED_ARGUMENTS:
            problems[name] = "is set by the stage itself; remove it"
        elif name not in ARGUMENTS:
            close = difflib.get_close_matches(name, sorted(ARGUMENTS), n=1)
            problems[name] = "unknown argument of pl.Trainer" + (f"; did you mean {close[0]}?" if close else "")
        else:
            try:
                _adapter(name).validate_python(value)
            except ValidationError:
                close = difflib.get_close_matches(str(value), choices_of(ARGUMENTS[name]), n=1)
                meant = f" (did you mean {close[0]}?)" if close else ""
                problems[name] = f"got {value!r}, expected {type_words(ARGUMENTS[name])}{meant}"
    problems.update(_absent_package(params, {"accelerator", "strategy"} - problems.keys()))
    if str(params.get("precision")) in _FLOAT16 and params.get("accelerator") == "cpu":
        problems["precision"] = f"got {str(params['precision'])!r}, which a CPU cannot train in; expected bf16-mixed or 32"
    return problems


def _absent_package(params: dict[str, Any], names: set[str]) -> dict[str, str]:
    """Values that need a package which is not installed."""
    problems = {}
    for name in sorted(names & params.keys()):
        package = next((package for word, package in PACKAGES.items() if word in str(params[name])), None)
        if package is not None and find_spec(package) is None:
            remedy = "pip install -r requirements-deepspeed.txt, or use fsdp" if package == "deepspeed" else "use auto"
            problems[name] = f"got {params[name]!r}, which needs {package}, and that is not installed; {remedy}"
    return problems
