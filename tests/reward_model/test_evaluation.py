"""Both `test_reward.py` and `score.py`, from the command line to their files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from common.evaluation.csv_log import CsvLog
from common.models.reward import RewardModel, RewardScorer
from reward_model import evaluation, score
from reward_model.classification import test_reward as evaluate_pairs
from reward_model.classification import train_reward as train_pairs
from reward_model.metrics import value_slices
from reward_model.regression import test_reward as evaluate_scores
from reward_model.regression import train_reward as train_scores

KINDS: dict[str, Any] = {"pair": (train_pairs.main, evaluate_pairs.main), "score": (train_scores.main, evaluate_scores.main)}
COLUMNS = {
    "pair": ["question", "chosen", "rejected", "chosen_score", "rejected_score", "margin"],
    "score": ["question", "answer", "target_score", "pred_score", "mse"],
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def evaluate(write_config, tmp_path: Path):
    """evaluate(kind, *overrides) trains a model for two steps where there is none yet, evaluates it, returns the CSV's path."""

    def run(kind: str, *overrides: str) -> Path:
        if not (tmp_path / "models" / "latest").exists():
            KINDS[kind][0](["--config_file", str(write_config(kind)), "trainer.params.max_steps=2"])
        config = {
            "model_name": str(tmp_path / "models" / "latest"),
            "data": {"data_dir": str(tmp_path / f"{kind}.json"), "batch_size": 4},
            "test_params": {"log_file": str(tmp_path / "out" / "scores.csv"), "save_steps": 3, "bootstrap_samples": 50},
        }
        path = tmp_path / "test_config.yaml"
        path.write_text(yaml.safe_dump(config))
        assert KINDS[kind][1](["--config_file", str(path), *overrides]) == 0
        return tmp_path / "out" / "scores.csv"

    return run


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_the_csv_holds_the_scores_and_the_summary_the_figures(
    kind: str, evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluate(kind)
    rows = read(path)
    assert list(rows[0]) == COLUMNS[kind]
    data = json.loads((tmp_path / f"{kind}.json").read_text())["test"]
    assert [row["question"] for row in rows] == [row["Question"] for row in data]
    scorer = RewardScorer(tmp_path / "models" / "latest")
    summary = json.loads((tmp_path / "out" / "scores.summary.json").read_text())
    if kind == "pair":
        expected = scorer.score([row["Question"] for row in data], [row["Accepted_Answer"] for row in data])
        assert [float(row["chosen_score"]) for row in rows] == pytest.approx(expected, abs=1e-5)
        assert all(float(row["margin"]) == float(row["chosen_score"]) - float(row["rejected_score"]) for row in rows)
        right = sum(float(row["margin"]) > 0 for row in rows) / len(rows)
        assert summary["figures"]["accuracy"]["value"] == right
    else:
        expected = scorer.score([row["Question"] for row in data], [row["Answer"] for row in data])
        assert [float(row["pred_score"]) for row in rows] == pytest.approx(expected, abs=1e-5)
        errors = [(row["Score"] - float(out["pred_score"])) ** 2 for row, out in zip(data, rows, strict=True)]
        assert [float(row["mse"]) for row in rows] == pytest.approx(errors)
        assert summary["figures"]["MSE"]["value"] == pytest.approx(sum(errors) / len(errors))
        train = json.loads((tmp_path / "score.json").read_text())["train"]
        mean = sum(row["Score"] for row in train) / len(train)
        baseline = sum((row["Score"] - mean) ** 2 for row in data) / len(data)
        assert summary["figures"]["MSE"]["baseline"] == pytest.approx(baseline)
    assert summary["checks"][-1]["passed"], summary["checks"][-1]["text"]  # padding and batch order
    out = capsys.readouterr().out
    assert "can it be trusted?" in out
    assert out.count("test split of") == 1  # the title


def test_a_pair_model_tested_on_scores_is_known_as_such(evaluate, write_data, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("pair")
    write_data("score")
    capsys.readouterr()
    evaluate("score", "--validate")
    assert "note: this model was trained on pairs (reward_classification)" in capsys.readouterr().out
    evaluate("score")
    report = capsys.readouterr().out.rpartition("answers scored")[2]
    assert report.index("note: this model was trained on pairs") < report.index("can it be trusted?")


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(kind: str, evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    path = evaluate(kind)
    whole, summary = path.read_bytes(), path.with_suffix(".summary.json").read_bytes()
    for file in path.parent.iterdir():
        file.unlink()

    original = RewardScorer.judge
    calls: list[int] = []

    def dies(self: RewardScorer, prompts: Any, responses: Any, ended: Any = None) -> Any:
        if sum(calls) >= 6:
            raise KeyboardInterrupt
        calls.append(len(responses))
        return original(self, prompts, responses, ended)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RewardScorer, "judge", dies)
        evaluate(kind)
    there = len(read(path))
    assert 0 < there < len(whole.splitlines()) - 1

    scored: list[int] = []

    def counts(self: RewardScorer, prompts: Any, responses: Any, ended: Any = None) -> Any:
        scored.append(len(responses))
        return original(self, prompts, responses, ended)

    monkeypatch.setattr(RewardScorer, "judge", counts)
    evaluate(kind)
    assert path.read_bytes() == whole
    assert path.with_suffix(".summary.json").read_bytes() == summary
    assert sum(scored) == (len(read(path)) - there) * (2 if kind == "pair" else 1)  # nothing twice


def test_another_model_or_split_starts_a_csv_of_its_own(evaluate, write_config, capsys: pytest.CaptureFixture[str]) -> None:
    path = evaluate("pair")
    first = path.read_bytes()
    KINDS["pair"][0](["--config_file", str(write_config("pair", seed=1)), "trainer.params.max_steps=2"])
    evaluate("pair")
    assert path.with_name("scores.previous.csv").read_bytes() == first
    assert path.read_bytes() != first
    evaluate("pair", "data.split=val")
    assert len(read(path)) == 6
    assert "of another evaluation" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_told_in_one_line(evaluate, tmp_path: Path) -> None:
    evaluate("pair")
    for override, message in (
        ("model_name=/nowhere/latest", "no model directory"),
        ("data.data_dir=/nowhere.json", "no such file"),
        ("cuda=true", "no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("pair", override)
    data = json.loads((tmp_path / "pair.json").read_text())
    (tmp_path / "only_train.json").write_text(json.dumps({"train": data["train"]}))
    with pytest.raises(UserError, match="test: got no rows"):
        evaluate("pair", f"data.data_dir={tmp_path / 'only_train.json'}")


def test_several_rejected_answers_are_pairs_of_one_question(evaluate, tmp_path: Path) -> None:
    evaluate("pair")
    row = {"Question": "What?", "Accepted_Answer": "good 1", "Answer": ["bad 2", "bad 3", "bad thing 4"]}
    other = {"Question": "Which?", "Accepted_Answer": "good 2", "Answer": ["bad 5"]}
    (tmp_path / "several.json").write_text(json.dumps({"train": [other], "test": [row, other]}))
    path = evaluate("pair", f"data.data_dir={tmp_path / 'several.json'}")
    assert [line["rejected"] for line in read(path)] == ["bad 2", "bad 3", "bad thing 4", "bad 5"]
    assert len({line["chosen_score"] for line in read(path)[:3]}) == 1
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    assert (summary["pairs"], summary["questions"]) == (4, 2)


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_what_was_cut_is_told(kind: str, evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(kind, "data.max_prompt_length=20")
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: test: ")]
    assert "16 of 16 prompts cut (" in note and note.endswith(" tokens); raise data.max_length or data.max_prompt_length to keep them")


def test_wandb_gets_figures_and_table_where_asked_for(evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = evaluate("pair", "wandb.mode=offline", "test_params.table_name=pairs")
    tracking = path.with_suffix(".tracking")
    lines = (tracking / "tables" / "pairs-step-000000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read(path)
    assert "test/accuracy" in (tracking / "metrics.jsonl").read_text()


def test_scores_that_depend_on_padding_are_measured(evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate("pair")
    scorer = RewardScorer(tmp_path / "models" / "latest", batch_size=4)
    from common.records import Prompt

    rows = [(Prompt(f"What is thing {number}?"), "good " + "thing " * number) for number in range(5)]
    assert max(evaluation.invariance(scorer, rows, seed=0).values()) < 1e-5

    original = RewardModel.forward

    def sees_padding(self: RewardModel, input_ids: Any, *rest: Any) -> Any:
        return original(self, input_ids, *rest) + 0.01 * input_ids.shape[1]

    monkeypatch.setattr(RewardModel, "forward", sees_padding)
    differences = evaluation.invariance(scorer, rows, seed=0)
    assert differences["under more padding"] > 0.1
    assert differences["in batches"] > 0.01


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_score_reads_every_format_with_answers(suffix: str, evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("pair")
    model = tmp_path / "models" / "latest"
    lines = {
        "pairs": ({"prompt": "What?", "chosen": "good 1", "rejected": "bad 2"}, ["chosen", "rejected"]),
        "scores": ({"Question": "What?", "Answer": "good 1", "Score": 3}, ["answer"]),
        "answers": ({"instruction": "What?", "context": "", "response": "good 1"}, ["answer"]),
        "dialogues": (
            {"chosen": "\n\nHuman: What?\n\nAssistant: good 1", "rejected": "\n\nHuman: What?\n\nAssistant: bad 2"},
            ["chosen", "rejected"],
        ),
    }
    scores = set()
    for name, (line, roles) in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
        output = tmp_path / f"out.{suffix}"
        assert score.main([str(model), str(tmp_path / f"{name}.jsonl"), "--output", str(output)]) == 0
        rows = read(output) if suffix == "csv" else [json.loads(text) for text in output.read_text().splitlines()]
        assert [row["role"] for row in rows] == roles
        assert rows[0]["answer"] == "good 1"
        scores.add(round(float(rows[0]["score"]), 5))
    assert len(scores) == 1  # the same question and answer, whatever the format
    assert "quantiles" in capsys.readouterr().out


def test_score_leaves_unusable_rows_out_where_asked_to(evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("pair")
    arguments = [str(tmp_path / "models" / "latest"), str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    rows = [{"Question": "What?", "Answer": ""}, {"Question": "What?", "Answer": "good"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="empty"):
        score.main(arguments)
    assert score.main([*arguments, "--unusable-rows", "drop"]) == 0
    assert "1 of 2 rows dropped" in capsys.readouterr().out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_score_reads_the_answers_that_test_sft_writes(evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("pair")
    model, data = str(tmp_path / "models" / "latest"), tmp_path / "answers.csv"
    log = CsvLog(data, ("question", "original_answer", "generated_answer"), {})
    answers = ['good, "quite"\n1', "bad 2", ""]
    log.append([{"question": "What?", "original_answer": "x", "generated_answer": answer} for answer in answers])
    with pytest.raises(UserError, match=r"answers.csv: row 3: generated_answer: got empty text, .* \(--unusable_rows drop leaves"):
        score.main([model, str(data)])
    assert score.main([model, str(data), "--unusable_rows", "drop"]) == 0
    output = tmp_path / "answers.scores.jsonl"
    assert capsys.readouterr().out.splitlines()[-1] == f"scores of 2 answers: {output}"
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == answers[:2]

    data.write_text("\ufeffid,Question,Answer\n1,What?,good\n")
    assert score.main([model, str(data)]) == 0
    assert json.loads(output.read_text())["question"] == "What?"
    data.write_text("prompt,text\na,b\n")
    with pytest.raises(UserError, match=r"got the columns prompt, text; expected question and generated_answer or answer$"):
        score.main([model, str(data)])


def test_scores_lie_beside_the_file_and_never_replace_it(
    evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate("pair")
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "train.json").write_text(json.dumps([{"Question": "What " * 80, "Answer": "good"}]))
    monkeypatch.chdir(elsewhere)
    model = str(tmp_path / "models" / "latest")
    assert score.main([model, "../data/train.json"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"scores of 1 answers: {folder}/train.scores.jsonl"
    assert any("reads 64 tokens: 1 of 1 prompts cut (" in line for line in printed)
    assert score.main([model, str(folder), "--output", "out.csv"]) == 0  # the scores are no second train file
    assert sorted(path.name for path in elsewhere.iterdir()) == ["out.csv"]
    with pytest.raises(UserError, match="is the file to score"):
        score.main([model, str(tmp_path / "pair.json"), "--output", str(tmp_path / "pair.json")])


def test_score_takes_rows_with_and_without_a_target_and_refuses_a_bad_one(evaluate, tmp_path: Path) -> None:
    evaluate("pair")
    arguments = [str(tmp_path / "models" / "latest"), str(tmp_path / "rows.json")]
    row = {"Question": "What?", "Answer": "good"}
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "Score": 1}, row]))
    assert score.main(arguments) == 0
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "Score": "1"}] * 3))
    with pytest.raises(UserError, match=r'train rows 1, 2 and 3.*: Score: got "1" \(text\), expected a number$'):
        score.main(arguments)
    (tmp_path / "rows.json").write_text(json.dumps([{"Question": "What?"}]))
    with pytest.raises(UserError, match="Answer: missing, expected it beside Question"):
        score.main(arguments)


def test_score_says_what_is_wrong_with_the_fitting_format(evaluate, tmp_path: Path) -> None:
    evaluate("pair")
    model = str(tmp_path / "models" / "latest")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "What?", "chosen": "good", "rejected": 7}) + "\n")
    with pytest.raises(UserError, match="rejected: got 7"):
        score.main([model, str(bad)])
    for arguments, message in (
        ([str(tmp_path), str(bad)], "no config.json"),
        ([model, str(tmp_path / "none.json")], "no such file"),
        ([model, str(tmp_path / "pair.json"), "--output", "scores.txt"], "ends in .jsonl or .csv"),
    ):
        with pytest.raises(UserError, match=message):
            score.main(arguments)


@pytest.mark.parametrize("kind", ["pair", "score"])
def test_figures_are_broken_down_by_a_column_of_the_rows(kind: str, evaluate, tmp_path: Path) -> None:
    evaluate(kind)
    path = tmp_path / f"{kind}.json"
    splits = json.loads(path.read_text())
    for number, row in enumerate(splits["test"]):
        row["Subject"] = "tea" if number == 0 else "beer"
    path.write_text(json.dumps(splits))
    (tmp_path / "out" / "scores.csv").unlink()
    evaluate(kind, "test_params.breakdown_by=[Subject]")
    summary = json.loads((tmp_path / "out" / "scores.summary.json").read_text())
    slices = {row["Subject"]: row for row in summary["breakdowns"]["by Subject"]}
    count = {"pair": "pairs", "score": "answers"}[kind]
    assert list(slices) == ["beer", "tea"]
    assert slices["beer"][count] + slices["tea"][count] == summary[count]
    with pytest.raises(UserError, match=r"no column Topic, which test_params.breakdown_by names .*further columns of these rows: Subject"):
        evaluate(kind, "test_params.breakdown_by=[Topic]")


def test_rare_values_of_a_column_stand_together() -> None:
    slices = value_slices(["a", "b", "a", "c", "d"], most=2)
    assert [(value, rows.tolist()) for value, rows in slices] == [("a", [0, 2]), ("b", [1]), ("(others)", [3, 4])]
