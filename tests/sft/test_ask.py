"""`ask.py` in a pipe: one answer per question and model, and errors of one line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.models.load import build_generator, train_tokenizer
from common.schema import ModelInit
from sft.ask import main

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["What is the capital of France? It is Paris, of course."], 300)
    paths = []
    for seed in (0, 1):
        model = build_generator(ModelInit(model_type="llama", config=SIZE), tokenizer, 64, seed)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        paths.append(str(save_model_directory(folder / str(seed), model, tokenizer, new_manifest("sft", tokenizer, max_length=64))))
    return paths


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *argv: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main([*argv, "--max_new_tokens", "5"]) == 0
    # split at newlines alone: an untrained model writes every other control character
    return capsys.readouterr().out.split("\n")


def questions(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("> ")]


def test_answers_are_greedy_unless_sampling_is_asked_for(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ask(monkeypatch, capsys, "What is it?\n", models[0])
    assert plain[0] == f"{models[0]}: greedy answers"
    assert ask(monkeypatch, capsys, "What is it?\n", models[0], "--greedy") == plain
    sampled = ask(monkeypatch, capsys, "What is it?\n", models[0], "--temperature", "0.9")
    assert sampled[0] == f"{models[0]}: sampled answers, temperature 0.9, top_p 1, seed 0"
    assert sampled[1:] != plain[1:]


def test_a_question_on_the_command_line_is_answered_alone(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = ask(monkeypatch, capsys, "What is it?\n", models[0])
    assert ask(monkeypatch, capsys, "not read\n", models[0], "What is it?") == piped
    assert ask(monkeypatch, capsys, "not read\n", models[0], "Why?")[1] == "> Why?"
    assert ask(monkeypatch, capsys, "not read\n", models[0], "为什么")[1] == "> 为什么"
    both = ask(monkeypatch, capsys, "not read\n", *models, "Why")
    assert both[0].startswith(f"{models[0]} | {models[1]}: ") and both[1] == "> Why"


def test_each_line_is_answered(models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ask(monkeypatch, capsys, "What is it?\n\n  Why? \n", models[0], "--greedy")
    assert questions(lines) == ["> What is it?", "> Why?"]
    assert len([line for line in lines if line]) >= 4
    assert ask(monkeypatch, capsys, "What is it?\n\n  Why? \n", models[0], "--greedy") == lines


def test_quit_ends_it(models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert questions(ask(monkeypatch, capsys, "One?\n/quit\nTwo?\n", models[0])) == ["> One?"]
    assert questions(ask(monkeypatch, capsys, "", models[0])) == []


def test_two_models_answer_side_by_side(models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    both = "\n".join(ask(monkeypatch, capsys, "What is the capital of France?\n", *models, "--greedy"))
    for number, model in enumerate(models, 1):
        alone = "\n".join(ask(monkeypatch, capsys, "What is the capital of France?\n", model, "--greedy"))
        answer = alone.split("\n", 2)[2].removesuffix("\n")
        assert f"\n{number}: {answer}" in both
    assert both.index("\n1: ") < both.index("\n2: ")


def test_sampling_depends_on_the_seed_alone(models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = ask(monkeypatch, capsys, "What is it?\n", models[0], "--seed", "1")
    assert ask(monkeypatch, capsys, "What is it?\n", models[0], "--seed", "1") == first
    assert ask(monkeypatch, capsys, "What is it?\n", models[0], "--seed", "2") != first
    # the same question twice is sampled twice
    lines = ask(monkeypatch, capsys, "What is it?\nWhat is it?\n", models[0], "--sample")
    text = "\n".join(lines)
    _, one, two = text.split("> What is it?\n")
    assert one.strip() != two.strip()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "0"], "expected a number above 0"),
        (["--max_new_tokens", "0"], "expected 1 or more"),
        (["--top_p", "2"], "at most 1"),
        (["./nowhere"], "nowhere"),
        (["--prompt_format", "chat"], "chat"),
        (["--nonsense"], "command line"),
        (["--greedy", "--top_p", "0.5"], "--greedy: excludes --top_p"),
        (["a?", "b?", "c?"], "expected one or two models and at most one question, in quotes"),
    ],
)
def test_errors(models: list[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    with pytest.raises(UserError, match=message):
        main([models[0], *argv])


def test_the_script_in_a_pipe(models: list[str], root: Path) -> None:
    script = str(root / "sft" / "ask.py")
    result = subprocess.run(
        [sys.executable, script, models[0], "--greedy"], cwd=root / "sft", input="What?\n", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{models[0]}: greedy answers\n> What?\n")
    failed = subprocess.run([sys.executable, script, "./nowhere"], cwd=root, input="", capture_output=True, text=True)
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1
