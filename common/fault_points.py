"""Names for the moments at which a crash would hurt most, so that tests can crash there. Nothing happens where nobody listens."""

from __future__ import annotations

from collections.abc import Callable

on_point: Callable[[str], None] | None = None
"""Called with the name of each point that is reached."""


def reached(point: str) -> None:
    """Tell whoever listens that this point of a save is reached."""
    if on_point is not None:
        on_point(point)
