"""What is known of a machine's GPUs before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import devices
from common.devices import check_bfloat16, check_cuda, check_trainer_devices, gpus_at_most, lowest_capability
from common.errors import UserError


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it is for GPUs, and no variable that hides some."""
    monkeypatch.setattr(devices, "version", lambda package: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def machine(root: Path, nodes: tuple[str, ...] = (), cards: tuple[tuple[str, str], ...] = ()) -> Path:
    """A file system with device nodes and PCI cards of (vendor, class)."""
    (root / "dev").mkdir()
    for name in nodes:
        (root / "dev" / name).touch()
    for number, (vendor, kind) in enumerate(cards):
        card = root / "sys/bus/pci/devices" / str(number)
        card.mkdir(parents=True)
        (card / "vendor").write_text(vendor + "\n")
        (card / "class").write_text(kind + "\n")
    return root


@pytest.mark.parametrize(
    ("nodes", "cards", "expected"),
    [
        ((), (), 0),
        (("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"), (), 2),
        ((), (("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x030000")), 1),  # no node before the driver's first use
        (("nvidia0",), (("0x10de", "0x030000"), ("0x10de", "0x030000")), 2),
        (("dxg",), (), None),
        (("kfd", "nvidia0"), (), None),
    ],
)
def test_gpus_are_counted_from_above(
    nodes: tuple[str, ...], cards: tuple[tuple[str, str], ...], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert gpus_at_most(machine(tmp_path, nodes, cards)) == expected


@pytest.mark.parametrize(("visible", "expected"), [("", 0), ("-1", 0), ("1", 1), ("0,2", 2), ("0,-1,1", 1), ("0,1,2,3,4", 3), ("MIG-a", 1)])
def test_hidden_gpus_do_not_count(visible: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_at_most(machine(tmp_path, ("nvidia0", "nvidia1", "nvidia2"))) == expected


def test_elsewhere_than_on_linux_nothing_is_known_and_a_build_for_cpus_sees_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, ("nvidia0",))
    monkeypatch.setattr("sys.platform", "darwin")
    assert gpus_at_most(root) is None
    monkeypatch.setattr(devices, "version", lambda package: "2.13.0+cpu")
    assert gpus_at_most(root) == 0


DEVICES = {
    "too many": (2, {"accelerator": "gpu", "devices": 8}, ["trainer.params.devices: got 8, but only 2 GPU(s) are present"]),
    "too many, in text": (2, {"devices": "3"}, ["trainer.params.devices: got 3, but only 2 GPU(s) are present"]),
    "one that is none": (2, {"devices": [0, 2]}, ["trainer.params.devices: got [0, 2], but the 2 GPU(s) present are numbered 0 to 1"]),
    "one that is none, in text": (2, {"devices": "0,2"}, ["trainer.params.devices: got 0,2, but the 2 GPU(s) present are numbered 0 to 1"]),
    "none at all": (0, {"accelerator": "cuda"}, ["trainer.params.accelerator: got 'cuda', but there is no GPU here; use cpu or auto"]),
    "all": (2, {"accelerator": "gpu", "devices": -1}, []),
    "all, in text": (2, {"accelerator": "gpu", "devices": "auto"}, []),
    "as many as there are": (2, {"devices": 2}, []),
    "processes on a CPU": (2, {"accelerator": "cpu", "devices": 8}, []),
    "auto without a GPU": (0, {"devices": 8}, []),
    "unknown": (None, {"accelerator": "gpu", "devices": 8}, []),
    "bfloat16": (
        1,
        {"precision": "bf16-mixed"},
        [
            "trainer.params.precision: got 'bf16-mixed', which needs a GPU of compute capability 8.0 or more, and one here has 7.5; "
            "use 16-mixed or 32"
        ],
    ),
    "bfloat16 on a CPU": (1, {"accelerator": "cpu", "precision": "bf16-mixed"}, []),
    "bfloat16 without a GPU": (0, {"precision": "bf16-mixed"}, []),
}


@pytest.mark.parametrize(("present", "params", "expected"), DEVICES.values(), ids=DEVICES)
def test_a_trainer_that_asks_for_more_is_refused(
    present: int | None, params: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus_at_most", lambda: present)
    monkeypatch.setattr(devices, "lowest_capability", lambda: 7.5)
    if not expected:
        return check_trainer_devices(params)
    with pytest.raises(UserError) as caught:
        check_trainer_devices(params)
    assert list(caught.value.problems) == expected


def test_cuda_and_bfloat16_of_other_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus_at_most", lambda: 0)
    with pytest.raises(UserError, match=r"^cuda: got true, but this machine has no GPU that torch can use; set cuda: false$"):
        check_cuda("cuda", "set cuda: false")
    check_bfloat16({"a": "bfloat16"}, "use float32")
    monkeypatch.setattr(devices, "gpus_at_most", lambda: 1)
    check_cuda("cuda", "set cuda: false")
    for capability in (None, 8.0, 9.0):
        monkeypatch.setattr(devices, "lowest_capability", lambda capability=capability: capability)
        check_bfloat16({"a": "bf16", "b": "no"}, "use float32")
    monkeypatch.setattr(devices, "lowest_capability", lambda: 7.0)
    with pytest.raises(UserError, match=r"^a: got 'bf16', which needs a GPU of compute capability 8.0 or more, and one here has 7.0; use"):
        check_bfloat16({"a": "bf16", "b": "no"}, "use float32")


def test_the_capability_is_that_of_the_least_able_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool = tmp_path / "nvidia-smi"
    for answer, expected in (("9.0\\n7.5\\n", 7.5), ("[N/A]\\n", None), ("", None)):
        tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        tool.chmod(0o755)
        assert lowest_capability() == expected
    tool.unlink()
    assert lowest_capability() is None
