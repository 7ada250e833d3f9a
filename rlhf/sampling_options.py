"""Checks of the options of PPO's sampling, before torch is imported."""

from __future__ import annotations

from common.errors import UserError
from common.sampling_options import SAMPLING_OPTIONS, sampling_option_problems
from common.schema import GenerateParams

OTHER_OPTIONS = ("eos_token_id",)


def check_sampling_options(params: GenerateParams, *, setting: str) -> None:
    """Refuse options that sampling would ignore: UserError with a line for each, naming what there is."""
    extra = dict(params.model_extra or {})
    supported = sorted({*GenerateParams.model_fields, *SAMPLING_OPTIONS, *OTHER_OPTIONS})
    problems = [
        f"{setting}.{name}: got {value!r}, which PPO's sampling does not know; it has {', '.join(supported)}"
        for name, value in extra.items()
        if name not in supported
    ]
    problems += sampling_option_problems(params, setting)
    if not params.do_sample:
        given = [name for name in SAMPLING_OPTIONS if extra.get(name) is not None]
        problems += [f"{setting}.{name} shapes sampling, but do_sample is false" for name in given]
    eos = extra.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    if eos is not None and not (ends and all(type(token) is int and token >= -1 for token in ends)):
        problems.append(f"{setting}.eos_token_id: got {eos!r}, expected a token id or a list of them (-1: no token ends an answer)")
    if params.min_length > params.max_new_tokens:
        problems.append(f"{setting}: min_length {params.min_length} is more than max_new_tokens {params.max_new_tokens}")
    if problems:
        raise UserError(*problems)
