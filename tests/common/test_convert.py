"""Converting keeps what the target can hold, says what it cannot, and never leaves half a file."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import convert
from common.errors import UserError
from common.records import read_splits
from common.row_formats import FORMATS

HISTORY = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
PAIRS = [
    {"Question": "a?", "Accepted_Answer": "good", "Answer": ["bad", " worse\n"], "margin": 2.0, "id": 1},
    {"Question": HISTORY, "Accepted_Answer": " So.", "Answer": "  No."},
    {"Question": "b?", "context": "about b", "Accepted_Answer": "x", "Answer": "y"},
]
SCORES = [{"Question": "a?", "Answer": "b", "Score": 1.5, "tags": ["x", None]}, {"Question": HISTORY, "Answer": "c", "Score": -1}]


def write(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def run(*arguments: Any) -> None:
    assert convert.main([str(argument) for argument in arguments]) == 0


def content(path: Any, kind: Any) -> list[tuple[Any, ...]]:
    """What the records of a file hold, without their place in it."""
    splits = read_splits(str(path), kind, validation_split_percentage=0, require=())
    records = [*splits.train, *splits.val, *splits.test]
    return [tuple(value for name, value in vars(record).items() if name != "where") for record in records]


@pytest.mark.parametrize("target", ["qa_pair", "instruction_pair", "prompt_pair"])
def test_pairs_come_back_the_same_from_every_format_that_holds_them(tmp_path: Path, target: str) -> None:
    source = write(tmp_path / "in.json", PAIRS)
    run(source, tmp_path / "mid.jsonl", "--to", target)
    run(tmp_path / "mid.jsonl", tmp_path / "back.json", "--to", "qa_pair")
    assert content(tmp_path / "mid.jsonl", "pair") == content(source, "pair") == content(tmp_path / "back.json", "pair")


def test_hh_holds_one_rejected_answer_a_row_and_context_before_the_first_turn(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", PAIRS)
    run(source, tmp_path / "out.jsonl", "--to", "hh")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0] == {"chosen": "\n\nHuman: a?\n\nAssistant: good", "rejected": "\n\nHuman: a?\n\nAssistant: bad", "margin": 2.0, "id": 1}
    assert [row["rejected"].split("Assistant:")[-1] for row in rows] == [" bad", "  worse\n", "  No.", " y"]
    assert rows[3]["chosen"] == "about b\n\nHuman: b?\n\nAssistant: x"
    assert content(tmp_path / "out.jsonl", "pair")[3] == content(source, "pair")[2]


def test_scores_become_answers_and_questions_with_a_word_about_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.json", {"train": SCORES, "test": [{**SCORES[0], "Question": "t?"}]})
    run(source, tmp_path / "sft.json", "--to", "instruction")
    assert json.loads((tmp_path / "sft.json").read_text())["test"] == [
        {"instruction": "t?", "context": "", "response": "b", "tags": ["x", None]}
    ]
    assert capsys.readouterr().out.splitlines() == [
        "dropped, since instruction cannot hold it: score (3 rows)",
        f"{tmp_path}/sft.json: train 2, test 1 rows as instruction",
    ]
    run(source, tmp_path / "prompts.jsonl", "--to", "prompt", "--split", "train")
    assert [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()] == [
        {"prompt": "a?", "tags": ["x", None]},
        {"prompt": HISTORY},
    ]
    assert "answer (2 rows)" in capsys.readouterr().out


def test_the_better_answer_of_a_pair_can_be_imitated(tmp_path: Path) -> None:
    run(write(tmp_path / "in.json", PAIRS[:1]), tmp_path / "out.jsonl", "--to", "qa")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"Question": "a?", "Answer": "good", "id": 1}


def test_columns_are_renamed_and_the_output_may_be_gzipped(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", [{"title": "a?", "votes": 3, "body": "b"}])
    run(source, tmp_path / "out.jsonl.gz", "--to", "qa_score", "--columns", "Question=title", "Answer=body", "Score=votes")
    assert json.loads(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes())) == {"Question": "a?", "Answer": "b", "Score": 3.0}


VOTES = [
    {"Question": "a?", "Answer": "worst", "Score": -1, "site": "s", "id": 1},
    {"Question": "a?", "Answer": "best", "Score": 5, "site": "s", "id": 2},
    {"Question": "A? ", "Answer": "mid", "Score": 2, "site": "s", "id": 3},
    {"Question": "a?", "Answer": "also best", "Score": 5, "site": "s", "id": 4},
    {"Question": "b?", "Answer": "alone", "Score": 9},
    {"Question": "c?", "Answer": "one", "Score": 0.3},
    {"Question": "c?", "Answer": "other", "Score": 0.2},
    {"Question": "d?", "Answer": "alike", "Score": 1},
    {"Question": "d?", "Answer": "alike too", "Score": 1},
]


def pairs_made(tmp_path: Path, *options: str, to: str = "qa_pair") -> list[dict[str, Any]]:
    run(write(tmp_path / "votes.json", VOTES), tmp_path / "pairs.json", "--to", to, "--force", *options)
    rows: list[dict[str, Any]] = json.loads((tmp_path / "pairs.json").read_text())["train"]
    return rows


def test_scores_become_pairs_of_the_best_answer_and_each_worse_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs_made(tmp_path) == [
        {"Question": "a?", "Accepted_Answer": "best", "Answer": ["mid", "worst"], "site": "s"},
        {"Question": "c?", "Accepted_Answer": "one", "Answer": "other"},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "3 pairs of chosen and rejected answers from 2 questions with a pair",
        "dropped, since qa_pair cannot hold it: id (1 question)",
        "dropped, since qa_pair cannot hold it: score (2 questions)",
        "left out: 1 question with one answer only",
        "left out: 1 question with no two answers far enough apart in their scores",
        f"{tmp_path}/pairs.json: train 2 rows as qa_pair",
    ]
    assert len(content(tmp_path / "pairs.json", "pair")) == 2


def test_pairs_of_scores_lie_a_gap_apart_and_may_be_all_there_are(tmp_path: Path) -> None:
    def chosen_and_rejected(*options: str) -> list[tuple[str, Any]]:
        return [(row["Accepted_Answer"], row["Answer"]) for row in pairs_made(tmp_path, *options)]

    assert chosen_and_rejected("--min_gap", "0.1") == [("best", ["mid", "worst"]), ("one", "other")]
    assert chosen_and_rejected("--min_gap", "0.11") == [("best", ["mid", "worst"])]
    assert chosen_and_rejected("--min_gap", "4") == [("best", "worst")]
    every = chosen_and_rejected("--pairs", "all")
    assert every == [("best", ["mid", "worst"]), ("also best", ["mid", "worst"]), ("mid", "worst"), ("one", "other")]


def test_the_difference_of_scores_is_a_margin_only_when_asked_for(tmp_path: Path) -> None:
    rows = pairs_made(tmp_path, "--margin", to="hh")
    assert [row["margin"] for row in rows] == [3.0, 6.0, 0.1]
    assert [margin for *_, margin, _ in content(tmp_path / "pairs.json", "pair")] == [3.0, 6.0, 0.1]
    assert not any("margin" in row for row in pairs_made(tmp_path, to="hh"))


REFUSED: dict[str, tuple[Any, str, list[str], str]] = {
    "no scores there": (
        [{"Question": "a", "Answer": "b"}],
        "o.json",
        ["--to", "qa_score"],
        "hold too little for qa_score; expected one of qa, instruction",
    ),
    "no scores to make pairs of": ([{"Question": "a", "Answer": "b"}], "o.json", ["--to", "qa_pair"], "hold too little for qa_pair"),
    "no pair is far enough apart": (
        [{"Question": "a", "Answer": str(score), "Score": score} for score in (1, 2)],
        "o.json",
        ["--to", "qa_pair", "--min_gap", "3"],
        r"no question gives a pair: no two answers far enough apart in their scores \(1\)$",
    ),
    "a gap below 0": (SCORES, "o.json", ["--to", "qa_pair", "--min_gap", "-1"], "--min_gap: got -1, expected a number of at least 0"),
    "a gap where no pairs are made": (
        SCORES,
        "o.json",
        ["--to", "qa", "--min_gap", "1", "--margin"],
        "--min_gap, --margin: no effect here",
    ),
    "prompts only": ([{"prompt": "a"}], "o.json", ["--to", "hh"], "hold too little for hh; expected one of prompt$"),
    "bad rows": ([{"Question": "a", "Answer": ""}], "o.json", ["--to", "qa"], "train row 1 .*: Answer: got empty text"),
    "several splits as lines": ({"train": SCORES, "val": SCORES}, "o.jsonl", ["--to", "qa"], "JSON Lines hold one split, got train, val"),
    "another ending": (SCORES, "o.csv", ["--to", "qa"], "expected one that ends in .json"),
    "no such folder": (SCORES, "x/o.json", ["--to", "qa"], "its folder does not exist"),
    "the split is empty": (SCORES, "o.json", ["--to", "qa", "--split", "test"], "test: got no rows"),
    "columns without =": (SCORES, "o.json", ["--to", "qa", "--columns", "Question"], "expected OURS=THEIRS"),
    "no rows": ([], "o.json", ["--to", "qa"], "got no rows"),
    "would read back otherwise": (
        [{"Question": "a", "Accepted_Answer": "b\n\nHuman: c\n\nAssistant: d", "Answer": "e"}],
        "o.json",
        ["--to", "hh"],
        "train row 1: cannot be written as hh so that it reads back the same",
    ),
}


@pytest.mark.parametrize(("rows", "name", "options", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    tmp_path: Path, rows: Any, name: str, options: list[str], expected: str
) -> None:
    source = write(tmp_path / "in.json", rows)
    with pytest.raises(UserError, match=expected):
        run(source, tmp_path / name, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_an_existing_file_is_replaced_only_when_asked_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.json", SCORES)
    out = tmp_path / "out.json"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already; --force replaces it"):
        run(source, out, "--to", "qa")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            run(source, out, "--to", "qa", "--force")
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]
    run(source, out, "--to", "qa", "--force")
    assert len(content(out, "sft")) == 2


def test_unusable_rows_are_dropped_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.json", [*SCORES, {"Question": "q", "Answer": "", "Score": 1}])
    with pytest.raises(UserError, match=r"--unusable_rows drop leaves such rows out\)$"):
        run(source, tmp_path / "out.json", "--to", "qa")
    run(source, tmp_path / "out.json", "--to", "qa", "--unusable_rows", "drop")
    assert "1 of 3 rows dropped" in capsys.readouterr().out


def test_help_lists_every_format_and_starts_without_torch(root: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "common.convert", "--help"], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0
    for form in FORMATS:
        if not form.name.endswith("_only"):
            assert f"  {form.name} " in result.stdout
    assert "\n  qa_score -> qa_score, qa_pair, instruction_pair, prompt_pair, hh, qa, instruction, prompt\n" in result.stdout
    assert "\n  qa_pair, instruction_pair, prompt_pair, hh -> " in result.stdout
    assert not {"torch", "transformers", "datasets"} & {line.split("|")[-1].strip() for line in result.stderr.splitlines()}


def test_errors_are_lines_and_exit_code_2(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "common.convert", str(tmp_path / "none.json"), str(tmp_path / "o.json"), "--to", "qa"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path}/none.json: no such file\n"


def test_real_dialogues_come_back_to_the_letter(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "hh_harmless_mild.jsonl.gz"
    run(source, tmp_path / "a.jsonl", "--to", "prompt_pair", "--unusable_rows", "drop")
    run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--to", "hh")
    original = [json.loads(line) for line in gzip.decompress(source.read_bytes()).decode().splitlines()]
    back = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert back == [row for number, row in enumerate(original, 1) if number not in (159, 346)]


# --- what llm-on-ray's process_data*.py did ---------------------------------------------------------------------------------------------


def message(name: str, parent: str | None, text: str, rank: float | None = None, **more: Any) -> dict[str, Any]:
    role = "prompter" if parent is None or parent.startswith("a") else "assistant"
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en", **more}


MESSAGES = [
    message("q1", None, "Why?"),
    message("a1", "q1", "Because.", 0.0),
    message("a2", "q1", "No idea.", 2.0),
    message("a3", "q1", "Hm.", 1.0),
    message("q2", "a1", "Really?"),
    message("a4", "q2", "Really.", 0),
    message("q3", None, "Warum?", lang="de"),
    message("a5", "q3", "Darum.", 0.0, lang="de"),
    message("a6", "q9", "An answer to nothing.", 0.0),
    message("a7", "q2", "Nobody compared this."),
    message("a8", "q2", "Taken back.", 3.0, deleted=True),
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_answers_in_message_trees_become_rows_for_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "messages.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    run(source, tmp_path / "out.jsonl", "--to", "instruction", "--lang", "en")
    assert lines(tmp_path / "out.jsonl") == [
        {"instruction": "Why?", "context": "", "response": "Because."},
        {"instruction": "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:", "response": " Really."},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "left out: answers to a message that is not there (1)",
        f"{tmp_path}/out.jsonl: train 2 rows as instruction",
    ]
    run(source, tmp_path / "all.jsonl", "--to", "instruction")
    assert lines(tmp_path / "all.jsonl")[2] == {"instruction": "Warum?", "context": "", "response": "Darum."}


def test_ranks_in_message_trees_become_pairs_and_every_message_a_prompt(tmp_path: Path) -> None:
    source = write(tmp_path / "messages.json", {"train": MESSAGES, "validation": [message("x", None, "Eh?")]})
    run(source, tmp_path / "best.jsonl", "--to", "prompt_pair", "--split", "train")
    assert lines(tmp_path / "best.jsonl") == [{"prompt": "Why?", "chosen": "Because.", "rejected": ["Hm.", "No idea."]}]
    run(source, tmp_path / "all.jsonl", "--to", "prompt_pair", "--split", "train", "--pairs", "all")
    assert [(row["chosen"], row["rejected"]) for row in lines(tmp_path / "all.jsonl")] == [
        ("Because.", ["Hm.", "No idea."]),
        ("Hm.", "No idea."),
    ]
    run(source, f"{tmp_path}/prompts/", "--to", "prompt", "--lang", "en")
    assert [row["prompt"][:5] for row in lines(tmp_path / "prompts/train.jsonl")] == ["Why?", "\n\nHum"]


def test_messages_with_faults_are_told_by_row(tmp_path: Path) -> None:
    rows = [message("q", None, "Why?"), {**message("a", "q", "So."), "role": "user", "rank": "first"}, message("b", "q", None)]  # type: ignore[arg-type]
    source = write(tmp_path / "m.json", rows)
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "out.json", "--to", "qa")
    assert list(caught.value.problems) == [
        f"{source}: train row 2: role: got 'user', expected prompter or assistant",
        f"{source}: train row 2: rank: got 'first', expected a number or null",
        f"{source}: train row 3: text: got None, expected text",
    ]
    with pytest.raises(UserError, match="whose ranks order the answers to one message alone"):
        run(write(tmp_path / "ok.json", MESSAGES), tmp_path / "o.json", "--to", "qa_score")
    with pytest.raises(UserError, match="got no rows that can be qa, expected some"):
        run(tmp_path / "ok.json", tmp_path / "o.json", "--to", "qa", "--lang", "fr")
    with pytest.raises(UserError, match=r"--lang: got en, but the rows of .* are no messages"):
        run(write(tmp_path / "p.json", PAIRS), tmp_path / "o.json", "--to", "qa_pair", "--lang", "en")


def test_a_folder_gets_a_file_for_each_split_that_stages_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "response": "r", "chosen": "c", "rejected": "d"} for number in range(3)]  # as in Dahoas/rm-static
    source = write(tmp_path / "in.json", {"train": rows[:2], "test": rows[2:]})
    arguments = [source, f"{tmp_path}/reward/", "--to", "prompt_pair"]
    assert convert.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == ["test.jsonl", "train.jsonl"]
    assert lines(tmp_path / "reward/test.jsonl") == [{"prompt": "p2", "chosen": "c", "rejected": "d"}]
    splits = read_splits(str(tmp_path / "reward"), "pair", validation_split_percentage=0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2, 0, 1)
    with pytest.raises(UserError, match=r"train\.jsonl: is there already"):
        convert.main(arguments)
    assert convert.main([*arguments, "--force"]) == 0


def test_columns_of_other_names_become_the_formats_own(tmp_path: Path) -> None:
    """As in alpaca; an answer that is empty is left out."""
    rows = [{"instruction": "Add.", "input": "1 and 1", "output": "2"}, {"instruction": "Say nothing.", "input": "", "output": ""}]
    source = write(tmp_path / "in.json", rows)
    run(source, tmp_path / "out.jsonl", "--to", "instruction", "--columns", "context=input", "response=output", "--unusable_rows", "drop")
    assert lines(tmp_path / "out.jsonl") == [{"instruction": "Add.", "context": "1 and 1", "response": "2"}]
