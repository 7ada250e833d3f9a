"""What a command has to say before its run has a directory: printed at once, and kept for the run's log."""

from __future__ import annotations

_kept: list[str] = []


def begin_notes() -> None:
    """A new command begins: forget what an earlier one in this process said."""
    _kept.clear()


def say(note: str) -> None:
    """Print a note, and keep it until `common.runs.run_log` has a log to write it to."""
    print(f"note: {note}", flush=True)
    _kept.append(note)


def take_notes() -> list[str]:
    """The notes kept so far, which are kept no longer."""
    taken = list(_kept)
    _kept.clear()
    return taken
