"""`test_sft.py` as a user meets it: files, continuation, comparison, every model kind, and errors of one line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import common.evaluation.answering as answering
from common.checkpoint import new_manifest, save_model_directory
from common.errors import UserError
from common.evaluation.report import COLUMNS
from common.evaluation.text_metrics import answer_metrics, corpus_metrics
from common.models.load import build_generator, train_tokenizer
from common.schema import ModelInit
from rlhf.test_ppo import main as ppo_main
from sft.test_sft import main

QUESTIONS = [f"What is the capital of {country}?" for country in ("France", "Peru", "Japan", "Kenya", "Chad", "Oman", "Cuba")]
ROWS = [{"Question": question, "Answer": f"It is number {number}."} for number, question in enumerate(QUESTIONS)]
SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}


def model_dir(folder: Path, kind: str = "gpt_neo", seed: int = 0) -> Path:
    tokenizer = train_tokenizer([*QUESTIONS, *(row["Answer"] for row in ROWS)], 300)
    model = build_generator(ModelInit(model_type=kind, config=SIZES[kind]), tokenizer, 64, seed)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # larger than fresh weights, so that answers depend on questions
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return save_model_directory(folder, model, tokenizer, new_manifest("sft", tokenizer, max_length=64))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dirs = {kind: model_dir(folder / kind, kind) for kind in SIZES}
    return {**dirs, "other": model_dir(folder / "other", seed=1)}


class Case:
    """A config, its data and what a run of it writes."""

    def __init__(self, folder: Path, model: Path, rows: list[dict[str, Any]] = ROWS) -> None:
        self.folder = folder
        self.csv = folder / "out" / "answers.csv"
        self.data = folder / "data.json"
        self.data.write_text(json.dumps({"train": ROWS[:1], "test": rows}))
        self.settings: dict[str, Any] = {
            "model_name": str(model),
            "data": {"data_dir": str(self.data), "batch_size": 3},
            "generate_params": {"max_new_tokens": 6},
            "test_params": {"log_file": str(self.csv), "save_steps": 3},
        }

    def run(self, *argv: str, script: Any = main) -> int:
        config = self.folder / "test_config.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        return script(["--config_file", str(config), *argv])

    def rows(self, path: Path | None = None) -> list[dict[str, str]]:
        with (path or self.csv).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.csv.with_suffix(".summary.json").read_text())


@pytest.fixture
def case(tmp_path: Path, models: dict[str, Path]) -> Case:
    return Case(tmp_path, models["gpt_neo"])


def test_the_csv_has_the_columns_of_the_original_and_right_metrics(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run() == 0
    rows = case.rows()
    expected = "question, original_answer, generated_answer, bleu, rouge1_fmeasure, rouge2_fmeasure, rougeL_fmeasure"
    assert list(rows[0]) == expected.split(", ") == list(COLUMNS)
    assert [row["question"] for row in rows] == QUESTIONS
    for row in rows:
        metrics = answer_metrics(row["generated_answer"], row["original_answer"])
        assert {name: float(row[name]) for name in metrics} == metrics
    corpus = corpus_metrics([row["generated_answer"] for row in rows], [row["original_answer"] for row in rows])
    figures = case.summary["figures"]
    assert {name: figures[name] for name in corpus} == corpus
    assert figures["rows"] == 7
    shown = capsys.readouterr().out
    assert "rougeL_fmeasure" in shown and str(case.csv) in shown


def test_an_answer_is_what_the_model_says_alone(case: Case, models: dict[str, Path]) -> None:
    """The CSV against a plain loop with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    case.run()
    model = AutoModelForCausalLM.from_pretrained(models["gpt_neo"])
    tokenizer = AutoTokenizer.from_pretrained(models["gpt_neo"])
    for row in case.rows():
        ids = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        prompt = len(ids)
        while len(ids) < prompt + 6 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["generated_answer"] == tokenizer.decode(ids[prompt:], skip_special_tokens=True).removeprefix(" ")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_other_kinds_of_models_through_the_ppo_script(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    case = Case(tmp_path, models[kind])
    assert case.run(script=ppo_main) == 0
    assert len(case.rows()) == 7


def test_a_plain_hugging_face_directory_works(tmp_path: Path, models: dict[str, Path]) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in models["gpt_neo"].iterdir():
        if file.is_file() and file.name != "manifest.json":
            (plain / file.name).write_bytes(file.read_bytes())
    ours, theirs = Case(tmp_path, models["gpt_neo"]), Case(tmp_path, plain)
    ours.run()
    rows = ours.rows()
    theirs.run()
    assert theirs.rows() == rows


SAMPLED = "generate_params.do_sample=true"


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_evaluation_goes_on_where_it_stopped(
    case: Case, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    whole = Case(tmp_path_factory.mktemp("whole"), models["gpt_neo"])
    whole.run(SAMPLED)
    answered: list[int] = []
    real = answering.generate_answers

    def stopping(*args: Any, rows: Any, **kwargs: Any) -> Any:
        if len(answered) == 3 * stop_after:
            raise KeyboardInterrupt
        answered.extend(rows)
        return real(*args, rows=rows, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(answering, "generate_answers", stopping)
        with pytest.raises(KeyboardInterrupt):
            case.run(SAMPLED)
    assert len(case.rows()) == 3 * stop_after
    with case.csv.open("a") as file:
        file.write("What is half a li")  # as a killed process leaves it
    # other batches and chunks change nothing
    case.run(SAMPLED, "data.batch_size=2", "test_params.save_steps=2")
    assert case.csv.read_bytes() == whole.csv.read_bytes()


def test_a_complete_evaluation_loads_no_model_again(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.run()
    before, figures = case.csv.read_bytes(), case.summary
    case.csv.with_suffix(".summary.json").unlink()
    monkeypatch.setattr(answering, "load_generator", None)
    assert case.run() == 0
    assert "is complete: 7 answers" in capsys.readouterr().out
    assert case.csv.read_bytes() == before
    assert case.summary == figures


@pytest.mark.parametrize("change", ["generate_params.max_new_tokens=4", "data.max_rows=5", "seed=7", "model"])
def test_rows_of_another_evaluation_are_not_continued(case: Case, models: dict[str, Path], change: str) -> None:
    case.run(SAMPLED)
    old = case.rows()
    case.run(SAMPLED, f"model_name={models['other']}" if change == "model" else change)
    assert case.rows(case.csv.with_name("answers.previous.csv")) == old
    assert len(case.rows()) == (5 if "max_rows" in change else 7)
    if "max_rows" not in change:
        assert case.rows() != old


def test_two_models_side_by_side(case: Case, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--compare", str(models["other"])) == 0
    first, second = case.rows(), case.rows(case.csv.with_name("answers.compare.csv"))
    assert [row["question"] for row in second] == QUESTIONS
    assert [row["generated_answer"] for row in first] != [row["generated_answer"] for row in second]
    both = case.rows(case.csv.with_name("answers.side_by_side.csv"))
    assert [row["generated_answer_1"] for row in both] == [row["generated_answer"] for row in first]
    assert [row["rougeL_fmeasure_2"] for row in both] == [row["rougeL_fmeasure"] for row in second]
    compared = case.summary["compared"]
    assert compared["figures"]["rows"] == 7
    wins = compared["differences"]["rougeL_fmeasure"]
    assert wins["first_better"] + wins["second_better"] + wins["equal"] == 7
    mean = sum(float(b["rougeL_fmeasure"]) - float(a["rougeL_fmeasure"]) for a, b in zip(first, second, strict=True)) / 7
    assert wins["difference"] == pytest.approx(mean)
    assert "second - first" in capsys.readouterr().out


def test_questions_alone_leave_metrics_empty(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, models["gpt_neo"], [{"prompt": question} for question in QUESTIONS])
    case.data.write_text(json.dumps({"test": [{"prompt": question} for question in QUESTIONS]}))
    assert case.run() == 0
    assert all(row["original_answer"] == row["bleu"] == row["rougeL_fmeasure"] == "" for row in case.rows())
    assert "bleu" not in case.summary["figures"]
    assert "no answers to compare with" in capsys.readouterr().out


def test_pairs_are_measured_against_the_preferred_answer(tmp_path: Path, models: dict[str, Path]) -> None:
    case = Case(tmp_path, models["gpt_neo"])
    rows = [{"Question": question, "Accepted_Answer": "good", "Answer": "bad"} for question in QUESTIONS]
    case.data.write_text(json.dumps({"test": rows}))
    case.run()
    assert {row["original_answer"] for row in case.rows()} == {"good"}


def test_rows_that_nothing_can_be_asked_of_are_refused_or_left_out(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, models["gpt_neo"])
    dialogue = [{"chosen": f"\n\nHuman: {q}\n\nAssistant: good", "rejected": f"\n\nHuman: {q}\n\nAssistant: bad"} for q in QUESTIONS]
    unusable = {"chosen": "\n\nHuman: why?\n\nAssistant:", "rejected": "\n\nHuman: why?\n\nAssistant: bad"}
    case.data.write_text(json.dumps({"test": [*dialogue[:2], unusable, *dialogue[2:]]}))
    with pytest.raises(UserError, match=r"test row 3.*last answer is empty.*unusable_rows: drop"):
        case.run()
    assert case.run("data.unusable_rows=drop") == 0
    assert [row["question"] for row in case.rows()] == QUESTIONS
    assert "1 of 8 rows dropped as unusable" in capsys.readouterr().out


def test_a_missing_split_is_named_whatever_the_rows_are(tmp_path: Path, models: dict[str, Path]) -> None:
    case = Case(tmp_path, models["gpt_neo"])
    rows = [{"Question": question, "Accepted_Answer": "good", "Answer": "bad"} for question in QUESTIONS]
    case.data.write_text(json.dumps({"train": rows}))
    with pytest.raises(UserError, match="test: got no rows"):
        case.run()


def test_metrics_can_be_left_out(case: Case) -> None:
    case.run("test_params.do_compute_metrics=false")
    assert all(row["bleu"] == "" and row["original_answer"] for row in case.rows())
    assert "bleu" not in case.summary["figures"]


def test_padding_to_the_maximum_changes_no_answer(case: Case, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> None:
    padded = Case(tmp_path_factory.mktemp("padded"), models["gpt_neo"])
    case.run("data.max_prompt_length=50")
    padded.run("data.max_prompt_length=50", "data.padding=max_length")
    assert padded.csv.read_bytes() == case.csv.read_bytes()


def test_without_padding_questions_are_answered_one_by_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    generate = answering.generate_answers
    monkeypatch.setattr(answering, "generate_answers", lambda *args, **kw: sizes.append(kw["batch_size"]) or generate(*args, **kw))
    case.run("data.padding=false")
    assert set(sizes) == {1}


def test_long_prompts_are_cut_or_refused(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, models["gpt_neo"], [*ROWS[:2], {"Question": "long " * 200, "Answer": "x"}])
    assert case.run() == 0
    assert "note: test: 1 of 3 prompts cut (" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"test row 3.*truncate_prompt is false"):
        case.run("data.truncate_prompt=false", "data.max_prompt_length=40")


# --- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cuda=true", "no GPU that torch can use"),
        ("generate_params.num_beam=3", r"num_beam.*did you mean.*num_beams"),
        ("generate_params.max_new_tokens=64", "exceeds the 64 positions"),
        ("data.max_prompt_length=60", r"max_prompt_length 60 \+ generate_params.max_new_tokens 6 exceeds the 64 positions"),
        ("data.prompt_format=chat", "was trained on qa"),
        ("data.split=val", "val: got no rows"),
        ("model_name=./nowhere", "nowhere"),
        ("data.data_dir=nothing.json", "no such file"),
    ],
)
def test_what_cannot_work_is_refused(case: Case, override: str, message: str) -> None:
    if override == "cuda=true" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if override == "data.split=val":
        case.settings["data"]["validation_split_percentage"] = 0
    with pytest.raises(UserError, match=message):
        case.run(override)


def test_a_bad_row_is_no_reason_to_drop_the_answers(case: Case) -> None:
    case.data.write_text(json.dumps({"test": [*ROWS, {"Question": "q", "Answer": 3}]}))
    with pytest.raises(UserError, match=r"test row 8.*Answer: got 3"):
        case.run()


def test_the_compared_models_problems_come_with_the_others(case: Case, tmp_path: Path) -> None:
    case.settings["model_name"] = str(tmp_path / "none")
    with pytest.raises(UserError) as caught:
        case.run("--compare", str(tmp_path / "neither"), "generate_params.max_length=3")
    assert len(caught.value.problems) == 3


def test_validation_says_so_without_torch_and_writes_nothing(case: Case, root: Path) -> None:
    case.settings["generate_params"]["temperature"] = 0.5
    config = case.folder / "c.yaml"
    config.write_text(yaml.safe_dump(case.settings))
    code = (
        "import sys; from sft.test_sft import main\n"
        f"assert main(['--config', {str(config)!r}, '--validate']) == 0\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "7 test questions" in result.stdout
    assert "temperature without effect" in result.stdout
    assert not case.csv.parent.exists()


def test_the_script_ends_with_one_line_and_code_2(case: Case, root: Path) -> None:
    case.settings["model_name"] = "./nowhere"
    config = case.folder / "c.yaml"
    config.write_text(yaml.safe_dump(case.settings))
    for script in ("sft/test_sft.py", "rlhf/test_ppo.py"):
        result = subprocess.run([sys.executable, script, "--config", str(config)], cwd=root, capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: ")


def test_tables_and_figures_go_to_the_tracker_when_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    case.run("wandb.mode=offline")
    folder = case.csv.with_suffix(".tracking")
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["test/rougeL_fmeasure"] == case.summary["figures"]["rougeL_fmeasure"]
    (table,) = (folder / "tables").iterdir()
    assert len(table.read_text().splitlines()) == 7
