"""Talk to a model in the terminal, or to two side by side; run directories, Hugging Face directories and hub models.

    python sft/ask.py MODEL [MODEL2] [--max_new_tokens 128] [--temperature 0.7]
    python sft/ask.py MODEL [MODEL2] "question"

One question per line, each on its own (no memory of earlier ones); /quit or the end of the input ends it. Works in a pipe, too.
A question on the command line is answered, and that is all. Answers are greedy (the likeliest token each time) unless sampling is asked
for by --sample, --temperature, --top_p or --seed.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # modules have one import name, whichever folder this runs from

from common.command_line import Parser
from common.devices import check_cuda
from common.errors import run_main
from common.model_source import ModelSource, check_model_source
from common.prompts import PromptFormat
from common.schema import GenerateParams

QUIT = "/quit"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if options.cuda:
        check_cuda("--cuda", "leave it out")
    names, question = _tell_question(options.models)
    sources = [_check(name, setting, options) for setting, name in zip(("MODEL", "MODEL2"), names, strict=False)]
    if options.validate:
        print(f"valid: {' and '.join(names)} can answer; nothing was asked")
        return 0
    talk(sources, options, sys.stdin if question is None else io.StringIO(question), sys.stdout)
    return 0


def talk(sources: Sequence[ModelSource], options: argparse.Namespace, lines: TextIO, out: TextIO) -> None:
    """Answer the questions of `lines`, one each, with every model."""
    from common.evaluation.answering import Answerer, pick_device
    from common.evaluation.rows import EvaluationRow
    from common.records import Prompt

    device = pick_device(options.cuda)
    answerers = [
        Answerer(
            source.name,
            prompt_format=_prompt_format(source, options),
            params=_params(options),
            seed=options.seed,
            batch_size=1,
            device=device,
            trust_remote_code=options.trust_remote_code,
        )
        for source in sources
    ]
    interactive = lines.isatty()
    ask = f" (ask, or {QUIT})" if interactive else ""
    print(f"{' | '.join(source.name for source in sources)}: {_described(options)}{ask}", file=out)
    number = 0
    while (question := _next_question(lines, out, interactive)) is not None:
        if not question:
            continue
        row = EvaluationRow(Prompt(question), "", f"question {number + 1}")
        if not interactive:
            print(f"> {question}", file=out)
        for place, answerer in enumerate(answerers, 1):
            (answer,) = answerer.answer([row], [number])
            label = f"{place}: " if len(answerers) > 1 else ""
            print(f"{label}{answer.text}{'' if answer.ended else ' […]'}", file=out, flush=True)
        number += 1


def _next_question(lines: TextIO, out: TextIO, interactive: bool) -> str | None:
    """The next line without space around it; None at the end of the input and at /quit."""
    if interactive:
        print("> ", end="", file=out, flush=True)
    line = lines.readline()
    return None if not line or line.strip() == QUIT else line.strip()


def _tell_question(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The models and the question, if there is one: the last of several words, where it is no path and no name could be."""
    *models, last = words
    if models and not Path(last).expanduser().exists() and (len(words) == 3 or not last.isascii() or re.search(r"[\s?!]", last)):
        return models, " ".join(last.split())
    return list(words), None


def _described(options: argparse.Namespace) -> str:
    if not options.sample:
        return "greedy answers"
    return f"sampled answers, temperature {options.temperature:g}, top_p {options.top_p:g}, seed {options.seed}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="model directory or hub name; a second one is asked the same")
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="tokens of an answer at most (default: 128; fewer where the model ends)"
    )
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, help="sample, with logits divided by this (default: 1)")
    parser.add_argument("--top_p", type=float, help="sample, among the likeliest tokens of this probability (default: 1)")
    parser.add_argument("--seed", type=int, help="sample, with this seed (default: 0)")
    parser.add_argument("--greedy", action="store_true", help="the default, spelt out")
    parser.add_argument("--prompt_format", choices=["qa", "chat"], help="default: what the model's manifest says, else qa")
    parser.add_argument("--validate", action="store_true", help="check the models' files, report, and stop")
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow the model to run code of its own")
    options = parser.parse_intermixed_args(list(argv))
    if len(options.models) > 3 or (len(options.models) == 3 and Path(options.models[2]).exists()):
        parser.error(f"got {len(options.models)} words, expected one or two models and at most one question, in quotes")
    sampling = [name for name in ("sample", "temperature", "top_p", "seed") if getattr(options, name) not in (None, False)]
    if options.greedy and sampling:
        parser.error(f"argument --greedy: excludes --{sampling[0]}, which samples")
    options.sample = bool(sampling)
    for name, default in {"temperature": 1.0, "top_p": 1.0, "seed": 0}.items():
        setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    if options.max_new_tokens < 1:
        parser.error(f"argument --max_new_tokens: got {options.max_new_tokens}, expected 1 or more")
    if not 0 < options.temperature < float("inf"):
        parser.error(f"argument --temperature: got {options.temperature}, expected a number above 0 (greedy answers are the default)")
    if not 0 < options.top_p <= 1:
        parser.error(f"argument --top_p: got {options.top_p}, expected a number above 0, at most 1")
    return options


def _check(name: str, setting: str, options: argparse.Namespace) -> ModelSource:
    path = Path(name).expanduser()
    source = check_model_source(
        str(path.absolute()) if path.exists() else name, setting=setting, role="generator", trust_remote_code=options.trust_remote_code
    )
    if source.positions is not None:
        # half of a short model's positions are for the question
        options.max_new_tokens = min(options.max_new_tokens, max(1, source.positions // 2))
    return source


def _prompt_format(source: ModelSource, options: argparse.Namespace) -> PromptFormat:
    chosen: PromptFormat | None = options.prompt_format
    return chosen or ("chat" if source.prompt_format == "chat" else "qa")


def _params(options: argparse.Namespace) -> GenerateParams:
    if not options.sample:
        return GenerateParams(max_new_tokens=options.max_new_tokens)
    return GenerateParams(do_sample=True, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p)


if __name__ == "__main__":
    run_main(main)
