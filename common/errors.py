"""Errors that a user can mend, and how a script ends on them: one line each on stderr, exit code 2."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

A = TypeVar("A")
B = TypeVar("B")
EXIT_USER_ERROR = 2
LEADER_SPEAKS_S = 10.0
"""How long a process that follows another, and cannot ask it, lets that one tell an error which both may have found."""


class UserError(ValueError):
    """One or more problems in what the user gave us, each a single line that says what to change."""

    def __init__(self, *problems: str) -> None:
        assert problems, "a UserError needs at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def both(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """What two checks give that do not need each other. Raises one UserError with the problems of both."""
    problems: list[str] = []
    results: list[Any] = []
    for check in (first, second):
        try:
            results.append(check())
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return results[0], results[1]


_located: Callable[[str], str] | None = None

_OF_A_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""What says that a path is not what it has to be, or not this user's."""


def locate_problems(located: Callable[[str], str]) -> None:
    """Let `run_main` print `located(problem)` from now on: a config was read, and it is known where each setting stands."""
    global _located
    _located = located


def user_problems(error: BaseException) -> tuple[str, ...] | None:
    """What the user can mend of an error, a line each; None where it is no such error."""
    from common.disk import is_out_of_space  # it raises errors of this module

    if isinstance(error, UserError):
        return error.problems
    if isinstance(error, OSError) and is_out_of_space(error):
        return (f"{error.filename or 'output'}: {error.strerror}; make room, then --resume",)
    if isinstance(error, OSError) and error.errno in _OF_A_PLACE and error.filename is not None:
        return (f"{error.filename}: {error.strerror}",)
    return None


def run_main(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a script's `main(argv)` and exit with its code; a `UserError` becomes lines on stderr and exit code 2."""
    from common.followers import end_with_leader, follows, launched, may_be_told_by_leader, tells_errors  # it raises errors of this module

    if follows() or launched():
        end_with_leader()
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")) if follows() else contextlib.nullcontext():
            code = main(sys.argv[1:])
    except (UserError, OSError) as error:
        problems = user_problems(error)
        if problems is None:
            raise
        if may_be_told_by_leader():
            time.sleep(LEADER_SPEAKS_S)  # it finds the same, says so, and the launcher ends this process
        sys.stdout.flush()
        for problem in problems if tells_errors() else ():
            print(f"error: {problem if _located is None else _located(problem)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt as interrupt:  # raised with a text where something is kept
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
