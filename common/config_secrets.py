"""Keys of services belong into the environment. One found in a config is taken out of it before anything can log or save it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from common.schema import API_PLACEHOLDERS
from common.schema_types import KeyPath

KEY_VARIABLE = "WANDB_API_KEY"

_SECRET_NAME = re.compile(r"(?:^|[_-])(?:api[_-]?key|secret|password|(?:auth|access|hf)[_-]?token)$", re.IGNORECASE)
# Where nothing but arguments of a tracker stands, a shorter name tells enough.
_TRACKER_SECRET_NAME = re.compile(r"(?:key|token|password|secret|api)$", re.IGNORECASE)
_FREE_SECRET_NAME = re.compile(r"^(?:wandb[_-])?(?:api[_-]?key|api|key)$", re.IGNORECASE)


def is_secret(path: KeyPath) -> bool:
    """Whether what stands at this path may be a key, whatever it looks like."""
    if not path:
        return False
    name, of_tracker = str(path[-1]), path[0] == "wandb" or "tracker_kwargs" in path[:-1]
    return bool(_SECRET_NAME.search(name)) or (of_tracker and bool(_TRACKER_SECRET_NAME.search(name)))


def may_hold_secret(path: KeyPath) -> bool:
    """Whether text that stands at this path may be a key: at a secret's own, or where a section that may have one is expected."""
    return is_secret(path) or path in (("wandb",), ("wandb", "args")) or "tracker_kwargs" in path


def holds_key(value: Any, path: KeyPath) -> bool:
    """Whether something at this path or below it is a key, placeholders of the shipped examples excepted."""
    if isinstance(value, Mapping):
        return any(holds_key(item, (*path, key)) for key, item in value.items())
    if isinstance(value, list):
        return any(holds_key(item, path) for item in value)
    return is_secret(path) and value is not None and str(value).strip().lower() not in API_PLACEHOLDERS


def take_key_out(data: dict[str, Any]) -> tuple[str | None, KeyPath]:
    """Remove wandb's key from `wandb.api` and `ppo_config.tracker_kwargs`; returns it (None: only placeholders) and where it stood."""
    key: str | None = None
    where: KeyPath = ()
    wandb = data.get("wandb")
    if isinstance(wandb, dict) and isinstance(wandb.get("api"), str):
        text = wandb["api"].strip()
        if text.lower() not in API_PLACEHOLDERS:
            key, where = text, ("wandb", "api")
        wandb["api"] = None
    section = data.get("ppo_config")
    kwargs = section.get("tracker_kwargs") if isinstance(section, dict) else None
    for path, place in (((), kwargs), (("wandb",), kwargs.get("wandb") if isinstance(kwargs, dict) else None)):
        if not isinstance(place, dict):
            continue
        for name in [name for name in place if _FREE_SECRET_NAME.search(name)]:
            text = str(place.pop(name) or "").strip()
            if text.lower() not in API_PLACEHOLDERS:
                key, where = text, ("ppo_config", "tracker_kwargs", *path, name)
    return key, where


def move_to_environment(key: str) -> bool:
    """Set WANDB_API_KEY unless one is there already, which then stays; returns whether it was set."""
    if os.environ.get(KEY_VARIABLE):
        return False
    os.environ[KEY_VARIABLE] = key
    return True


def without_secrets(value: Any, path: KeyPath = ()) -> Any:
    """A copy of plain data without any key that may hold a secret."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item, (*path, key)) for key, item in value.items() if not is_secret((*path, key))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, path) for item in value]
    return value
