"""Prompts of any kind that a user has, as ids with the texts and columns that a reward sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.file_records import FileRecords
from common.notes import say
from common.prompts import PromptFormat
from common.record_types import Prompt, PromptRecord
from common.row_formats import RowReader
from common.row_parser import read_row
from common.token_rows import StoredRows, TokenCache, TokenIds, stored_rows
from common.tokenization import Encoder

_QUERY = "query"
"""The column that holds a prompt's text in the data sets of classic scripts."""


@dataclass(frozen=True)
class EncodedPrompt:
    """What the policy reads, and what a reward sees of it."""

    ids: list[int]
    record: PromptRecord


def encode(
    encoder: Encoder, records: Sequence[PromptRecord], split: str, *, remedy: str, cache: TokenCache | None = None
) -> Sequence[EncodedPrompt]:
    """Prompts within the encoder's budget; says what was cut, and `remedy` with it. `cache`: for ids of records that stay in their file."""
    prompts: Sequence[EncodedPrompt]
    if cache is not None and isinstance(records, FileRecords):
        prompts = stored_rows(_stored_prompt, encoder, records, cache, split)
    else:
        ids = encoder.prompts([record.prompt for record in records], [record.where for record in records])
        prompts = [EncodedPrompt(row, record) for row, record in zip(ids, records, strict=True)]
    for note in encoder.take_notes(split, remedy=remedy):
        say(note)
    return prompts


def _stored_prompt(ids: TokenIds, records: Sequence[PromptRecord], row: int) -> EncodedPrompt:
    return EncodedPrompt(ids.prompt(row), records[row])


def as_prompts(
    prompts: Iterable[Any], tokenizer: Any, *, name: str, prompt_format: PromptFormat, max_length: int, is_encoder_decoder: bool = False
) -> Sequence[EncodedPrompt]:
    """Encoded prompts from questions (`str`, `Prompt`), rows of a data file (`{"prompt": …}`) or ids, which are taken as they are.

    Ids: a tensor, a list of ints, or a row with `input_ids`, whose text is its `query` or `prompt`, else the decoded ids. What else a row
    holds reaches reward functions as columns. Raises UserError with a line for each row that cannot be read.
    """
    if isinstance(prompts, StoredRows):
        return prompts
    problems: list[str] = []
    records: list[PromptRecord] = []
    known: dict[int, list[int]] = {}
    for number, item in enumerate(prompts):
        where = f"{name} {number}"
        if isinstance(item, EncodedPrompt):
            known[number], record = item.ids, item.record
        elif isinstance(item, str | Prompt):
            record = PromptRecord(Prompt(item) if isinstance(item, str) else item, {}, where)
        elif isinstance(item, Mapping) and "input_ids" not in item:
            record = _read(dict(item), where, problems)
        else:
            row = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
            known[number] = as_ids(row.pop("input_ids"))
            text = next((row.pop(key) for key in (_QUERY, "prompt") if isinstance(row.get(key), str)), None)
            if text is None:
                text = tokenizer.decode(known[number], skip_special_tokens=True)
            record = PromptRecord(Prompt(text), row, where)
        records.append(record)
    if problems:
        raise UserError(*problems)
    texts = [record for number, record in enumerate(records) if number not in known]
    encoded: Sequence[EncodedPrompt] = []
    if texts:
        encoder = Encoder(tokenizer, prompt_format=prompt_format, max_length=max_length, is_encoder_decoder=is_encoder_decoder)
        encoded = encode(encoder, texts, name, remedy="raise max_prompt_length or lower max_new_tokens")
    rest = iter(encoded)
    return [EncodedPrompt(known[number], record) if number in known else next(rest) for number, record in enumerate(records)]


def _read(row: dict[str, Any], where: str, problems: list[str]) -> PromptRecord:
    form, wrong = RowReader("prompt").check_keys(row, row)
    if form is not None and not wrong:
        record, found = read_row(form, "prompt", row, where)
        wrong = [*found.errors, *found.unusable]
        if isinstance(record, PromptRecord):
            return record
    problems.extend(f"{where}: {problem}" for problem in wrong)
    return PromptRecord(Prompt(""), {}, where)


def as_ids(tokens: Sequence[int] | Tensor) -> list[int]:
    """Token ids as a list of ints; a tensor of any shape is flattened. Raises ValueError for text."""
    if isinstance(tokens, str):
        raise ValueError(f"got the text {tokens!r}, expected token ids: tokenizer(text, return_tensors='pt').input_ids[0]")
    flat = tokens.reshape(-1).tolist() if isinstance(tokens, Tensor) else tokens
    return [int(token) for token in flat]
