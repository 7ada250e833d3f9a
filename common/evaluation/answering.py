"""A model that answers rows: loaded once, then asked in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.errors import UserError
from common.evaluation.config import GenerationTestConfig
from common.evaluation.generate import Answer, generate_answers
from common.evaluation.rows import EvaluationRow
from common.models.kinds import positions_of
from common.models.load import check_vocabulary, load_generator, load_tokenizer
from common.prompts import PromptFormat
from common.schema import GenerateParams
from common.tokenization import Encoder

_UNLIMITED = 1_000_000


def pick_device(cuda: bool) -> torch.device:
    """The device that `cuda` asks for. Raises UserError where there is no GPU that torch can use."""
    if cuda and not torch.cuda.is_available():
        raise UserError("cuda: true, but this machine has no GPU that torch can use; set cuda: false")
    return torch.device("cuda" if cuda else "cpu")


class Answerer:
    """A generator with its tokenizer, on its device."""

    def __init__(
        self,
        name: str,
        *,
        prompt_format: PromptFormat,
        params: GenerateParams,
        seed: int,
        batch_size: int,
        device: torch.device,
        max_prompt_length: int | None = None,
        truncate_prompt: bool = True,
        pad_to_maximum: bool = False,
        use_cache: bool = True,
        model_dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        """`max_prompt_length`: tokens; default: what the model's positions leave beside an answer."""
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        self.model = load_generator(name, dtype=model_dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        check_vocabulary(self.tokenizer, self.model, name)
        self.params, self.seed, self.batch_size, self.device, self.use_cache = params, seed, batch_size, device, use_cache
        limit = max_prompt_length or self._room_for_prompt(name)
        self.pad_to = limit if pad_to_maximum else None
        self.encoder = Encoder(
            self.tokenizer,
            prompt_format=prompt_format,
            max_length=limit,
            truncate_prompt=truncate_prompt,
            is_encoder_decoder=self.model.config.is_encoder_decoder,
        )

    @classmethod
    def from_config(cls, name: str, config: GenerationTestConfig, prompt_format: PromptFormat) -> Answerer:
        """As a test config says; `name` is the model. The GPU is looked for before anything is loaded."""
        data = config.data
        return cls(
            name,
            prompt_format=prompt_format,
            params=config.generate_params,
            seed=config.seed,
            batch_size=1 if data.padding is False else data.batch_size,
            device=pick_device(config.cuda),
            max_prompt_length=data.max_prompt_length,
            truncate_prompt=data.truncate_prompt,
            pad_to_maximum=data.padding == "max_length",
            use_cache=config.test_params.use_cache,
            model_dtype=config.model_dtype,
            trust_remote_code=config.trust_remote_code,
        )

    def answer(self, rows: Sequence[EvaluationRow], numbers: Sequence[int], on_batch: Callable[[int], None] | None = None) -> list[Answer]:
        """Answers in the rows' order; `numbers` are the rows' own, of which sampling noise is a function."""
        prompts = self.encoder.prompts([row.prompt for row in rows], [row.where for row in rows])
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            self.params,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            use_cache=self.use_cache,
            rows=numbers,
            pad_to=self.pad_to,
            on_batch=on_batch,
        )

    def _room_for_prompt(self, name: str) -> int:
        positions = positions_of(self.model.config)
        if positions is None:
            return _UNLIMITED
        room = positions if self.model.config.is_encoder_decoder else positions - self.params.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens {self.params.max_new_tokens} leaves no room for a prompt in the {positions} positions of {name}"
            )
        return room
