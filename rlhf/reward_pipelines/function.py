"""A Python function as part of a reward: found by its path, called with what its signature asks for, its result checked.

    def reward(prompts, responses):                      # lists of str
        return [float("thank" in response) for response in responses]

Other names that a function may ask for: `completions` (the same as `responses`, as trl's reward functions call them), `contexts`,
`ended`, and any other column of the data; a function with `**kwargs` gets all columns.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError
from rlhf.reward_pipelines.part import Answers, RewardPart

_SHOWN_CHARACTERS = 60
_ANSWER_NAMES = ("responses", "completions")


class AnswerError(UserError):
    """What is wrong with the value of one answer, number `row` of those given."""

    def __init__(self, problem: str, row: int) -> None:
        super().__init__(problem)
        self.row = row


class PythonFunction(RewardPart):
    """Values that a user's function returns; whatever it does wrong is a `UserError` of one line that names it."""

    def __init__(self, name: str, path: str, function: Callable[..., Any], timeout_s: float | None = None) -> None:
        super().__init__(name)
        self.path = path
        self.function = function
        self.timeout_s = timeout_s

    def values(self, answers: Answers, components: dict[str, list[float]]) -> list[float]:
        arguments = _arguments(self.path, self.function, answers)
        return _checked(self.path, self._call(arguments, len(answers.responses)), answers)

    def _call(self, arguments: Mapping[str, Any], count: int) -> Any:
        outcome: list[Any] = []
        failure: list[Exception] = []

        def run() -> None:
            try:
                outcome.append(self.function(**arguments))
            except Exception as error:  # a user's function may raise anything
                failure.append(error)

        if self.timeout_s is None:
            run()
        else:
            # a daemon: a call that never returns must not keep the process from ending
            thread = threading.Thread(target=run, daemon=True, name=f"reward function {self.path}")
            thread.start()
            thread.join(self.timeout_s)
            if thread.is_alive():
                raise UserError(f"reward function {self.path} took longer than timeout_s {self.timeout_s:g} for {count} answers")
        if failure:
            raise UserError(f"reward function {self.path} failed on {count} answers: {_described(failure[0])}") from failure[0]
        return outcome[0]


def load_function(path: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names. Raises UserError where there is none, or no import succeeds.

    Configs hold files as absolute paths: relative ones count from the stage folder, on the command line from the working directory.
    """
    place, separator, name = path.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise UserError(f"reward function {path}: expected module:function or file.py:function")
    module = _load_file(path, Path(place).expanduser()) if place.endswith(".py") else _load_module(path, place)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise UserError(f"reward function {path}: no function {name}" + (f", there is {', '.join(there)}" if there else ""))
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward function {path}: is async, expected a plain function")
    return function


def _load_file(path: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"reward function {path}: no such file")
    content = file.read_bytes()
    # the same content is imported once; a changed file is another module
    name = f"reward_function_{file.stem}_{hashlib.sha256(str(file).encode() + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        # Compiled here, since cached bytecode takes a file changed within a second, at the same size, for the old one.
        exec(compile(content, str(file), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"reward function {path}: cannot be imported: {_described(error)}") from error
    return module


def _load_module(path: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise UserError(f"reward function {path}: cannot be imported: {_described(error)}") from error
        raise UserError(f"reward function {path}: no module {place} (for a file write its path: {place.split('.')[-1]}.py:…)") from None
    except Exception as error:
        raise UserError(f"reward function {path}: cannot be imported: {_described(error)}") from error


def check_signature(path: str, function: Callable[..., Any], columns: Iterable[str]) -> None:
    """Raise UserError where a function asks for what neither a prompt, an answer nor these columns of the data give."""
    _check_signature(path, function, [*columns, "prompts", "contexts", "ended", *_ANSWER_NAMES])


def _check_signature(path: str, function: Callable[..., Any], available: Collection[str]) -> list[inspect.Parameter]:
    """The parameters that take an argument by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"reward function {path}: its parameters cannot be read; wrap it in a def") from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.name not in available and p.default is p.empty]
    missing += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if missing:
        raise UserError(f"reward function {path}: asks for {', '.join(missing)}, there are {', '.join(available)}")
    return named


def _arguments(path: str, function: Callable[..., Any], answers: Answers) -> dict[str, Any]:
    """What the function's signature asks for, by name."""
    columns = {key: None for row in answers.columns for key in row}
    available: dict[str, Any] = {column: [row.get(column) for row in answers.columns] for column in columns}
    contexts = [prompt.context for prompt in answers.prompts]
    available |= {"prompts": answers.questions, "contexts": contexts, "ended": list(answers.ended)}
    available |= {name: list(answers.responses) for name in _ANSWER_NAMES}

    named = _check_signature(path, function, available)
    chosen = {p.name: available[p.name] for p in named if p.name in available}
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        # answers under one name, the one that the function knows
        idle = set(_ANSWER_NAMES) - chosen.keys() if chosen.keys() & set(_ANSWER_NAMES) else set()
        chosen = {name: value for name, value in available.items() if name not in idle}
    return chosen


def _checked(path: str, result: Any, answers: Answers) -> list[float]:
    """One finite float per answer, or UserError."""
    count = len(answers.responses)
    if hasattr(result, "tolist"):
        result = result.tolist()  # tensors and arrays
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise UserError(f"reward function {path} returned {type(result).__name__}, expected a list of {count} numbers")
    if len(result) != count:
        raise UserError(f"reward function {path} returned {len(result)} numbers for {count} answers")
    values: list[float] = []
    for row, value in enumerate(result):
        number = _number(value)
        if number is None:
            got, question = _shown(repr(value)), _shown(answers.prompts[row].question)
            raise AnswerError(f"reward function {path} returned {got}, expected a finite number, for answer {row} (to {question!r})", row)
        values.append(number)
    return values


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _described(error: Exception) -> str:
    """Type, first line of the message, and the innermost place, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}" + (f": {text}" if text else "") + place
