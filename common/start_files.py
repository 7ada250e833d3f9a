"""Where a model starts from that has a base and weights to load over it (`model_pretrain`, `rm_pretrain`). Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.model_source import TOKENIZER_FILES, ModelSource, Role, check_model_source, config_in

_BARE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.pt")
# Not `vocab_size`: a model may have grown a padding token.
_SIZES = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers", "intermediate_size", "d_ff")


class StartFiles(NamedTuple):
    """The places that a model is read from."""

    model: str
    """Directory or hub name of the configuration and, unless there are `weights`, of the weights."""
    tokenizer: str
    weights: tuple[Path, ...] = ()
    """Files that hold all of its weights, instead of the model's own."""


def start_files(base: str, pretrain: str | None) -> StartFiles:
    """What to read for `pretrain` over `base`.

    A directory with configuration and tokenizer stands for itself. Anything else that is there (a file, a directory without one of the
    two) is weights alone, with the base's configuration and tokenizer. None: the base.
    """
    if pretrain is None:
        return StartFiles(base, base)
    path = Path(pretrain).expanduser()
    if path.is_file():
        return StartFiles(base, base, (path,))
    whole = (path / "config.json").is_file() and any((path / name).is_file() for name in TOKENIZER_FILES)
    if path.is_dir() and not whole:
        found = next((files for pattern in _BARE_WEIGHTS if (files := sorted(path.glob(pattern)))), [])
        return StartFiles(base, base, tuple(found) or (path,))
    return StartFiles(pretrain, pretrain)


def check_start_files(
    base: str, pretrain: str | None, *, base_setting: str, setting: str, role: Role, trust_remote_code: bool = False
) -> ModelSource:
    """Describe what a model starts from, as `check_model_source` does; `setting` names `pretrain`, `base_setting` the base.

    Raises UserError where there are no weights at `pretrain`, or they are of a model of another type or size than the base.
    """
    files = start_files(base, pretrain)
    if pretrain is None or files.model == base:
        bare_head = role == "reward" and files.weights
        source = check_model_source(base, setting=base_setting, role="backbone" if bare_head else role, trust_remote_code=trust_remote_code)
        for file in files.weights:
            if file.is_dir():
                raise UserError(f"{setting}: {file} holds no weights (model.safetensors, pytorch_model.bin or model.pt)")
        return source
    source = check_model_source(files.model, setting=setting, role=role, trust_remote_code=trust_remote_code)
    _check_same_shape(source, base)
    return source


def _check_same_shape(source: ModelSource, base: str) -> None:
    """Refuse weights of another architecture than the base's, as far as the base's configuration is here to be read."""
    own, other = source.config or {}, config_in(base) or {}
    for key in ("model_type", *_SIZES):
        if key in own and key in other and own[key] != other[key]:
            raise UserError(f"{source.setting}: {source.name} has {key} {own[key]}, but the base model {base} has {other[key]}")
