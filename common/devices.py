"""What GPUs this machine has, as far as that can be told before torch is imported: a config that asks for others is refused at once.

What torch sees decides later; here only what cannot be is refused.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.errors import UserError

BFLOAT16_CAPABILITY = 8.0
"""Compute capability from which NVIDIA's GPUs compute in bfloat16 (Ampere)."""
# Devices that torch may take for a GPU and that are counted in other ways: WSL's, AMD's, Jetson's.
_OTHERS = ("dxg", "kfd", "nvgpu", "nvmap", "nvhost-gpu", "nvhost-ctrl-gpu")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_SMI_TIMEOUT_S = 3.0


def check_trainer_devices(params: Mapping[str, Any]) -> None:
    """Raise UserError where `trainer.params` asks for GPUs, or for a precision of theirs, that this machine does not have."""
    accelerator, devices, precision = (params.get(name) for name in ("accelerator", "devices", "precision"))
    wants_gpu = str(accelerator).lower() in {"gpu", "cuda"}
    limit = gpus_at_most()
    if limit is None or not (wants_gpu or accelerator in (None, "auto")):
        return
    problems = []
    if limit == 0:
        if wants_gpu:
            problems.append(f"trainer.params.accelerator: got {accelerator!r}, but there is no GPU here; use cpu or auto")
    elif isinstance(devices, int | list | str):
        numbers = _gpu_numbers(devices)
        if isinstance(numbers, list) and any(number >= limit for number in numbers):
            problems.append(f"trainer.params.devices: got {devices}, but the {limit} GPU(s) present are numbered 0 to {limit - 1}")
        elif isinstance(numbers, int) and numbers > limit:
            problems.append(f"trainer.params.devices: got {devices}, but only {limit} GPU(s) are present")
    problems += _bfloat16_problems({"trainer.params.precision": precision}, "use 16-mixed or 32")
    if problems:
        raise UserError(*problems)


def check_cuda(setting: str, instead: str) -> None:
    """Raise UserError where this machine has no GPU, which `setting` asks for; `instead`: what to do."""
    if gpus_at_most() == 0:
        raise UserError(f"{setting}: got true, but this machine has no GPU that torch can use; {instead}")


def check_bfloat16(asked: Mapping[str, Any], instead: str) -> None:
    """Raise UserError for settings (key -> value) that are bfloat16, where a GPU would compute and has none; `instead`: what to do."""
    if problems := _bfloat16_problems(asked, instead):
        raise UserError(*problems)


def gpus_at_most(root: Path = Path("/")) -> int | None:
    """The largest number of GPUs that torch can see here; None where that cannot be told (no Linux, or no NVIDIA).

    root: of the file system, for tests.
    """
    if version("torch").endswith("+cpu"):
        return 0
    if not sys.platform.startswith("linux") or any((root / "dev" / name).exists() for name in _OTHERS):
        return None
    nodes = [path for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    # Before its first use the driver may have made no node.
    cards = [path for path in (root / "sys/bus/pci/devices").glob("*") if _content(path / "vendor") == _NVIDIA]
    present = max(len(nodes), sum(_content(path / "class").startswith(_DISPLAY) for path in cards))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    listed = [name.strip() for name in visible.split(",")]
    # CUDA stops reading at the first name that is none.
    return min(present, next((number for number, name in enumerate(listed) if name.startswith("-") or not name), len(listed)))


def lowest_capability() -> float | None:
    """Compute capability of the least able NVIDIA GPU; None where it cannot be told."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S).stdout
        return min(float(line) for line in listed.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _bfloat16_problems(asked: Mapping[str, Any], instead: str) -> list[str]:
    asked = {setting: value for setting, value in asked.items() if str(value).startswith("bf")}
    if not asked or not gpus_at_most():
        return []
    capability = lowest_capability()
    if capability is None or capability >= BFLOAT16_CAPABILITY:
        return []
    why = f"which needs a GPU of compute capability {BFLOAT16_CAPABILITY} or more, and one here has {capability}"
    return [f"{setting}: got {value!r}, {why}; {instead}" for setting, value in asked.items()]


def _gpu_numbers(devices: int | list[int] | str) -> int | list[int] | None:
    """How many GPUs a value of `devices` asks for, or which; None: as many as there are."""
    if not isinstance(devices, str):
        return devices
    numbers = [int(part) for part in devices.split(",") if part.strip().isdigit()]
    return numbers if "," in devices else next(iter(numbers), None)


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
