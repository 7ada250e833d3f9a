"""Out of memory, told as what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from common.errors import UserError

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
LIGHTNING_REMEDY = (
    "lower data.batch_size (and raise trainer.params.accumulate_grad_batches) or data.max_length, set "
    "model_params.gradient_checkpointing: true or trainer.params.precision: bf16-mixed, or train model_params.lora"
)


@contextlib.contextmanager
def telling_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn running out of memory inside, of a GPU or of the machine, into a UserError of one line. `remedy`: the settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"out of memory ({said}): {remedy}; checkpoints before it are whole, and with memory freed --resume goes on from the last"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _WORDS)
