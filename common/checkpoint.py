"""Checkpoint directories, the contract between stages: atomic, self-describing, verified.

A directory is what `save_pretrained` writes plus `manifest.json` and a model card. It is built in a staging folder beside its
destination and renamed, so at every instant what is there is complete. Nothing here imports torch when it is imported: manifests
are read while a config is still being checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from common.disk import amount, checkpoint_bytes, is_out_of_space
from common.errors import UserError
from common.fault_points import reached
from common.provenance import code_state, host_facts, package_versions, without_home
from common.runs import write_text_atomically
from common.score_transform import ScoreTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.models.reward import RewardModel

MANIFEST = "manifest.json"
CARD = "README.md"
FORMAT_VERSION = 1
ADAPTER_FOLDER = "adapter"

Stage = Literal["sft", "reward_classification", "reward_regression", "ppo"]


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file of a checkpoint directory."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint directory says about itself. Unknown keys of newer versions are ignored, so old code reads new files."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    stage: Stage = Field(description="Stage that wrote the directory.")
    format_version: int = Field(FORMAT_VERSION, description="Version of this file's layout.")
    prompt_format: Literal["qa", "chat"] = Field("qa", description="Prompt text the model was trained on.")
    tokenizer_fingerprint: str = Field(description="Fingerprint of the tokenizer's vocabulary and rules.")
    vocabulary_fingerprint: str | None = Field(None, description="The same without added tokens: equal where ids mean the same text.")
    pad_token_id: int | None = Field(None, description="Padding id.")
    eos_token_id: int | None = Field(None, description="Id that ends an answer.")
    max_length: int | None = Field(None, description="Tokens of prompt + answer + EOS in training.")
    max_prompt_length: int | None = Field(None, description="Prompt tokens in training.")
    is_encoder_decoder: bool = Field(False, description="Whether the transformer is an encoder-decoder.")
    readout: dict[str, Any] | None = Field(None, description="Reward models: how the score is read out; null for text generators.")
    score_mean: FiniteFloat | None = Field(None, description="Reward models: mean of output scores on the training set.")
    score_scale: FiniteFloat | None = Field(
        None, ge=0, description="Reward models: standard deviation of output scores on the training set."
    )
    member_means: list[FiniteFloat] | None = Field(None, description="Ensembles: mean of each member's output scores on the training set.")
    score_transform: ScoreTransform | None = Field(None, description="Reward models: what training did to scores, to be inverted.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Figures of this checkpoint.")
    data_fingerprint: str | None = Field(None, description="SHA-256 of the validated training data.")
    git_commit: str | None = Field(None, description="Commit of the code, where it ran from a git checkout.")
    git_clean: bool | None = Field(None, description="Whether that checkout had no changes.")
    git_diff: str | None = Field(None, description="SHA-256 of what was changed or untracked in that checkout; null: nothing.")
    host: dict[str, Any] = Field(default_factory=dict, description="Kind of machine: system, processor, cores, memory, GPUs; no names.")
    packages: dict[str, str] = Field(default_factory=dict, description="Versions of the packages that matter.")
    config: dict[str, Any] = Field(default_factory=dict, description="Resolved configuration without secrets; `~` is the home folder.")
    step: int | None = Field(None, description="Optimizer (PPO: PPO) steps done.")
    processes: int | None = Field(None, description="Processes that trained together.")
    created: str = Field("", description="UTC time of writing, ISO 8601.")
    files: dict[str, FileRecord] = Field(default_factory=dict, description="Size and checksum of every file; filled on saving.")

    @field_validator("files")
    @classmethod
    def _files_lie_inside(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if outside:
            raise ValueError(f"{', '.join(outside)} would lie outside of the directory")
        return files

    @property
    def is_reward_model(self) -> bool:
        return self.readout is not None


def new_manifest(stage: Stage, tokenizer: PreTrainedTokenizerBase, *, config: Mapping[str, Any] | None = None, **fields: Any) -> Manifest:
    """A manifest with the facts nobody should have to gather by hand: tokenizer, code, packages, machine, time."""
    code = code_state()
    return Manifest(
        stage=stage,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        git_commit=code.commit,
        git_clean=code.clean,
        git_diff=code.diff,
        host=host_facts(),
        packages=package_versions(),
        config=without_home(dict(config or {})),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides which ids a text gets: the rules and vocabulary, special tokens and chat template."""
    special = _plain(tokenizer.special_tokens_map)
    return _digest({"rules": _rules(tokenizer), "special": special, "chat_template": getattr(tokenizer, "chat_template", None)})


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """As `tokenizer_fingerprint`, of what splits plain text alone: a padding token added later does not change it."""
    rules = _rules(tokenizer)
    return _digest({part: rules.get(part) for part in ("normalizer", "pre_tokenizer", "model")})


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"model": sorted(tokenizer.get_vocab().items())}
    rules: dict[str, Any] = json.loads(backend.to_str())
    # How the last call padded and cut is state of the object, not of the tokenizer.
    return {part: value for part, value in rules.items() if part not in {"padding", "truncation"}}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _plain(special: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [str(token) for token in value] if isinstance(value, (list, tuple)) else str(value) for name, value in special.items()}


# --- writing ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(destination: Path, need: int | None = None) -> Iterator[Path]:
    """Yield a staging folder beside `destination`; on success it is flushed to disk and renamed, on failure nothing is left.

    need: bytes that it will take, about, for the error where they do not fit. Raises UserError there, and where the destination exists: a
    checkpoint is never overwritten.
    """
    destination = Path(destination)
    _refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.parent / f".{destination.name}.staging-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        reached("staging made")
        yield staging
        _flush_tree(staging)
        reached("staging flushed")
        _refuse_existing(destination)  # rename would silently replace an empty folder
        staging.rename(destination)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if is_out_of_space(error):
            takes, free = "" if need is None else f"it needs about {amount(need)}, ", shutil.disk_usage(destination.parent).free
            raise UserError(
                f"{destination}: no space left to save it: {takes}{amount(free)} are free on that disk (a "
                "limit on the size of files counts, too); nothing of it stays, checkpoints before it are whole; make room, then --resume"
            ) from None
        raise
    reached("renamed")
    _flush(destination.parent)


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: exists already; a checkpoint is never overwritten, choose another directory")


def _flush_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _flush(Path(folder) / name)
        _flush(Path(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model_directory(
    destination: Path | str,
    model: PreTrainedModel | RewardModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    *,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write model, tokenizer, model card and manifest into a new directory, all or nothing; returns the destination.

    `model` is a transformers model, a peft model over one (merged weights are saved, the adapter beside them in `adapter/`) or a
    `RewardModel`. The manifest's `files`, `readout` and `is_encoder_decoder` are filled in here. `extra(staging)` may add files
    (a value head, a training state). Raises UserError where the destination exists.
    """
    from common.lora import is_lora, merged_copy, save_adapter

    destination = Path(destination)
    with atomic_directory(destination, checkpoint_bytes(model)) as staging:
        if is_lora(model):
            save_adapter(model, staging / ADAPTER_FOLDER)
            plain = merged_copy(model)
        else:
            plain = model
        _write_weights(plain, tokenizer, staging)
        reached("weights written")
        tokenizer.save_pretrained(staging)
        if extra is not None:
            extra(staging)
            reached("state written")
        facts = {"files": _file_records(staging), "is_encoder_decoder": bool(plain.config.is_encoder_decoder)}
        if hasattr(plain, "readout_settings"):
            facts["readout"] = plain.readout_settings.model_dump()
        complete = manifest.model_copy(update=facts)
        (staging / CARD).write_text(_card_of(staging, complete, destination.name), encoding="utf-8")
        (staging / MANIFEST).write_text(complete.model_dump_json(indent=2) + "\n", encoding="utf-8")
        reached("manifest written")
    return destination


def _card_of(folder: Path, manifest: Manifest, name: str) -> str:
    tokenizer_class = "PreTrainedTokenizerFast" if has_plain_tokenizer(folder) else "AutoTokenizer"
    return model_card(manifest, name, _loading_class(folder), tokenizer_class)


def record_metrics(directory: Path, metrics: Mapping[str, float]) -> None:
    """Put figures that were measured after a checkpoint was written into its manifest and card; without a manifest nothing happens."""
    manifest = read_manifest(directory)
    if manifest is not None:
        complete = manifest.model_copy(update={"metrics": dict(metrics)})
        write_text_atomically(directory / CARD, _card_of(directory, complete, directory.name))
        write_text_atomically(directory / MANIFEST, complete.model_dump_json(indent=2) + "\n")


def _write_weights(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from common.models.load import quiet

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    # Where pad must equal EOS the config names no pad: transformers would search the last token by comparing ids and, for some
    # architectures, freeze the embedding of EOS.
    model.config.pad_token_id = pad if pad != eos else None
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = pad
    with quiet():
        model.save_pretrained(folder)


def _loading_class(folder: Path) -> str:
    architecture = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "AutoModelForSequenceClassification"
    if (folder / "readout.safetensors").exists():
        return "AutoModel"
    return "AutoModelForSeq2SeqLM" if architecture.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"


def has_plain_tokenizer(folder: Path) -> bool:
    """Whether a directory's tokenizer is what its tokenizer.json says and nothing else, such as one trained by us."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    declared = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return declared in {"TokenizersBackend", "PreTrainedTokenizerFast"}


def _file_records(folder: Path) -> dict[str, FileRecord]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in {MANIFEST, CARD})
    return {path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=file_sha256(path)) for path in files}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_card(manifest: Manifest, name: str, loading_class: str, tokenizer_class: str) -> str:
    """A short README.md: what the model is, how to load it, the figures it was saved with."""
    kinds = {
        "sft": "a question-answering model after supervised fine-tuning",
        "reward_classification": "a reward model trained on preferences (Bradley-Terry)",
        "reward_regression": "a reward model trained on scores",
        "ppo": "a question-answering model after PPO against a reward model",
    }
    lines = ["---", "library_name: transformers", f"tags: [rlhf, {manifest.stage}]", "---", "", f"# {name}", ""]
    lines += [f"This is {kinds[manifest.stage]}.", "", "```python", f"from transformers import {loading_class}, {tokenizer_class}", ""]
    lines += [f'model = {loading_class}.from_pretrained("PATH")', f'tokenizer = {tokenizer_class}.from_pretrained("PATH")', "```", ""]
    lines.append(f"Prompt format `{manifest.prompt_format}`; trained on at most {manifest.max_length} tokens.")
    if manifest.is_reward_model and loading_class == "AutoModel":
        lines.append("Load it with `common.models.reward.RewardModel.load`: transformers alone reads the backbone without the score.")
    if manifest.score_transform is not None and manifest.score_transform.name != "none":
        lines.append(f"Raw scores are `{manifest.score_transform.name}`-transformed; `manifest.json` holds what undoes it.")
    if manifest.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {metric} | {value:.4g} |" for metric, value in sorted(manifest.metrics.items())]
    lines += ["", f"Written {manifest.created or 'at an unknown time'}, commit {manifest.git_commit or 'unknown'}."]
    return "\n".join(lines) + "\n"


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_manifest(directory: Path | str) -> Manifest | None:
    """The manifest of a directory; None where it has none (a hub model, say). Raises UserError where it cannot be read."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}; the directory is damaged") from None
    if manifest.format_version > FORMAT_VERSION:
        raise UserError(f"{path}: format_version {manifest.format_version} is newer than this code's {FORMAT_VERSION}; update the code")
    return manifest


def verify_directory(directory: Path | str, *, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint directory, one line per problem; empty when it is whole.

    Compares every file with the manifest: presence, size and, with `checksums`, SHA-256.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return list(error.problems)
    if manifest is None:
        return [f"{directory}: no {MANIFEST}"]
    problems = []
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {record.size}")
        elif checksums and file_sha256(path) != record.sha256:
            problems.append(f"{path}: content differs from its checksum")
    return problems
