"""The quickstart runs the README's own commands and stops where one fails; its measures are right by hand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from examples.measure import best_of, commonest_share
from examples.pipeline import PLAN, Command, CommandFailed, environment, run_plan

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[Command]:
    return [command for step in PLAN for lane in step for command in lane]


def test_the_plan_holds_exactly_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = {(folder, " ".join(line.split())) for folder, line in re.findall(r"^cd (\S+) +&& (python .+)$", readme, flags=re.MULTILINE)}
    assert {(command.folder, command.line) for command in commands()} == stated
    assert [command.name for command in commands() if command.trains] == ["sft", "classification", "ppo", "regression"]


def test_a_step_that_reads_a_model_comes_after_the_one_that_writes_it() -> None:
    step_of = {command.name: number for number, step in enumerate(PLAN) for lane in step for command in lane}
    assert step_of["sft"] < step_of["classification"] < min(step_of["ppo"], step_of["regression"])
    assert step_of["ppo"] < step_of["test ppo"]


def test_overrides_reach_training_commands_only() -> None:
    train, test = (Command("a", ".", "python x.py --config c.yaml", trains=trains) for trains in (True, False))
    assert train.argv(["seed=1"]) == [sys.executable, "x.py", "--config", "c.yaml", "seed=1"]
    assert test.argv(["seed=1"]) == [sys.executable, "x.py", "--config", "c.yaml"]


def test_a_failing_command_stops_the_plan_with_its_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails = Command("fails", ".", "python -c 'import sys; print(1); sys.exit(3)'")
    never = Command("never", ".", 'python -c \'open("made", "w")\'')
    with pytest.raises(CommandFailed, match="fails failed with exit code 3") as failure:
        run_plan((((fails, never),), ((never,),)), root=tmp_path)
    assert failure.value.code == 3
    assert "[fails] 1" in capfd.readouterr().out
    assert not (tmp_path / "made").exists()


def test_a_users_thread_setting_wins() -> None:
    assert environment({"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert environment({})["OMP_NUM_THREADS"] == "1"


def test_commonest_share_by_hand() -> None:
    assert commonest_share(["a", "b", "a", "c"]) == 0.5


def test_best_of_takes_the_highest_score_for_each_question() -> None:
    class Scorer:
        def score(self, prompts: list[str], responses: list[str], ended: list[bool]) -> list[float]:
            return [float(len(text)) for text in responses]

    class One:
        def __init__(self, text: str) -> None:
            self.question = "q"
            self.answer = type("A", (), {"text": text, "ended": True})()

    samples = [[One("aa"), One("b")], [One("a"), One("bbb")]]
    assert [one.answer.text for one in best_of(Scorer(), samples)] == ["aa", "bbb"]  # type: ignore[arg-type]
