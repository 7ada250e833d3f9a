"""Talk to a model in the terminal, or to two side by side; run directories, Hugging Face directories and hub models.

    python sft/ask.py MODEL [MODEL2] [--max_new_tokens 128] [--temperature 0.7] [--greedy]

One question per line, each on its own (no memory of earlier ones); /quit or the end of the input ends it. Works in a pipe, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # modules have one import name, whichever folder this runs from

from common.command_line import Parser
from common.errors import run_main
from common.model_source import ModelSource, check_model_source
from common.prompts import PromptFormat
from common.schema import GenerateParams

QUIT = "/quit"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    names = {"MODEL": options.model, "MODEL2": options.model2}
    sources = [_check(name, setting, options) for setting, name in names.items() if name is not None]
    talk(sources, options, sys.stdin, sys.stdout)
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
    if interactive:
        print(f"{' | '.join(source.name for source in sources)}: ask, or {QUIT}", file=out)
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="model directory or hub name")
    parser.add_argument("model2", metavar="MODEL2", nargs="?", help="a second one, asked the same")
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="tokens of an answer at most (default: 128; fewer where the model ends)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this probability (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    parser.add_argument("--prompt_format", choices=["qa", "chat"], help="default: what the model's manifest says, else qa")
    parser.add_argument("--cuda", action="store_true", help="use the GPU")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow the model to run code of its own")
    options = parser.parse_args(list(argv))
    if options.max_new_tokens < 1:
        parser.error(f"argument --max_new_tokens: got {options.max_new_tokens}, expected 1 or more")
    if not 0 < options.temperature < float("inf"):
        parser.error(f"argument --temperature: got {options.temperature}, expected a number above 0 (--greedy for none)")
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
    if options.greedy:
        return GenerateParams(max_new_tokens=options.max_new_tokens)
    return GenerateParams(do_sample=True, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p)


if __name__ == "__main__":
    run_main(main)
