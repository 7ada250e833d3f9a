"""The command line of every script: a mistake is one line and exit code 2, and an option's words are joined by `-` or `_` alike."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError. Options are declared with underscores; `--batch-size` is read as `--batch_size`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)

    def parse_known_args(  # type: ignore[override]  # the overloads tell namespaces of other types apart, which nothing here has
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        return super().parse_known_args(None if args is None else [self._with_underscores(text) for text in args], namespace)

    def _with_underscores(self, text: str) -> str:
        name, equals, value = text.partition("=")
        declared = "--" + name.removeprefix("--").replace("-", "_")
        return declared + equals + value if name.startswith("--") and declared in self._option_string_actions else text

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {' '.join(message.split())} (--help lists the options)")
