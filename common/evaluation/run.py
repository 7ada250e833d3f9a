"""The evaluation of text generators behind `sft/test_sft.py` and `rlhf/test_ppo.py`.

A model (any run directory or hub model, causal or encoder-decoder) answers the questions of a split. Answers and their metrics go to a
CSV as they come, and an evaluation that was stopped goes on from there; at the end corpus figures are printed and written as JSON beside
it. With `--compare MODEL` a second model answers the same questions and both are set side by side.

torch is imported when a model has to answer, after config, data and models' files have been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import parse_command_line, resolved_dict
from common.devices import check_bfloat16, check_cuda
from common.errors import UserError, both
from common.evaluation.config import GenerationTestConfig
from common.evaluation.csv_log import CsvLog, add_resume_option
from common.evaluation.generation_options import generation_options, idle_options
from common.evaluation.identity import model_identity
from common.evaluation.report import COLUMNS, differences, differences_table, figures, figures_table
from common.evaluation.rows import EvaluationRows, evaluation_rows
from common.evaluation.text_metrics import METRICS, answer_metrics
from common.model_source import ModelSource, check_length, check_model_source, check_prompt_format
from common.prompts import PromptFormat
from common.runs import write_text_atomically
from common.tracking import Tracker, wandb_mode

EXAMPLES_SHOWN = 3
EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, the prompt format it reads, and the CSV of its answers."""

    source: ModelSource
    prompt_format: PromptFormat
    log_file: Path

    @property
    def name(self) -> str:
        return self.source.name


@dataclass(frozen=True)
class Evaluation:
    """A subject's answers (CSV rows) and figures."""

    subject: Subject
    rows: list[dict[str, str]]
    figures: dict[str, float]


def run_generation_test(argv: Sequence[str], *, stage_dir: Path, description: str) -> int:
    """The whole script: check, answer, report. Raises UserError for what the user can mend."""
    invocation = parse_command_line(GenerationTestConfig, stage_dir, argv, description=description, add_options=_add_options)
    config = invocation.config
    invocation.print_notes()
    subjects, data = both(lambda: _check_subjects(config, invocation.options.compare), lambda: evaluation_rows(config.data, config.seed))
    for note in _notes(config, data):
        print(f"note: {note}")
    if invocation.validate_only:
        invocation.say_valid(config.data.data_dir, f"{len(data.rows):,} {config.data.split} questions")
        return 0
    evaluations = [_evaluate(subject, data, config, only_resume=invocation.options.only_resume) for subject in subjects]
    _report(evaluations, config)
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_resume_option(parser)
    parser.add_argument("--compare", metavar="MODEL", help="a second model (directory or hub name) that answers the same questions")


# --- checks, before torch ----------------------------------------------------------------------------------------------------------


def _check_subjects(config: GenerationTestConfig, compare: str | None) -> list[Subject]:
    """The models with all that can be said against them, at once."""
    log_file = Path(config.test_params.log_file)
    setting = "model_name" if config.test_params.test_model_path is None else "test_params.test_model_path"
    named = [(setting, config.test_params.test_model_path or config.model_name, log_file)]
    if compare is not None:
        path = Path(compare).expanduser()
        named.append(
            ("--compare", os.path.realpath(path) if path.is_dir() else compare, log_file.with_suffix(".compare" + log_file.suffix))
        )
    problems: list[str] = []
    subjects: list[Subject] = []
    for check in (lambda: generation_options(config.generate_params), lambda: _check_device(config)):
        try:
            check()
        except UserError as error:
            problems.extend(error.problems)
    for setting, name, log in named:
        try:
            source = check_model_source(name, setting=setting, role="generator", trust_remote_code=config.trust_remote_code)
            subjects.append(_check_subject(source, log, config))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(*problems)
    return subjects


def _check_device(config: GenerationTestConfig) -> None:
    if config.cuda:
        check_cuda("cuda", "set cuda: false")
        check_bfloat16({"model_dtype": config.model_dtype}, "use float16")


def _check_subject(source: ModelSource, log_file: Path, config: GenerationTestConfig) -> Subject:
    """Raise UserError where prompt format or lengths do not fit the model."""
    prompt_format: PromptFormat = config.data.prompt_format or ("chat" if source.prompt_format == "chat" else "qa")
    check_prompt_format(source, prompt_format, "data.prompt_format")
    answer, prompt = config.generate_params.max_new_tokens, config.data.max_prompt_length
    what_answer = f"generate_params.max_new_tokens {answer}"
    if source.is_encoder_decoder:
        check_length(source, answer, what_answer)
        check_length(source, prompt or 1, f"data.max_prompt_length {prompt}")
    elif prompt is None:
        check_length(source, answer + 1, f"{what_answer} and a prompt")
    else:
        check_length(source, prompt + answer, f"data.max_prompt_length {prompt} + {what_answer}")
    return Subject(source, prompt_format, log_file)


def _notes(config: GenerationTestConfig, data: EvaluationRows) -> list[str]:
    notes = list(data.notes)
    idle = idle_options(config.generate_params)
    if idle:
        notes.append(f"generate_params: {', '.join(idle)} without effect, since do_sample is false")
    if config.test_params.do_compute_metrics and not data.has_answers:
        notes.append(f"{config.data.data_dir} has no answers to compare with: metrics stay empty")
    return notes


# --- answers -----------------------------------------------------------------------------------------------------------------------


def _evaluate(subject: Subject, data: EvaluationRows, config: GenerationTestConfig, *, only_resume: bool) -> Evaluation:
    """Answer the rows that the subject's CSV does not hold yet, appending every `save_steps`."""
    with contextlib.closing(CsvLog(subject.log_file, COLUMNS, _identity(subject, data, config), only_resume=only_resume)) as log:
        if log.note:
            print(log.note)
        done, total = len(log.rows), len(data.rows)
        if done == total:
            print(f"{subject.log_file} is complete: {total:,} answers; only the figures are computed again")
        else:
            _answer_rest(subject, data, config, log)
    return Evaluation(subject, log.rows, figures(log.rows, compute_metrics=config.test_params.do_compute_metrics))


def _answer_rest(subject: Subject, data: EvaluationRows, config: GenerationTestConfig, log: CsvLog) -> None:
    from tqdm import tqdm

    from common.evaluation.answering import Answerer

    answerer = Answerer.from_config(subject.name, config, subject.prompt_format)
    done, total = len(log.rows), len(data.rows)
    print(f"{subject.name} answers {total - done:,} questions on {answerer.device}", flush=True)
    with tqdm(total=total, initial=done, unit="answer", dynamic_ncols=True, disable=None) as bar:
        for start in range(done, total, config.test_params.save_steps):
            rows = data.rows[start : start + config.test_params.save_steps]
            answers = answerer.answer(rows, range(start, start + len(rows)), lambda count: _advance(bar, count))
            log.append(
                [
                    {
                        "question": row.prompt.question,
                        "original_answer": row.answer,
                        "generated_answer": answer.text,
                        **_row_metrics(answer.text, row.answer, config.test_params.do_compute_metrics),
                    }
                    for row, answer in zip(rows, answers, strict=True)
                ]
            )
    remedy = "raise data.max_prompt_length or lower generate_params.max_new_tokens"
    for note in answerer.encoder.take_notes(config.data.split, remedy=remedy):
        print(f"note: {note}")


def _advance(bar: Any, count: int) -> None:
    bar.update(count)


def _row_metrics(answer: str, reference: str, compute: bool) -> Mapping[str, float | None]:
    """Metrics of one answer; None (an empty field) where they are not wanted or there is nothing to compare with."""
    return answer_metrics(answer, reference) if compute and reference else dict.fromkeys(METRICS)


def _identity(subject: Subject, data: EvaluationRows, config: GenerationTestConfig) -> dict[str, Any]:
    """All that decides what the CSV holds; batch size, device and cache do not."""
    return {
        "model": model_identity(subject.source),
        "data": data.fingerprint,
        "prompt_format": subject.prompt_format,
        "max_prompt_length": config.data.max_prompt_length,
        "generate_params": config.generate_params.model_dump(mode="json"),
        "seed": config.seed if config.generate_params.do_sample else None,
        "model_dtype": config.model_dtype,
        "do_compute_metrics": config.test_params.do_compute_metrics,
    }


# --- report ------------------------------------------------------------------------------------------------------------------------


def _report(evaluations: Sequence[Evaluation], config: GenerationTestConfig) -> None:
    """Print the figures, write them beside the CSV, and hand both to wandb where asked for."""
    first = evaluations[0]
    summary: dict[str, Any] = {
        "model": first.subject.name,
        "data": config.data.data_dir,
        "split": config.data.split,
        "answers": str(first.subject.log_file),
        "figures": first.figures,
    }
    labels = ["first", "second"] if len(evaluations) > 1 else [first.subject.name]
    for label, evaluation in zip(labels, evaluations, strict=True):
        print(f"\n{label}: {evaluation.subject.name}" if len(evaluations) > 1 else f"\n{label}", end="")
    print(f"\n{config.data.split} split of {config.data.data_dir}\n")
    print(figures_table(dict(zip(labels, (evaluation.figures for evaluation in evaluations), strict=True))))
    written = [evaluation.subject.log_file for evaluation in evaluations]
    if len(evaluations) > 1:
        second = evaluations[1]
        by_metric = differences(first.rows, second.rows)
        summary["compared"] = {
            "model": second.subject.name,
            "answers": str(second.subject.log_file),
            "figures": second.figures,
            "differences": by_metric,
        }
        if by_metric:
            print(f"\n{differences_table(by_metric)}")
        written.append(_write_side_by_side(first, second))
    print(_examples(evaluations, labels))
    path = first.subject.log_file.with_suffix(".summary.json")
    write_text_atomically(path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print("\nanswers: " + ", ".join(map(str, written)) + f"\nsummary: {path}")
    if wandb_mode(config.wandb) != "disabled":
        _track(evaluations, summary, config)


def _write_side_by_side(first: Evaluation, second: Evaluation) -> Path:
    """A CSV with both models' answers and metrics in a row."""
    path = first.subject.log_file.with_suffix(".side_by_side" + first.subject.log_file.suffix)
    own = COLUMNS[2:]
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS[:2], *(f"{name}_{number}" for number in (1, 2) for name in own)])
        for one, other in zip(first.rows, second.rows, strict=True):
            writer.writerow([one["question"], one["original_answer"], *(row[name] for row in (one, other) for name in own)])
    return path


def _examples(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> str:
    """The first rows, shortened to a line per text."""
    lines: list[str] = []
    for number, row in enumerate(evaluations[0].rows[:EXAMPLES_SHOWN]):
        texts = {"question": row["question"], "original": row["original_answer"]}
        generated = [evaluation.rows[number]["generated_answer"] for evaluation in evaluations]
        texts |= dict(zip(labels if len(evaluations) > 1 else ["generated"], generated, strict=True))
        lines += ["", *(f"{name:>9}: {_one_line(text)}" for name, text in texts.items() if text or name != "original")]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


def _track(evaluations: Sequence[Evaluation], summary: Mapping[str, Any], config: GenerationTestConfig) -> None:
    run_dir = evaluations[0].subject.log_file.with_suffix(".tracking")
    run_dir.mkdir(exist_ok=True)
    with Tracker.start(run_dir, stage="test", config=resolved_dict(config), wandb=config.wandb) as tracker:
        for evaluation, prefix in zip(evaluations, ("test", "compared"), strict=False):
            step = len(evaluation.rows)
            tracker.log({f"{prefix}/{name}": value for name, value in evaluation.figures.items()}, step)
            tracker.table(f"{prefix}/answers", COLUMNS, [[row[name] for name in COLUMNS] for row in evaluation.rows], step)
        tracker.finish(summary)
