"""Tokenizing rows for a reward model, and what becomes of rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedConfig

from common.errors import UserError
from common.models.backbone import RewardInput, reward_inputs
from common.records import Prompt
from common.tokenization import Encoder

# More lines than this help nobody; the rest is counted.
SHOWN_PROBLEMS = 20


class RowEncoder:
    """Turns prompts and answers into ids. Unusable rows are collected, then refused all at once or dropped and counted."""

    def __init__(self, encoder: Encoder, config: PreTrainedConfig, unusable: Literal["error", "drop"] = "error") -> None:
        self.encoder = encoder
        self.config = config
        self.unusable = unusable
        self.problems: list[str] = []

    def encode(self, prompt: Prompt, answer: str, where: str = "") -> RewardInput:
        """Ids of one prompt and answer as the backbone takes them. Raises UserError where no token of the answer is left."""
        return reward_inputs(self.encoder, self.config, prompt, answer, where=where)

    @contextmanager
    def unusable_rows(self) -> Iterator[None]:
        """A UserError inside makes the row unusable instead of ending everything."""
        try:
            yield
        except UserError as error:
            self.problems.extend(error.problems)

    def finish(self, split: str) -> list[str]:
        """Raise UserError on unusable rows, or say how many were dropped; then what was cut, one line each."""
        problems, self.problems = self.problems, []
        if problems and self.unusable == "error":
            rest = len(problems) - SHOWN_PROBLEMS
            more = [f"and {rest} more unusable rows in {split}; data.unusable_rows: drop leaves them out"] if rest > 0 else []
            raise UserError(*problems[:SHOWN_PROBLEMS], *more)
        notes = [f"{split}: {len(problems)} unusable rows dropped, the first: {problems[0]}"] if problems else []
        notes += [f"{split}: {what}: {count}" for what, count in sorted(self.encoder.counts.items()) if count]
        self.encoder.counts.clear()
        return notes
