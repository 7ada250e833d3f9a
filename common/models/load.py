"""Load or build tokenizers and transformers models, the same way in every stage.

Weights load as float32 unless told otherwise (transformers 5 keeps the file's type), from safetensors where there are any, else from
a pickle that torch reads with `weights_only=True`; a missing weight is an error, never a fresh random one. Models come with the faster
forms of their parts that `common.models.fused` has; its `set_fused(model, False)` takes them out again.
"""

from __future__ import annotations

import difflib
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging as transformers_logging

from common.checkpoint import has_plain_tokenizer, read_manifest, tokenizer_fingerprint
from common.errors import UserError
from common.model_source import check_contents
from common.models.fused import set_fused
from common.models.kinds import backbone_kind, positions_of
from common.models.modes import LAYER_DROPOUT, dropout_attributes
from common.schema import ModelInit

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
SMALLEST_TOKENIZER = 256 + 2
# Under these names vocabularies hold a padding token that their configuration does not always announce.
_PAD_NAMES = (PAD_TOKEN, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
# Transformers 5 keeps unknown keys of a configuration silently; these are the ones every configuration takes.
_COMMON_CONFIG_KEYS = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "tie_word_embeddings", "use_cache"}
)
_COUNTS = ("_size", "_layers", "_heads", "_layer", "_head", "_embd", "d_model", "d_ff", "d_kv")
"""Ends of names of settings that count something."""


# --- tokenizers ------------------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and see to it that it has an EOS and a padding token.

    Padding is a token of its own where the vocabulary holds one, else EOS (`pad_is_eos` tells). Encoders of BERT's kind end in their
    separator and begin with their class token, which serve as EOS and BOS. Raises UserError where nothing can end an answer.

    A directory with a manifest is checked against its fingerprint; a tokenizer that splits text differently is warned of.
    """
    check_contents(name, trust_remote_code=trust_remote_code)
    manifest = read_manifest(name)
    # For some model types (qwen2) AutoTokenizer replaces the rules in tokenizer.json by that type's own, whatever the directory says.
    auto = PreTrainedTokenizerFast if manifest is not None and has_plain_tokenizer(Path(name)) else AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers and tokenizers raise at files that somebody else wrote
        raise UserError(f"no tokenizer can be loaded from {name}: {_first_line(error)}") from None
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token, so no answer could ever end")
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((pad for pad in _PAD_NAMES if pad in vocabulary), tokenizer.eos_token)
    if manifest is not None and tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        logger.warning("%s: its tokenizer is not the one its manifest records; files were changed, or versions differ", name)
    return tokenizer


def pad_is_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether padding can be told from EOS by position only."""
    return bool(tokenizer.pad_token_id == tokenizer.eos_token_id)


def give_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> bool:
    """Where padding is EOS, add a padding token of its own, growing the model's embeddings if needed; returns whether it did.

    Reward models need it: `AutoModelForSequenceClassification` finds the last token by comparing ids with the padding id.
    """
    if not pad_is_eos(tokenizer):
        return False
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        with torch.no_grad():
            embeddings.weight[tokenizer.pad_token_id].zero_()  # masked everywhere: its value is never read
    model.config.pad_token_id = tokenizer.pad_token_id
    return True


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for (the reverse, spare embeddings, is common)."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and len(tokenizer) > embeddings.num_embeddings:
        raise UserError(f"the tokenizer has {len(tokenizer)} entries, but {name} has embeddings for {embeddings.num_embeddings}")


def check_tokenizer_size(vocab_size: int) -> None:
    """Refuse a size that `train_tokenizer` could not reach."""
    if vocab_size < SMALLEST_TOKENIZER:
        raise UserError(f"model_init.vocab_size {vocab_size} is too small: 256 bytes and 2 special tokens need {SMALLEST_TOKENIZER}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: `<pad>` is 0, `<eos>` is 1, then the 256 bytes, then merges. The result is deterministic.

    Any text comes back from its ids unchanged. Digits are tokens of their own, so that a number never seen is read digit by digit.
    Special strings inside a text are plain text, in training and afterwards. No BOS. Train it on what the model will read: rendered
    prompts and answers, not their bare columns. Raises UserError below 258 entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_tokenizer_size(vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        # Words, numbers and punctuation are apart, so no merge can spell a special token.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD_TOKEN, EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


# --- models ----------------------------------------------------------------------------------------------------------------------


def load_generator(
    name: str, *, dtype: Dtype = "float32", trust_remote_code: bool = False, weights: Sequence[Path] = ()
) -> PreTrainedModel:
    """Load a model that writes text: `AutoModelForSeq2SeqLM` for encoder-decoders, else `AutoModelForCausalLM`.

    Sampling defaults that came with the weights are dropped: what a config does not say is not done. The model is in eval mode.
    `weights`: files with all of them, which are read instead of the model's own.
    """
    config = _load_config(name, trust_remote_code)
    if any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or []):
        raise UserError(f"{name} is a reward model; expected a model that writes text")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _load_over(auto, config, read_state(weights), dtype, weights) if weights else _load(auto, name, dtype, trust_remote_code)
    _reset_generation_config(model)
    return model


def load_backbone(name: str, *, dtype: Dtype = "float32", trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the transformer without an output layer (`AutoModel`), from a directory of any head, for a reward model or critic."""
    return _without_pooler(_load(AutoModel, name, dtype, trust_remote_code))


def load_sequence_classifier(
    name: str, *, dtype: Dtype = "float32", trust_remote_code: bool = False, weights: Sequence[Path] = ()
) -> tuple[PreTrainedModel, Tensor]:
    """Backbone and head weights (1, D) of a causal sequence classifier with one output and no bias.

    `weights`: files with all of them, the head as `score.weight` or `value_head.weight`, read instead of the model's own.
    """
    if weights:
        config = _load_config(name, trust_remote_code)
        config.num_labels = 1
        state = read_state(weights)
        if "value_head.weight" in state:
            state["score.weight"] = state.pop("value_head.weight")
            state.pop("value_head.bias", None)  # it is the same for every answer
        model = _load_over(AutoModelForSequenceClassification, config, state, dtype, weights)
    else:
        model = _load(AutoModelForSequenceClassification, name, dtype, trust_remote_code)
    head = getattr(model, "score", None)
    if backbone_kind(model.config) != "causal" or not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise UserError(
            f"{name} is a {type(model).__name__} with {model.config.num_labels} outputs; "
            "expected a causal model with one score and no bias, or a directory written by train_reward.py"
        )
    return getattr(model, model.base_model_prefix), head.weight.detach()


def build_generator(model_init: ModelInit, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> PreTrainedModel:
    """A text generator of `model_init` with fresh float32 weights that depend on `seed` alone.

    The vocabulary and special ids are the tokenizer's; positions default to `max_length`. Raises UserError for a model type that
    writes no text and for a configuration that transformers refuses.
    """
    config = build_config(model_init, tokenizer, max_length)
    kind = backbone_kind(config)
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if kind == "encoder_decoder" else MODEL_FOR_CAUSAL_LM_MAPPING
    if kind == "encoder" or type(config) not in mapping:
        raise UserError(f"model_init.model_type {model_init.model_type} writes no text; it can only be a reward model's backbone")
    auto = AutoModelForSeq2SeqLM if kind == "encoder_decoder" else AutoModelForCausalLM
    model = _build(auto, config, seed)
    _reset_generation_config(model)
    return model


def build_backbone(model_init: ModelInit, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> PreTrainedModel:
    """As `build_generator`, without an output layer; encoders are welcome."""
    config = build_config(model_init, tokenizer, max_length)
    if type(config) not in MODEL_MAPPING:
        raise UserError(f"model_init.model_type {model_init.model_type} has no plain transformer in this version of transformers")
    return _without_pooler(_build(AutoModel, config, seed))


def build_config(model_init: ModelInit, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedConfig:
    """The configuration object of `model_init`. Raises UserError on an unknown type or key, or on values that do not fit."""
    model_type = model_init.model_type
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; expected one of transformers' model types, such as gpt_neo or llama"
        raise UserError(f"model_init.model_type: got {model_type}{hint}")
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    values = dict(model_init.config)
    defaults = config_class()
    if not hasattr(defaults, "vocab_size"):
        raise UserError(f"model_init.model_type {model_type} reads no text")
    known = set(defaults.to_dict()) | set(config_class.attribute_map) | _COMMON_CONFIG_KEYS
    problems = []
    for key in sorted(values.keys() - known):
        close = difflib.get_close_matches(key, sorted(known), n=1)
        problems.append(f"model_init.config.{key}: {model_type} has no such setting" + (f"; did you mean {close[0]}?" if close else ""))
    for key, value in values.items():
        default = getattr(defaults, key, None)
        if key in known and key.endswith(_COUNTS) and isinstance(default, int) and (not isinstance(value, int) or value < min(1, default)):
            problems.append(f"model_init.config.{key}: got {value}, expected a whole number >= {min(1, default)}")
    if problems:
        raise UserError(*problems)
    if values.get("vocab_size", len(tokenizer)) != len(tokenizer):
        raise UserError(
            f"model_init.config.vocab_size {values['vocab_size']} differs from the tokenizer's {len(tokenizer)} entries; "
            "set model_init.vocab_size instead"
        )
    values.update(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    values.setdefault("bos_token_id", tokenizer.bos_token_id)
    if defaults.is_encoder_decoder:
        values.setdefault("decoder_start_token_id", tokenizer.pad_token_id)
    elif hasattr(defaults, "max_position_embeddings"):
        position_keys = {"max_position_embeddings", config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")}
        if not position_keys & values.keys():
            values["max_position_embeddings"] = max_length
    if model_type == "gpt_neo" and "attention_types" not in values:
        layers = values.get("num_layers", values.get("num_hidden_layers", defaults.num_layers))
        values["attention_types"] = alternating_attention(layers)
    try:
        config = config_class(**values)
    except Exception as error:  # huggingface_hub's strict dataclasses raise types of their own
        raise UserError(f"model_init.config: {model_type} refuses it: {_last_line(error)}") from None
    positions = positions_of(config)
    if positions is not None and not defaults.is_encoder_decoder and positions < max_length:
        raise UserError(f"data.max_length {max_length} exceeds the {positions} positions of model_init.config")
    return config


def alternating_attention(layers: int) -> list[list[Any]]:
    """GPT-Neo's `attention_types`: global and local attention in turn, starting with global."""
    pattern: list[list[Any]] = [[["global", "local"], layers // 2]] if layers > 1 else []
    return [*pattern, [["global"], 1]] if layers % 2 else pattern


def set_dropout(model: nn.Module, p: float) -> int:
    """Set every dropout probability of a model, and its configuration's; returns how many places were set.

    Whole layers are left out no more where `p` is 0, and as often as before elsewhere. Raises UserError where the model has none and `p` is
    positive: the setting could not take effect.
    """
    count = 0
    for module in model.modules():
        for name in dropout_attributes(module):
            if name != LAYER_DROPOUT or p == 0:
                setattr(module, name, p)
                count += 1
    config = getattr(model, "config", None)
    for name in config.to_dict() if isinstance(config, PreTrainedConfig) else ():
        if name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate")) and isinstance(getattr(config, name), (int, float)):
            setattr(config, name, p)
    if count == 0 and p > 0:
        raise UserError(f"model_params.dropout {p} has no effect: {type(model).__name__} has no dropout")
    return count


def read_state(files: Sequence[Path]) -> dict[str, Tensor]:
    """The weights in safetensors files or in pickles that hold nothing else, without the `module.` that DistributedDataParallel adds.

    Raises UserError where a file is damaged or holds something else.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch, pickle and safetensors raise at files that somebody else wrote
            raise UserError(f"{file}: no weights can be read from it: {_why_not_loaded(error)}") from None
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{file}: got {type(found).__name__}, expected names of weights and their tensors")
        state |= found
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Read a module's weights from a safetensors file: those named `prefix…`, where there are any, or all.

    Raises UserError where the file is damaged, or of another module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # no mapping
            weights = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        if weights or not prefix:
            module.load_state_dict(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no safetensors can be read from it: {_first_line(error)}; the directory is damaged") from None
    except RuntimeError as error:
        raise UserError(f"{path}: holds other weights than {type(module).__name__} has: {_last_line(error)}") from None


# --- details ---------------------------------------------------------------------------------------------------------------------


def _load_config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    check_contents(name, trust_remote_code=trust_remote_code)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return config
    except Exception as error:  # whatever transformers raises at a file that somebody else wrote
        raise UserError(f"no model can be loaded from {name}: {_first_line(error)}") from None


def _load(auto: Any, name: str, dtype: Dtype, trust_remote_code: bool) -> PreTrainedModel:
    check_contents(name, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            model, info = auto.from_pretrained(
                name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except Exception as error:  # whatever transformers, torch and safetensors raise at files that somebody else wrote
        raise UserError(f"no model can be loaded from {name}: {_why_not_loaded(error)}") from None
    _check_nothing_missing(info, name, model)
    return _fuse(model)


def _load_over(auto: Any, config: PreTrainedConfig, state: dict[str, Tensor], dtype: Dtype, files: Sequence[Path]) -> PreTrainedModel:
    """A model of `config` with the weights of `state`, which come from `files`."""
    names = ", ".join(map(str, files))
    mapping = auto._model_mapping
    if type(config) not in mapping:
        raise UserError(f"{names}: weights are loaded over a model of transformers' own types, got {config.model_type}")
    try:
        with quiet():
            model, info = mapping[type(config)].from_pretrained(
                None, config=config, state_dict=state, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # whatever transformers raises at weights that somebody else wrote
        raise UserError(f"{names}: cannot be loaded over {config.model_type}: {_first_line(error)}") from None
    for key, given, wanted in sorted(info["mismatched_keys"]):
        raise UserError(f"{names}: {key} is {tuple(given)}, but the base model has {tuple(wanted)}; are these weights of another model?")
    _check_nothing_missing(info, names, model)
    model.eval()
    return _fuse(model)


def _check_nothing_missing(info: Mapping[str, Any], name: str, model: PreTrainedModel) -> None:
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{name} lacks weights that {type(model).__name__} needs: {shown}")


def _build(auto: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with seeded(seed):
        try:
            model = auto.from_config(config, dtype=torch.float32)
        except (ValueError, RuntimeError, AssertionError) as error:  # e.g. heads that do not divide the hidden size
            raise UserError(f"model_init.config: {config.model_type} cannot be built: {_first_line(error)}") from None
    model.eval()
    return _fuse(model)


def _fuse(model: PreTrainedModel) -> PreTrainedModel:
    for note in set_fused(model):
        logger.info("%s", note)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU randomness from `seed` inside, as it was before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No bar per file and no report of missing weights while loading or saving: a missing weight is an error of ours."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """BERT's pooler feeds no readout; dropped, so that it neither saves, trains nor counts."""
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", None)  # noqa: B010  # a module attribute by type, which may be None by design
    return model


def _reset_generation_config(model: PreTrainedModel) -> None:
    old = model.generation_config
    ids = {name: getattr(old, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(**ids)


def _why_not_loaded(error: Exception) -> str:
    # torch's own words advise to load such a file without `weights_only`.
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return (
            "its pickle (.bin) holds more than weights, and was not run; take the model as safetensors, or convert it where you trust it: "
            "load it there and write it with save_pretrained"
        )
    if isinstance(error, (OSError, ValueError, RuntimeError, ImportError, SafetensorError)):
        return _first_line(error)
    return f"its files are damaged ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
