"""Checks of the options of generation, before torch is imported."""

from __future__ import annotations

import difflib
from typing import Any

from common.errors import UserError
from common.sampling_options import SAMPLING_OPTIONS, sampling_option_problems
from common.schema import GenerateParams

# What generation itself decides here, and what to write instead.
_OWNED = {
    "max_length": "it counts the prompt too; write max_new_tokens",
    "min_new_tokens": "write min_length, which counts answer tokens here",
    "num_return_sequences": "each question gets one answer",
    "return_dict_in_generate": "answers come back as text",
    "output_scores": "answers come back as text",
    "output_logits": "answers come back as text",
    "output_attentions": "answers come back as text",
    "output_hidden_states": "answers come back as text",
    "use_cache": "write it under test_params",
    "pad_token_id": "the tokenizer decides it",
}


def generation_options(params: GenerateParams) -> dict[str, Any]:
    """The options beyond those that `GenerateParams` names; UserError for those that are unknown, not to be set or of a wrong value."""
    options = dict(params.model_extra or {})
    if not options:
        return {}
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    choices = sorted((known - _OWNED.keys()) | set(GenerateParams.model_fields))
    problems: list[str] = []
    for name in options:
        if name in _OWNED:
            problems.append(f"generate_params.{name} cannot be set: {_OWNED[name]}")
        elif name not in known:
            close = difflib.get_close_matches(name, choices, n=1)
            problems.append(f"generate_params.{name} is no option of generation" + (f" (did you mean {close[0]}?)" if close else ""))
    problems += sampling_option_problems(params, "generate_params")
    if params.do_sample and (options.get("num_beams") or 1) > 1:
        problems.append(f"generate_params: num_beams {options['num_beams']} searches, do_sample: true samples; keep one of them")
    if not problems:
        try:
            GenerationConfig(do_sample=True, max_new_tokens=params.max_new_tokens, **options)
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"generate_params: {str(error).strip().splitlines()[0]}")
    if problems:
        raise UserError(*problems)
    return options


def idle_options(params: GenerateParams) -> list[str]:
    """Names of options that are set and have no effect, because they shape sampling and nothing is sampled."""
    if params.do_sample:
        return []
    fields = GenerateParams.model_fields
    idle = [name for name in ("temperature", "top_k", "top_p") if getattr(params, name) != fields[name].default]
    return idle + [name for name in SAMPLING_OPTIONS if name in (params.model_extra or {})]
