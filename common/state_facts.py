"""What a cache of hidden states and the rows in it go by: digests over everything that the states depend on."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

if TYPE_CHECKING:
    from common.models.backbone import RewardInput

FORMAT_VERSION = 1
DIGEST_BYTES = 16

StateDtype = Literal["float32", "bfloat16"]
TORCH_DTYPES: dict[StateDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED: dict[StateDtype, str] = {"float32": "<f4", "bfloat16": "<u2"}  # numpy has no bfloat16
Digests = NDArray[np.bytes_]


@dataclass(frozen=True)
class StateFacts:
    """Everything that the states of a row depend on beside its token ids, which hold text, prompt format and lengths."""

    weights: str
    """Digest over names, types, shapes and values of the transformer's weights."""
    config: str
    """Its configuration, in JSON."""
    code: str
    """Versions and digests of the code that computes it."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    part: str
    """Part of the transformer that the states are of."""
    token: str
    """Which token of a row they belong to, or `all`."""
    layers: int
    """States of so many layers, the last one last."""
    hidden_size: int
    computed_in: str = "float32"
    """Type that the transformer computes in."""
    dtype: StateDtype = "float32"
    """Type that the states are kept in."""
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> str:
        """Name of the cache's folder: it differs where any of the facts does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the states of one token."""
        return self.layers * self.hidden_size * np.dtype(STORED[self.dtype]).itemsize


def row_digests(rows: Sequence[RewardInput]) -> Digests:
    """What rows go by, (R,) of 16 bytes: equal for equal token ids in the same parts of the model."""
    found = np.empty(len(rows), dtype=f"S{DIGEST_BYTES}")
    for number, row in enumerate(rows):
        ids = array("q", row.input_ids)
        digest = hashlib.blake2b(len(ids).to_bytes(8, "little") + ids.tobytes(), digest_size=DIGEST_BYTES)
        if row.decoder_input_ids is not None:
            digest.update(array("q", row.decoder_input_ids).tobytes())
        found[number] = digest.digest()
    return found


def code_digest(model: nn.Module) -> str:
    """Versions of torch and transformers, and a digest of the file that the model's class comes from (it may be the user's own)."""
    import transformers

    source = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    own = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else ""
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {type(model).__qualname__} {own}"
