"""Whether a run has room for its texts, and whether a model can be built from a `model_init` section, before anything is written."""

from __future__ import annotations

from common.errors import UserError
from common.model_source import RELATIVE_POSITIONS, ModelSource, positions_in
from common.prompts import PromptFormat, render_prompt
from common.record_types import Prompt
from common.schema import ModelInit

# `Question`, `:`, a space, a line break, `Answer`, `:`: no merge of the tokenizer that a fresh model gets joins them.
FRESH_FRAME = 6


def check_fresh_length(init: ModelInit, max_length: int, setting: str) -> None:
    """Refuse `max_length` (called `setting`) beyond the positions of a fresh model, or too short for a prompt; torch-free."""
    positions = positions_in({**init.config, "model_type": init.model_type})
    if positions is not None and max_length > positions:
        raise UserError(f"{setting} {max_length} exceeds the {positions} positions of model_init.config")
    relative = init.model_type in RELATIVE_POSITIONS  # an encoder-decoder, whose answer begins a sequence of its own
    _check_frame(FRESH_FRAME, max_length, setting, answer=not relative)


def check_room(source: ModelSource, limit: int, prompt_format: PromptFormat, setting: str, *, answer: bool = True) -> None:
    """Refuse `limit` tokens that the text around a question fills; torch-free, so a chat or a slow tokenizer is measured later.

    answer: an answer follows within the same limit (never for encoder-decoders).
    """
    file = source.directory / "tokenizer.json" if source.directory is not None else None
    if prompt_format != "qa" or file is None or not file.is_file():
        return
    from tokenizers import Tokenizer

    tokens = len(Tokenizer.from_file(str(file)).encode(render_prompt(Prompt("")), add_special_tokens=False).ids)
    _check_frame(tokens, limit, setting, answer=answer and not source.is_encoder_decoder)


def _check_frame(tokens: int, limit: int, setting: str, *, answer: bool) -> None:
    if limit < tokens + answer:
        raise UserError(f"{setting}: got {limit}, expected at least {tokens + answer}: the prompt format alone takes {tokens} tokens")


class _Vocabulary:
    """What of a tokenizer a model's configuration needs, before there is one."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def check_buildable(init: ModelInit, max_length: int, *, writes_text: bool) -> None:
    """Build the model without memory for its weights, and throw it away. Raises UserError where `model_init` describes none.

    Imports torch and transformers, which know their model types: seconds, so it comes after what can be checked without.
    """
    import torch

    from common.models.load import build_backbone, build_generator, check_tokenizer_size

    check_tokenizer_size(init.vocab_size)
    with torch.device("meta"):
        (build_generator if writes_text else build_backbone)(init, _Vocabulary(init.vocab_size), max_length, 0)  # type: ignore[arg-type]
