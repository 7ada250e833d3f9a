"""What can be said about a model before torch is imported: does it exist, is it whole, does it fit the stage that wants it.

Every check ends in a `UserError` of one line per problem that names the setting, so that a wrong path costs a second.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from common.checkpoint import Manifest, read_manifest
from common.errors import UserError
from common.schema import HUB_NAME, TrainingSettings

HUB_TIMEOUT_S = 3.0

Role = Literal["generator", "backbone", "reward"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
# The files of a model directory in which transformers looks for code to run.
_CODE_FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
_TRUE = {"1", "ON", "YES", "TRUE"}
# How the architectures call the number of positions they have an embedding or a rotation for.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5"})
"""Model types whose n_positions is a relic that limits nothing."""

BackboneKind = Literal["causal", "encoder", "encoder_decoder"]
_KINDS: dict[BackboneKind, str] = {
    "causal": "bloom codegen falcon gemma gemma2 gemma3_text gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite llama mistral olmo olmo2 opt "
    "phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2",
    "encoder": "albert bert camembert deberta deberta-v2 distilbert electra modernbert mpnet roberta xlm-roberta",
    "encoder_decoder": "bart blenderbot led longt5 m2m_100 marian mbart mt5 pegasus switch_transformers t5 umt5",
}
_KIND_OF_TYPE: dict[str, BackboneKind] = {model_type: kind for kind, types in _KINDS.items() for model_type in types.split()}
# How the architectures call the number of layers.
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class ModelSource:
    """A model as its files describe it. For a hub model that is not in the local cache, `config` is None."""

    name: str
    setting: str
    directory: Path | None
    config: dict[str, Any] | None
    manifest: Manifest | None

    @property
    def is_reward_model(self) -> bool:
        if self.manifest is not None:
            return self.manifest.is_reward_model
        return any(name.endswith("ForSequenceClassification") for name in (self.config or {}).get("architectures") or [])

    @property
    def readouts(self) -> int:
        """Readouts of a reward model: more than one for an ensemble."""
        saved = (self.manifest.readout if self.manifest is not None else None) or {}
        ensemble = saved.get("ensemble")
        return ensemble if isinstance(ensemble, int) else 1  # what else it may be, loading tells

    @property
    def is_encoder_decoder(self) -> bool:
        return bool((self.config or {}).get("is_encoder_decoder", False))

    @property
    def splits_text(self) -> bool:
        """Whether prompt and answer enter different halves of the model: not so for reward models that read both in the encoder."""
        readout = (self.manifest.readout if self.manifest is not None else None) or {}
        return self.is_encoder_decoder and readout.get("name", "last_token") == "last_token"

    @property
    def positions(self) -> int | None:
        """Tokens the model has positions for; None where it is unknown or unlimited (T5's relative positions)."""
        return positions_in(self.config or {})

    @property
    def prompt_format(self) -> str | None:
        """What the manifest says; None for models that are not ours."""
        return self.manifest.prompt_format if self.manifest is not None else None


def positions_in(config: Mapping[str, Any]) -> int | None:
    """Tokens a model of this configuration has positions for; None where it does not say or they are unlimited."""
    if config.get("model_type") in RELATIVE_POSITIONS:
        return None
    return next((config[key] for key in _POSITION_KEYS if isinstance(config.get(key), int)), None)


def kind_in(config: Mapping[str, Any]) -> BackboneKind | None:
    """The kind of transformer that a configuration describes, as far as that can be told without transformers."""
    kind = _KIND_OF_TYPE.get(str(config.get("model_type")))
    if config.get("is_encoder_decoder"):
        return "encoder_decoder"
    return "causal" if kind is not None and kind != "encoder_decoder" and config.get("is_decoder") else kind


def layers_in(config: Mapping[str, Any], part: Literal["whole", "encoder", "decoder"] = "whole") -> int | None:
    """Layers of the transformer, or of an encoder-decoder's encoder or decoder; None where the configuration does not say."""
    keys = {"whole": (), "encoder": ("encoder_layers",), "decoder": ("decoder_layers", "num_decoder_layers")}[part] + _LAYER_KEYS
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def config_in(name: str) -> dict[str, Any] | None:
    """The configuration of a model directory, as far as it can be read; else None, and others say why."""
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return None
    return config if isinstance(config, dict) else None


def start_config(config: TrainingSettings) -> dict[str, Any]:
    """What is known here of the configuration of the model that a run starts from: a directory's, or that of `model_init`."""
    name = config.trainer.ckpt_path or config.model_name
    if name is not None:
        return config_in(name) or {}
    assert config.model_init is not None, "the config has one of model_name and model_init"
    return {**config.model_init.config, "model_type": config.model_init.model_type}


def check_model_source(name: str, *, setting: str = "model_name", role: Role = "generator", trust_remote_code: bool = False) -> ModelSource:
    """Describe the model that the config's `setting` names; raises UserError where it cannot be what `role` needs.

    generator: writes answers. backbone: a reward model starts from it (any model). reward: scores answers.
    Nothing is downloaded. A hub model that is not in the cache is taken on trust, unless the environment says offline.
    """
    path = Path(name).expanduser()
    if "://" in name:
        raise UserError(f"{setting}: {name!r} is a URL; give a model directory or a hub name such as `EleutherAI/gpt-neo-125m`")
    if path.is_dir():
        source = _describe_directory(path, name, setting)
    elif path.is_file():
        raise UserError(f"{setting}: {name} is a file, expected a model directory (config.json and weights) or a hub name")
    elif path.is_symlink():
        raise UserError(f"{setting}: {name} points to {os.readlink(path)}, which does not exist")
    elif path.is_absolute() or not HUB_NAME.fullmatch(name):
        hint = "" if path.is_absolute() else f" (looked for {os.path.abspath(path)})"
        hint += "; run the stage that writes it first" if path.name == "latest" else ""
        raise UserError(f"{setting}: no model directory {name}{hint}")
    else:
        source = _describe_hub_model(name, setting)
    if source.directory is not None:
        check_contents(name, trust_remote_code=trust_remote_code, what=setting)
    else:
        _check_code(name, {"config.json": source.config or {}}, trust_remote_code, setting)
    _check_role(source, role)
    return source


def _describe_directory(path: Path, name: str, setting: str) -> ModelSource:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UserError(f"{setting}: {name} has no config.json, so it is no model directory{_meant_instead(path)}")
    config = _read_json(config_file, setting)
    manifest = read_manifest(path)
    if not any(found for pattern in _WEIGHTS for found in path.glob(pattern)):
        raise UserError(f"{setting}: {name} has a config.json but no weights (model.safetensors); it was not written to the end")
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{setting}: {name} holds no tokenizer")
    entries, embeddings = _vocabulary_entries(path / "tokenizer.json", setting), config.get("vocab_size")
    if entries is not None and isinstance(embeddings, int) and entries > embeddings:
        raise UserError(
            f"{setting}: {name} does not fit together: its tokenizer has {entries} entries, its model embeddings for {embeddings}"
        )
    if manifest is not None:
        lost = [file for file in manifest.files if not (path / file).is_file()]
        if lost:
            raise UserError(f"{setting}: {name} lacks {', '.join(lost)}, which its manifest lists")
    return ModelSource(name, setting, path, config, manifest)


def _vocabulary_entries(path: Path, setting: str) -> int | None:
    """Highest id of a fast tokenizer's file + 1; None where the file or its layout is another."""
    if not path.is_file():
        return None
    content = _read_json(path, setting)
    vocabulary = content.get("model", {}).get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
    added = [token["id"] for token in content.get("added_tokens", [])]
    return max([*ids, *added], default=-1) + 1 or None


def _meant_instead(path: Path) -> str:
    for child in ("best", "last", "latest", "models/latest"):
        if (path / child / "config.json").is_file():
            return f"; did you mean {path / child}?"
    if (path / "adapter_config.json").is_file():
        return "; it holds a bare LoRA adapter: merge it into its base model first"
    if (path / "config.yaml").is_file():
        return "; it is a run that has saved no checkpoint yet"
    return ""


def _describe_hub_model(name: str, setting: str) -> ModelSource:
    cached = _cached_config(name)
    if cached is not None:
        return ModelSource(name, setting, None, _read_json(cached, setting), None)
    if is_offline():
        raise UserError(
            f"{setting}: {name!r} is no directory here, and as a hub name it is not in the local cache while "
            "HF_HUB_OFFLINE forbids downloading it"
        )
    _check_hub_reachable(name, setting)
    return ModelSource(name, setting, None, None, None)


def _check_hub_reachable(name: str, setting: str) -> None:
    """Refuse a hub name where the hub cannot be reached, after seconds instead of a minute of retries. Behind a proxy it is not asked."""
    from huggingface_hub.constants import ENDPOINT

    hub = urlsplit(ENDPOINT)
    if any(os.environ.get(key) for key in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return
    try:
        socket.create_connection((hub.hostname or "", hub.port or (443 if hub.scheme == "https" else 80)), timeout=HUB_TIMEOUT_S).close()
    except OSError:
        raise UserError(
            f"{setting}: {name!r} is no directory here and not in the local cache, and the model hub cannot be reached; give a directory, "
            "or copy a cache over and set HF_HOME and HF_HUB_OFFLINE=1"
        ) from None


def is_offline() -> bool:
    """Whether the environment forbids downloads."""
    return any(os.environ.get(key, "").upper() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _cached_config(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _read_json(path: Path, setting: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{_lead(setting)}{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{_lead(setting)}{path} holds {type(value).__name__}, expected an object")
    return value


def check_contents(name: str, *, trust_remote_code: bool = False, what: str = "") -> None:
    """Refuse a model directory that runs code of its own, or that loads from elsewhere; for hub names transformers refuses the code.

    Every loading of a model asks this, also where no `check_model_source` came before. `what` begins the message (a setting, say).
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return
    _check_places(path, what)
    files = {file: _read_json(path / file, what) for file in _CODE_FILES if (path / file).is_file()}
    _check_code(name, files, trust_remote_code, what)


def _check_code(name: str, files: Mapping[str, Mapping[str, Any]], trusted: bool, what: str) -> None:
    """Raise UserError where one of these JSON files names code that is not transformers' own."""
    if trusted:
        return
    for file, content in files.items():
        for key in _code_keys(content):
            raise UserError(
                f"{_lead(what)}{name} brings code of its own ({key} in {file}); set trust_remote_code: true if you have read and trust it"
            )


def _code_keys(content: Any) -> Iterator[str]:
    """Keys that make transformers run code from a model's directory or from the hub: its classes, or kernels named `owner/name`."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if (key == "auto_map" and value) or (str(key).endswith("_implementation") and "/" in str(value)):
            yield str(key)
        yield from _code_keys(value)


def _check_places(path: Path, what: str) -> None:
    """Raise UserError where loading from this directory would read other places: another base model, weights outside of it."""
    if (path / "adapter_config.json").is_file() and (path / "config.json").is_file():
        raise UserError(
            f"{_lead(what)}{path} holds a LoRA adapter (adapter_config.json) beside a model, and would be read as the adapter over a base "
            "model from elsewhere; merge the two, or move the adapter away"
        )
    for index in path.glob("*.index.json"):
        shards = _read_json(index, what).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise UserError(f"{_lead(what)}{index} names weights outside of its folder: {shard!r}")


def _lead(what: str) -> str:
    return f"{what}: " if what else ""


def _check_role(source: ModelSource, role: Role) -> None:
    if source.config is None:
        return
    if role == "generator" and source.is_reward_model:
        raise UserError(f"{source.setting}: {source.name} is a reward model; expected a model that writes text (an SFT or PPO run)")
    if role == "reward" and not source.is_reward_model:
        raise UserError(
            f"{source.setting}: {source.name} has no reward head"
            + (f" (its manifest says stage {source.manifest.stage})" if source.manifest else "")
            + "; expected the output of a train_reward.py"
        )


def check_prompt_format(source: ModelSource, prompt_format: str, setting: str) -> None:
    """Refuse a prompt format other than the one the model was trained on; models without manifest take any."""
    trained = source.prompt_format
    if trained is not None and trained != prompt_format:
        raise UserError(f"{setting} {prompt_format} does not fit {source.setting} {source.name}, which was trained on {trained}")


def check_length(source: ModelSource, length: int, what: str) -> None:
    """Refuse `length` tokens (`what` says which settings make it up) that exceed the model's positions."""
    if source.positions is not None and length > source.positions:
        too_few = f"{what} exceeds the {source.positions} positions of {source.setting} {source.name}"
        raise UserError(f"{too_few}; ask for fewer tokens, or name a model with as many positions")


def check_layers(requested: Sequence[int], model: Mapping[str, Any], section: str) -> None:
    """Refuse a `layers_not_to_freeze` of that section beyond the layers (of the larger stack) that a model's configuration tells."""
    counts = [layers_in(model, part) for part in ("whole", "encoder", "decoder")]
    if count := max((count for count in counts if count is not None), default=0):
        check_layer_indices(requested, count, f"{section}.layers_not_to_freeze")


def check_layer_indices(requested: Sequence[int], count: int, setting: str) -> None:
    """Refuse indices (negative: from the end) beyond `count` layers."""
    outside = [index for index in requested if not -count <= index < count]
    if outside:
        range_text = f"0 to {count - 1}, or -{count} to -1" if count else "none"
        raise UserError(f"{setting}: {', '.join(map(str, outside))} out of range, the model has {count} layers (indices {range_text})")


def check_joinable(policy: ModelSource, judges: list[ModelSource], *, prompt_format: str | None = None) -> str:
    """Check that a policy and its reward models fit together; returns the prompt format to use.

    A judge may have any tokenizer (answers reach it as text), but must have been trained on the policy's prompt format, else it
    reads prompts it has never seen. All problems are reported at once.
    """
    chosen = prompt_format or policy.prompt_format or "qa"
    problems: list[str] = []
    if policy.prompt_format not in (None, chosen):
        problems.append(f"prompt_format {chosen} does not fit {policy.setting} {policy.name}, which was trained on {policy.prompt_format}")
    for judge in judges:
        if judge.prompt_format not in (None, chosen):
            problems.append(
                f"{judge.setting}: {judge.name} was trained on prompt format {judge.prompt_format}, "
                f"but {policy.setting} {policy.name} uses {chosen}"
            )
    if problems:
        raise UserError(*problems)
    return chosen


def check_same_vocabulary(policy: ModelSource, critic: ModelSource) -> None:
    """Refuse a critic that would read other text in the policy's ids: unlike a judge, it sees ids and not text."""
    if policy.manifest is not None and critic.manifest is not None:
        same = policy.manifest.vocabulary_fingerprint == critic.manifest.vocabulary_fingerprint
    else:
        sizes = [(source.config or {}).get("vocab_size") for source in (policy, critic)]
        same = None in sizes or sizes[0] == sizes[1]
    if not same:
        raise UserError(
            f"{critic.setting}: {critic.name} has another vocabulary than {policy.setting} {policy.name}, so it cannot be its critic; "
            "use ppo_config.critic: head"
        )
