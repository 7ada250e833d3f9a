"""What a training needs to go on, beside its weights: nested plain values and tensors, as safetensors and JSON in a checkpoint directory.

No pickle: reading a state can run no code. Numbers come back with all their bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

TENSORS_FILE, VALUES_FILE = "training_state.safetensors", "training_state.json"
STATE_FILES = (TENSORS_FILE, VALUES_FILE)
# Keys that stand for what JSON has no word for.
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def write_training_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state: dicts (keys: plain values), lists, tuples, tensors, None, booleans, numbers and strings."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    values = _packed(dict(state), tensors)
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in places:
            tensors[name] = tensor.clone()  # safetensors refuses tensors that share memory
        places.add(place)
    save_file(tensors, folder / TENSORS_FILE)
    (folder / VALUES_FILE).write_text(json.dumps(values), encoding="utf-8")


def state_size(state: Mapping[str, Any]) -> int:
    """Bytes of the files that `write_training_state` would write; needs as much memory."""
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_packed(dict(state), tensors))
    return sum(tensor.nbytes for tensor in tensors.values()) + len(values)


def read_training_state(folder: Path) -> dict[str, Any]:
    """The state that `write_training_state` wrote, tensors on the CPU. Raises UserError where there is none or it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / VALUES_FILE).read_text(encoding="utf-8"))
        state = _unpacked(values, load_file(folder / TENSORS_FILE))
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no state of a training to go on from ({', '.join(STATE_FILES)})") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: its state of the training cannot be read ({error}); the directory is damaged") from None
    if not isinstance(state, dict):
        raise UserError(f"{folder}: its state of the training is a {type(state).__name__}, expected its parts; the directory is damaged")
    return state


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {_ITEMS: [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a training state cannot hold a {type(value).__name__}: {value!r}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in value[_ITEMS]}


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        copied = tensor.detach().to("cpu", copy=True)  # memory that numpy has seen could not be freed by sharding
        digest.update(copied.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that do not train: a resumed run takes them from where the first one did."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}


def check_start_weights(now: str, then: str, what: str) -> None:
    """Refuse to go on from other weights than a run began with; `now` and `then` are digests. Raises UserError."""
    if now != then:
        raise UserError(f"--resume: the {what} are not those that the run began with; was the model it starts from replaced?")


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse to save weights that are not finite, of a model that trains: nothing can go on from them. Raises UserError."""
    bad = [name for name, weight in model.named_parameters() if weight.requires_grad and not bool(weight.isfinite().all())]
    if bad:
        raise UserError(
            f"step {step}: {len(bad)} weights are not finite ({bad[0]} …); they are not saved, the checkpoints before them stay; lower the "
            "learning rate in a new run"
        )


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model: parameters that train, and buffers; a tied weight once."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    persistent = model.state_dict(keep_vars=True).keys()
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def check_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse what `trained_weights` gave of another model. Raises UserError."""
    own = trained_weights(model)
    if problem := next(iter(own.keys() ^ weights.keys()), None):
        raise UserError(f"the checkpoint's weights are of another model: {problem} is in {'the model' if problem in own else 'them'} alone")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
            raise UserError(f"the checkpoint's weights are of another model: {name} is {tuple(weights[name].shape)} there")


def load_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put back what `trained_weights` gave. Raises UserError where the model is another one."""
    import torch

    check_trained_weights(model, weights)
    with torch.no_grad():
        for name, tensor in trained_weights(model).items():
            tensor.copy_(weights[name])
