"""Options of transformers that shape sampling, beside temperature, `top_k` and `top_p`; checked before torch is imported."""

from __future__ import annotations

from common.schema import GenerateParams

SAMPLING_OPTIONS = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Each a share between 0 and 1; null leaves it off."""
_ONE_ALLOWED = frozenset({"top_h", "min_p"})


def sampling_option_problems(params: GenerateParams, setting: str) -> list[str]:
    """A line for each option whose value is no share, or one that changes nothing. `setting` names the section."""
    problems: list[str] = []
    for name in SAMPLING_OPTIONS:
        value = (params.model_extra or {}).get(name)
        if value is None:
            continue
        most = name in _ONE_ALLOWED
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 < value <= 1 if most else 0 < value < 1):
            until = "at most 1" if most else "below 1"
            problems.append(f"{setting}.{name}: got {value!r}, expected a number above 0 and {until} (without it, nothing is left out)")
    return problems
