"""What tells two evaluated models apart, so that the CSV of one is never continued with answers of another."""

from __future__ import annotations

import hashlib
import json

from common.checkpoint import MANIFEST
from common.model_source import ModelSource


def model_identity(source: ModelSource) -> str:
    """A digest of the manifest (it holds the weights' checksums), else of size and time of the files; a hub model's name."""
    if source.directory is None:
        return source.name
    manifest = source.directory / MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.directory.iterdir()) if path.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
