"""Rows of every format become the records they should, and every bad row is an error with file, row and key."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.records import (
    PairRecord,
    Prompt,
    PromptRecord,
    ScoreRecord,
    SFTRecord,
    Splits,
    normalise_question,
    question_key,
    read_splits,
    source_kind,
)

DIALOGUE = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: How old are you?\n\nAssistant:"
TURNS = (("Hi there", "Hello!"),)


def write(path: Path, content: Any) -> str:
    """A file of JSON, text or bytes; gives its path."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def read_rows(tmp_path: Path, rows: list[Any], kind: Any, **options: Any) -> list[Any]:
    """The records of a file that holds these rows, read as train without a validation split."""
    path = write(tmp_path / "data.json", {"train": rows})
    return read_splits(path, kind, validation_split_percentage=0.0, **options).train


def problems_of(tmp_path: Path, rows: list[Any], kind: Any, **options: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        read_rows(tmp_path, rows, kind, **options)
    return [problem.removeprefix(f"{tmp_path}/data.json: ") for problem in raised.value.problems]


# --- formats ---------------------------------------------------------------------------------------------------------------------

Q = Prompt("q?")
FORMATS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "qa": ("sft", {"Question": "q?", "Answer": "a"}, (Q, "a")),
    "qa with context": ("sft", {"Question": "q?", "context": "c", "Answer": "a"}, (Prompt("q?", "c"), "a")),
    "instruction": ("sft", {"instruction": "q?", "context": "", "response": "a"}, (Q, "a")),
    "instruction without context": ("sft", {"instruction": "q?", "response": "a"}, (Q, "a")),
    "instruction, context null": ("sft", {"instruction": "q?", "context": None, "response": "a"}, (Q, "a")),
    "instruction with context": ("sft", {"instruction": "q?", "context": "c", "response": "a"}, (Prompt("q?", "c"), "a")),
    "instruction that is a dialogue": ("sft", {"instruction": DIALOGUE, "response": " 5"}, (Prompt("How old are you?", "", TURNS), "5")),
    "qa_score": ("score", {"Question": "q?", "Answer": "a", "Score": 1.5}, (Q, "a", 1.5)),
    "qa_score, an integer": ("score", {"Question": "q?", "Answer": "a", "Score": -3}, (Q, "a", -3.0)),
    "score rows for SFT": ("sft", {"Question": "q?", "Answer": "a", "Score": 2}, (Q, "a")),
    "qa_pair": ("pair", {"Question": "q?", "Accepted_Answer": "a", "Answer": "b"}, (Q, "a", ("b",), None)),
    "qa_pair, several rejected": ("pair", {"Question": "q?", "Accepted_Answer": "a", "Answer": ["b", "c"]}, (Q, "a", ("b", "c"), None)),
    "qa_pair, margin": ("pair", {"Question": "q?", "Accepted_Answer": "a", "Answer": "b", "Margin": 2}, (Q, "a", ("b",), 2.0)),
    "instruction_pair": ("pair", {"instruction": "q?", "chosen": "a", "rejected": "b", "margin": 0.5}, (Q, "a", ("b",), 0.5)),
    "prompt_pair": ("pair", {"prompt": "q?", "chosen": "a", "rejected": "b"}, (Q, "a", ("b",), None)),
    "prompt_pair, a dialogue": (
        "pair",
        {"prompt": DIALOGUE, "chosen": " 5", "rejected": "  6 "},
        (Prompt("How old are you?", "", TURNS), "5", (" 6 ",), None),
    ),
    "hh, a system prompt": (
        "pair",
        {"chosen": f"Be kind.{DIALOGUE} a", "rejected": f"Be kind.{DIALOGUE} b", "margin": 3},
        (Prompt("How old are you?", "Be kind.", TURNS), "a", ("b",), 3.0),
    ),
    "hh, without the first line breaks": (
        "pair",
        {"chosen": "Human: q?\n\nAssistant: a", "rejected": "Human: q?\n\nAssistant: say Human: b"},
        (Q, "a", ("say Human: b",), None),
    ),
    "hh": (
        "pair",
        {"chosen": f"{DIALOGUE} I am 5.", "rejected": f"{DIALOGUE} I am\n\n6."},
        (Prompt("How old are you?", "", TURNS), "I am 5.", ("I am\n\n6.",), None),
    ),
    "prompt": ("prompt", {"prompt": "q?"}, (Q,)),
    "prompt that is a dialogue": ("prompt", {"prompt": DIALOGUE}, (Prompt("How old are you?", "", TURNS),)),
    "prompt, dialogue open": ("prompt", {"prompt": "\n\nHuman: q?"}, (Q,)),
    "Question alone": ("prompt", {"Question": "q?"}, (Q,)),
    "instruction alone": ("prompt", {"instruction": "q?", "context": "c"}, (Prompt("q?", "c"),)),
}


@pytest.mark.parametrize(("kind", "row", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_row_of_every_format(tmp_path: Path, kind: str, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    [record] = read_rows(tmp_path, [row | {"id": 7}], kind)
    types = {"sft": SFTRecord, "score": ScoreRecord, "pair": PairRecord, "prompt": PromptRecord}
    columns = {"id": 7} | ({"Score": 2} if kind == "sft" and "Score" in row else {})
    assert record == types[kind](*expected, columns, f"{tmp_path}/data.json: train row 1")


@pytest.mark.parametrize(("kind", "row", "expected"), FORMATS.values(), ids=FORMATS)
def test_rows_of_every_format_serve_as_prompts(tmp_path: Path, kind: str, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """What is not the question stays beside it, for reward functions."""
    [record] = read_rows(tmp_path, [row], "prompt")
    assert record.prompt == expected[0]
    assert record.columns == {key: value for key, value in row.items() if key not in ("Question", "instruction", "prompt", "context")}


def test_columns_rename(tmp_path: Path) -> None:
    rows = [{"title": "q?", "body": "a", "Answer": "other", "votes": 3}]
    [record] = read_rows(tmp_path, rows, "score", columns={"Question": "title", "Answer": "body", "Score": "votes"})
    assert (record.prompt, record.answer, record.score) == (Q, "a", 3.0)
    assert record.columns == {"Answer (file)": "other"}


def test_the_better_answers_of_pairs_can_be_imitated(tmp_path: Path) -> None:
    rows = [{"Question": "q?", "Accepted_Answer": "good", "Answer": "bad"}]
    [record] = read_rows(tmp_path, rows, "sft", columns={"Answer": "Accepted_Answer"})
    assert record.answer == "good"
    rows = [{"prompt": "q?", "chosen": "good", "rejected": "bad"}]
    [record] = read_rows(tmp_path, rows, "sft", columns={"instruction": "prompt", "response": "chosen"})
    assert (record.prompt.question, record.answer) == ("q?", "good")


def test_source_kind_is_the_most_that_rows_hold(tmp_path: Path) -> None:
    for kind, row, _ in FORMATS.values():
        expected = "score" if "Score" in row else kind
        assert source_kind(write(tmp_path / "data.json", [row])) == expected


# --- bad rows --------------------------------------------------------------------------------------------------------------------

GOOD = {
    "sft": {"Question": "good?", "Answer": "yes"},
    "score": {"Question": "good?", "Answer": "yes", "Score": 1},
    "pair": {"Question": "good?", "Accepted_Answer": "yes", "Answer": "no"},
    "prompt": {"prompt": "good?"},
}
DEEP = json.loads("[" * 99 + "]" * 99)
DROP = " (unusable_rows: drop leaves such rows out)"
BAD_ROWS: dict[str, tuple[str, Any, list[str]]] = {
    "text is a number": ("sft", {"Question": 5, "Answer": "a"}, ["Question: got 5 (a number), expected text"]),
    "text is null": ("sft", {"Question": "q", "Answer": None}, ["Answer: got null, expected text"]),
    "text is a list": ("sft", {"Question": "q", "Answer": ["a"]}, ['Answer: got ["a"] (a list), expected text']),
    "both at once": (
        "sft",
        {"Question": {}, "Answer": True},
        ["Question: got {} (an object), expected text", "Answer: got true, expected text"],
    ),
    "empty question": ("sft", {"Question": " \n", "Answer": "a"}, [f"Question: got empty text, expected some{DROP}"]),
    "empty answer": ("sft", {"Question": "q", "Answer": ""}, [f"Answer: got empty text, expected some{DROP}"]),
    "empty prompt": ("prompt", {"prompt": ""}, [f"prompt: got empty text, expected some{DROP}"]),
    "score NaN": ("score", {"Question": "q", "Answer": "a", "Score": float("nan")}, ["Score: got NaN, expected a finite number"]),
    "score infinite": (
        "score",
        {"Question": "q", "Answer": "a", "Score": float("-inf")},
        ["Score: got -Infinity, expected a finite number"],
    ),
    "score too large": (
        "score",
        {"Question": "q", "Answer": "a", "Score": 10**400},
        [f"Score: got {'1' + '0' * 36}..., expected a finite number"],
    ),
    "score text": ("score", {"Question": "q", "Answer": "a", "Score": "3"}, ['Score: got "3" (text), expected a number']),
    "score bool": ("score", {"Question": "q", "Answer": "a", "Score": True}, ["Score: got true, expected a number"]),
    "score null": ("score", {"Question": "q", "Answer": "a", "Score": None}, ["Score: got null, expected a number"]),
    "chosen equal to rejected": (
        "pair",
        {"Question": "q", "Accepted_Answer": "a", "Answer": "a "},
        [f"Answer: got the same text as Accepted_Answer, expected a different answer{DROP}"],
    ),
    "one of several rejected equal": (
        "pair",
        {"Question": "q", "Accepted_Answer": "a", "Answer": ["b", "a"]},
        [f"Answer: got the same text as Accepted_Answer, expected a different answer{DROP}"],
    ),
    "no rejected": (
        "pair",
        {"Question": "q", "Accepted_Answer": "a", "Answer": []},
        ["Answer: got an empty list, expected an answer or several"],
    ),
    "margin text": ("pair", {**GOOD["pair"], "margin": "big"}, ['margin: got "big" (text), expected a number']),
    "two margins": ("pair", {**GOOD["pair"], "margin": 1, "Margin": 1}, ["Margin: got margin beside it, expected one of the two"]),
    "no object": ("sft", ["Question", "Answer"], ['got ["Question", "Answer"] (a list), expected an object with keys']),
    "misspelt": ("sft", {"Question": "q", "Anwser": "a"}, ["Anwser: got an unknown key, expected Answer (did you mean Answer?)"]),
    "other case": (
        "score",
        {"Question": "q", "Answer": "a", "score": 1},
        ["score: got an unknown key, expected Score (did you mean Score?)"],
    ),
    "other case of both": (
        "sft",
        {"question": "q", "answer": "a"},
        [
            "question: got an unknown key, expected Question (did you mean Question?)",
            "answer: got an unknown key, expected Answer (did you mean Answer?)",
        ],
    ),
    "context in other case": (
        "sft",
        {"Question": "q", "Context": "c", "Answer": "a"},
        ["Context: unknown key, expected context; keys are read to the letter (did you mean context?)"],
    ),
    "a pair in other case is no SFT row": (
        "sft",
        {"Question": "q", "accepted_answer": "a", "Answer": "b"},
        ["accepted_answer: unknown key, expected Accepted_Answer; keys are read to the letter (did you mean Accepted_Answer?)"],
    ),
    "missing": (
        "pair",
        {"prompt": "q", "chosen": "a"},
        ["rejected: missing, expected it beside prompt, chosen (the row suits PPO (rlhf/))"],
    ),
    "columns of another script, and unprintable ones": (
        "sft",
        {"问题": 1, "a\n\x07": 2},
        ['keys: got "问题", "a\\n\\u0007", expected Question/Answer or instruction/response (data.columns renames)'],
    ),
    "nothing known": (
        "sft",
        {"a": 1, "b": 2},
        ['keys: got "a", "b", expected Question/Answer or instruction/response (data.columns renames)'],
    ),
    "SFT rows for regression": (
        "score",
        {"Question": "q", "Answer": "a"},
        ["keys: got Question/Answer, which suits SFT (sft/); expected Question/Answer/Score"],
    ),
    "score rows for classification": (
        "pair",
        {"Question": "q", "Answer": "a", "Score": 1},
        [
            "keys: got Question/Answer/Score, which suits reward_model/regression; expected Question/Accepted_Answer/Answer "
            "or instruction/chosen/rejected or prompt/chosen/rejected or chosen/rejected"
        ],
    ),
    "pairs for SFT": (
        "sft",
        {"Question": "q", "Accepted_Answer": "a", "Answer": "b"},
        [
            "keys: got Question/Accepted_Answer/Answer, which suits reward_model/classification; "
            "expected Question/Answer or instruction/response (to imitate the better answers: columns: {Answer: Accepted_Answer})"
        ],
    ),
    "prompts for SFT": (
        "sft",
        {"prompt": "q"},
        ["keys: got prompt, which suits PPO (rlhf/); expected Question/Answer or instruction/response"],
    ),
    "two columns that are one without NUL": (
        "sft",
        {**GOOD["sft"], "a\x00": 1, "a\ufffd": 2},
        ["a\ufffd: got a key that is another one's, once NUL characters and halves of surrogate pairs are replaced"],
    ),
    "another column nested too deep": (
        "sft",
        {**GOOD["sft"], "x": DEEP},
        ["x: got nesting deeper than 64, expected plain values"],
    ),
    "transcript without answers in turn": (
        "prompt",
        {"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:"},
        [f"prompt: turn 2 is Human's, expected Human and Assistant in turn{DROP}"],
    ),
    "transcript with the answer in it": (
        "prompt",
        {"prompt": "\n\nHuman: a\n\nAssistant: b"},
        [f"prompt: the dialogue ends with an answer, expected it to end in Human's turn or in 'Assistant:'{DROP}"],
    ),
    "hh: no transcript": (
        "pair",
        {"chosen": "a", "rejected": "b"},
        [
            f'{key}: got "{text}", expected a dialogue that begins with "\\n\\nHuman:" (or a prompt beside chosen and rejected){DROP}'
            for key, text in [("chosen", "a")]
        ],
    ),
    "hh: differs before the last answer": (
        "pair",
        {"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b".replace("old", "young")},
        [f"rejected: differs from chosen in turn 3 already (4 and 4 turns), expected dialogues that differ in the last answer only{DROP}"],
    ),
    "hh: one goes on": (
        "pair",
        {"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} a\n\nHuman: ?\n\nAssistant: b"},
        [
            'rejected: differs from chosen in turn 5 already (6 and 4 turns; "\\n\\nHuman:" inside an answer begins a turn), '
            f"expected dialogues that differ in the last answer only{DROP}"
        ],
    ),
    "hh: Human inside an answer": (
        "pair",
        {"chosen": f"{DIALOGUE} a\n\nHuman: ?\n\nAssistant: a", "rejected": f"{DIALOGUE} b"},
        [
            'rejected: differs from chosen in turn 4 already (4 and 6 turns; "\\n\\nHuman:" inside an answer begins a turn), '
            f"expected dialogues that differ in the last answer only{DROP}"
        ],
    ),
    "hh: other text before the first turn": (
        "pair",
        {"chosen": f"Be kind.{DIALOGUE} a", "rejected": f"{DIALOGUE} b"},
        [f"rejected: differs from chosen before the first turn, expected the same text there{DROP}"],
    ),
    "hh: Assistant begins": (
        "pair",
        {"chosen": "\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "rejected": f"{DIALOGUE} b"},
        [
            'chosen: got "\\n\\nAssistant: a\\n\\nHuman: b\\n\\nAssi..., '
            f'expected a dialogue that begins with "\\n\\nHuman:" (or a prompt beside chosen and rejected){DROP}'
        ],
    ),
    "hh: two questions in turn": (
        "pair",
        {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": f"{DIALOGUE} b"},
        [f"chosen: turn 2 is Human's, expected Human and Assistant in turn{DROP}"],
    ),
    "hh: empty answer": (
        "pair",
        {"chosen": f"{DIALOGUE} ", "rejected": f"{DIALOGUE} b"},
        [f"chosen: got a dialogue whose last answer is empty, expected some text{DROP}"],
    ),
    "hh: same answer": (
        "pair",
        {"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} a"},
        [f"rejected: got the same text as chosen, expected a different answer{DROP}"],
    ),
    "hh: ends in a question": (
        "pair",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": f"{DIALOGUE} b"},
        [f"chosen: got a dialogue that ends in Human's turn, expected Assistant's answer last{DROP}"],
    ),
}


@pytest.mark.parametrize(("kind", "row", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_file_row_and_key(tmp_path: Path, kind: str, row: Any, expected: list[str]) -> None:
    assert problems_of(tmp_path, [row], kind) == [f"train row 1 (line 1): {problem}" for problem in expected]


def test_nul_and_half_surrogate_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    rows = [
        GOOD["sft"],
        {"Question": "a\x00", "Answer": "\ud83d x", "tags": [{"\udc00k": "\x00"}], "\x00": 1},
        {"Question": "q \U0001f600", "Answer": "b", "tags": "\ud800"},
    ]
    path = write(tmp_path / "data.json", rows)
    splits = read_splits(path, "sft", validation_split_percentage=0)
    assert [(record.prompt.question, record.answer, record.columns) for record in splits.train[1:]] == [
        ("a\ufffd", "\ufffd x", {"tags": [{"\ufffdk": "\ufffd"}], "\ufffd": 1}),
        ("q \U0001f600", "b", {"tags": "\ufffd"}),
    ]
    assert splits.notes == (
        f"{path}: 2 of 3 rows held NUL characters and halves of surrogate pairs, read as U+FFFD, "
        "the first being train row 2: tags, \ufffd, Question, Answer",
    )


def test_all_problems_are_told_at_once_up_to_twenty(tmp_path: Path) -> None:
    rows: list[Any] = [{"Question": "", "Answer": "a"}, GOOD["sft"], *[{"Question": "q", "Answer": "a", f"x{n}": DEEP} for n in range(24)]]
    problems = problems_of(tmp_path, rows, "sft")
    assert len(problems) == 21
    assert problems[0].startswith("train row 1 (line 1): Question: got empty text")
    assert problems[1] == "train row 3 (line 1): x0: got nesting deeper than 64, expected plain values"
    assert problems[20] == "... and 5 more problems"
    assert problems_of(tmp_path, rows[:-4], "sft")[20] == "... and 1 more problem"


def test_the_same_problem_of_several_splits_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", {"train": [{"a": 1}] * 5, "val": [{"a": 1}], "test": [{"a": 1}, {"b": 1}]})
    with pytest.raises(UserError) as raised:
        read_splits(path, "sft")
    expected = "expected Question/Answer or instruction/response (data.columns renames)"
    assert raised.value.problems == (
        f'{path}: train rows 1, 2, 3 and 2 more, val row 1 (line 1), test row 1 (line 1): keys: got "a", {expected}',
        f'{path}: test row 2 (line 1): keys: got "b", {expected}',
    )


def test_the_same_problem_of_many_rows_is_one_line(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, [{"a": 1}] * 50, "sft")
    assert len(problems) == 1 and problems[0].startswith("train rows 1, 2, 3 and 47 more: keys: got")
    scores = [{**GOOD["score"], "Score": score} for score in (1, "1", 2, "2", "3", None, "1")]
    assert problems_of(tmp_path, scores, "score") == [
        'train rows 2, 4, 5 and 1 more (from line 1 on): Score: got text ("1" in row 2), expected a number',
        "train row 6 (line 1): Score: got null, expected a number",
    ]
    assert problems_of(tmp_path, [{**GOOD["sft"], "Answer": ""}] * 2, "sft") == [
        f"train rows 1 and 2: Answer: got empty text, expected some{DROP}"
    ]


def test_a_fault_of_a_row_is_told_before_rows_of_another_shape(tmp_path: Path) -> None:
    rows = [GOOD["sft"], *[{"prompt": "q"}, {"instruction": "q", "response": "a"}] * 30, {**GOOD["sft"], "Answer": 7}]
    first, *others = problems_of(tmp_path, rows, "sft")
    assert first == "train row 62 (line 1): Answer: got 7 (a number), expected text"
    assert [problem.split(": ")[0] for problem in others] == [
        "train rows 2, 4, 6 and 27 more (from line 1 on)",
        "train rows 3, 5, 7 and 27 more (from line 1 on)",
    ]


def test_sft_and_ppo_read_rows_with_and_without_a_score_from_one_file(tmp_path: Path) -> None:
    rows = [GOOD["score"], GOOD["sft"], {**GOOD["score"], "Score": "not read"}]
    for kind in ("sft", "prompt"):
        assert len(read_rows(tmp_path, rows, kind)) == 3
    assert read_splits(str(tmp_path / "data.json"), "sft").notes[0] == (
        f"{tmp_path}/data.json: some rows hold a Score (reward_model/regression learns from it); SFT imitates every answer alike"
    )
    assert source_kind(str(tmp_path / "data.json")) == "sft"
    assert [problem.split(": ")[:2] for problem in problems_of(tmp_path, rows, "score")] == [
        ["train row 3 (line 1)", "Score"],
        ["train row 2 (line 1)", "keys"],
    ]


def test_one_file_holds_rows_of_one_shape(tmp_path: Path) -> None:
    rows = [GOOD["sft"], {"instruction": "q", "response": "a"}, GOOD["sft"]]
    assert problems_of(tmp_path, rows, "sft") == [
        "train row 2 (line 1): keys: got instruction/response, expected Question/Answer as in train row 1: one file holds rows of one shape"
    ]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"Question": "a", "Answer": "b"}\n{"Question": "a", "Question": "c", "Answer": "b"}\n')
    with pytest.raises(UserError) as raised:
        read_splits(path, "sft")
    assert raised.value.problems == (f"{path}: train row 2 (line 2): Question: got this key twice, expected it once",)


def test_columns_that_name_nothing(tmp_path: Path) -> None:
    assert problems_of(tmp_path, [GOOD["sft"]], "sft", columns={"Qestion": "title"})[0].startswith(
        "columns.Qestion: unknown name, expected one of"
    )
    assert problems_of(tmp_path, [GOOD["sft"]], "sft", columns={"Question": "title"}) == [
        'train row 1 (line 1): title: missing, expected as columns.Question says; the row has "Question", "Answer"'
    ]
    assert problems_of(tmp_path, [GOOD["sft"]], "sft", columns={"Answer": "response"})[0].endswith(
        'the row has "Question", "Answer" (the other way round? columns: {response: Answer})'
    )
    assert problems_of(tmp_path, [GOOD["sft"]], "sft", columns={"title": "Question"})[0].endswith(
        "(our name stands first, the file's second: {Question: title})"
    )
    assert problems_of(tmp_path, [GOOD["sft"]], "sft", columns={"context": "passage"}) == [
        "passage: in no row, expected as columns.context says"
    ]


def test_unusable_rows_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    rows = [GOOD["pair"], {**GOOD["pair"], "Answer": "yes"}, {**GOOD["pair"], "Question": ""}]
    path = write(tmp_path / "data.json", rows)
    splits = read_splits(path, "pair", unusable_rows="drop", validation_split_percentage=0)
    assert len(splits.train) == 1
    assert splits.notes[0].startswith(
        f"{path}: 2 of 3 rows dropped as unusable, the first being {path}: train row 2 (line 1): Answer: got the same"
    )


def test_errors_are_never_dropped(tmp_path: Path) -> None:
    rows = [GOOD["score"], {**GOOD["score"], "Score": "x", "Answer": ""}]
    assert problems_of(tmp_path, rows, "score", unusable_rows="drop") == ['train row 2 (line 1): Score: got "x" (text), expected a number']


# --- sources ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_splits(tmp_path: Path) -> None:
    row = GOOD["sft"]
    write(tmp_path / "train.jsonl", json.dumps(row) + "\n")
    write(tmp_path / "validation.json", [{**row, "Question": "v"}])
    write(tmp_path / "test.json.gz", gzip.compress(json.dumps([{**row, "Question": "t"}] * 2).encode()))
    write(tmp_path / "notes.txt", "not data")
    write(tmp_path / "more.json", "[]")
    splits = read_splits(str(tmp_path), "sft")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1, 1, 2]
    assert splits.test[1].where == f"{tmp_path}/test.json.gz: test row 2"
    assert splits.notes == (f"{tmp_path}: not read, since not named by a split: more.json",)


def test_a_folder_that_holds_one_file_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "cqa.json", {"train": [GOOD["sft"]], "val": [{**GOOD["sft"], "Question": "v"}]})
    assert len(read_splits(str(tmp_path), "sft").val) == 1


FOLDERS = {
    "empty": ({}, "got no data file, expected a folder with train.json"),
    "two of one split": ({"val.json": [], "dev.json": []}, "val.json: a second file for the val split beside dev.json, expected one"),
    "splits in a split": ({"train.json": {"train": []}}, "train.json: got a file with splits of its own in a folder of splits"),
    "no split": ({"a.json": [], "b.json": []}, "got a.json, b.json, expected a folder with train.json"),
}


@pytest.mark.parametrize(("files", "expected"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_cannot_be_read(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=expected):
        read_splits(str(tmp_path), "sft")


def test_missing_files_and_zero_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "cqa_sft.json", {"train": [], "test": [GOOD["sft"]]})
    with pytest.raises(UserError, match=r"cqa_stf.json: no such file \(did you mean .*/cqa_sft.json\?\)"):
        read_splits(str(tmp_path / "cqa_stf.json"), "sft")
    with pytest.raises(UserError, match=r"train: got no rows, expected some; rows there are: test 1$"):
        read_splits(path, "sft")
    with pytest.raises(
        UserError, match=r"test: got no rows, expected some; rows there are: train 1 \(a file without named splits is all train\)"
    ):
        read_splits(write(tmp_path / "a.json", [GOOD["sft"]]), "sft", require=("test",))
    assert len(read_splits(path, "sft", require=("test",)).test) == 1


def test_a_hub_data_set_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for a hub name: it takes the same road through `datasets`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"Question": "a?", "context": None, "Answer": "x"}, {"Question": "b?", "context": "c", "Answer": "y"}]
    write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "validation.jsonl", json.dumps({**rows[1], "Question": "v?"}) + "\n")
    from datasets import Dataset, DatasetDict

    splits = read_splits(f"hf:{folder}", "sft")
    assert [record.prompt for record in splits.train] == [Prompt("a?"), Prompt("b?", "c")]
    assert [record.prompt.question for record in splits.val] == ["v?"]
    assert splits.train[1].where == f"hf:{folder}: train row 2"
    loaded = DatasetDict({"train": Dataset.from_list(rows), "train_sft": Dataset.from_list(rows)})
    monkeypatch.setattr("common.records._datasets_loader", lambda: lambda name, config, data_dir: loaded)
    assert read_splits("hf:a:b", "sft", validation_split_percentage=0).notes == (
        "hf:a:b: not read, since not named train, val or test: train_sft",
    )


@pytest.mark.parametrize(
    ("path", "asked"),
    {
        "hf:squad": ("squad", None, None),
        "hf:squad:plain": ("squad", "plain", None),
        "hf:Anthropic/hh-rlhf": ("Anthropic/hh-rlhf", None, None),
        "hf:Anthropic/hh-rlhf/helpful-base": ("Anthropic/hh-rlhf", None, "helpful-base"),
        "hf:org/name/a/b:config": ("org/name", "config", "a/b"),
    }.items(),
)
def test_a_folder_of_a_hub_data_set_stands_after_its_name(
    path: str, asked: tuple[str, str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(name: str, config: str | None, data_dir: str | None) -> dict[str, list[dict[str, str]]]:
        calls.append((name, config, data_dir))
        return {"train": [{"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}] * 2}

    monkeypatch.setattr("common.records._datasets_loader", lambda: load)
    assert len(read_splits(path, "pair", validation_split_percentage=0).train) == 2
    assert calls == [asked]


def test_a_copy_of_the_hubs_folder_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hh-rlhf lies on the hub: a folder for each subset, gzipped JSON Lines in it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("helpful-base", "harmless-base"):
        folder = tmp_path / "hh" / name
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            row = {"chosen": f"\n\nHuman: {name} {split}\n\nAssistant: a", "rejected": f"\n\nHuman: {name} {split}\n\nAssistant: b"}
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    splits = read_splits(f"hf:{tmp_path / 'hh'}", "pair", validation_split_percentage=0)
    assert [record.prompt.question for record in splits.test] == ["harmless-base test", "helpful-base test"]
    one = read_splits(str(tmp_path / "hh" / "helpful-base"), "pair", validation_split_percentage=0)
    assert [record.prompt.question for record in one.train] == ["helpful-base train"]


def test_a_hub_data_set_without_network_is_one_clear_line() -> None:
    with pytest.raises(UserError) as raised:
        read_splits("hf:someone/some-data-set:config", "sft")
    [problem] = raised.value.problems
    assert problem.startswith("hf:someone/some-data-set:config: cannot be loaded: ") and "without network" in problem


# --- splits ----------------------------------------------------------------------------------------------------------------------


def questions(records: list[Any]) -> list[str]:
    return [record.prompt.question for record in records]


def many(tmp_path: Path, order: int = 1, **options: Any) -> Splits[ScoreRecord]:
    """40 questions, three answers each; the answers to a question differ in the case and spacing of the question."""
    forms = ("What is {}?", "what  is {}?", " WHAT is\n{}?")
    rows = [{"Question": form.format(number), "Answer": f"{form}{number}", "Score": 1} for form in forms for number in range(40)]
    return read_splits(write(tmp_path / "many.json", rows[::order]), "score", **options)


def test_validation_is_taken_from_train_by_question(tmp_path: Path) -> None:
    splits = many(tmp_path, validation_split_percentage=10.0)
    train, val = ({normalise_question(text) for text in questions(part)} for part in (splits.train, splits.val))
    assert (len(splits.train), len(splits.val), len(train), len(val)) == (108, 12, 36, 4)
    assert not train & val
    assert splits.notes == (f"{tmp_path}/many.json: no val split: 4 of 40 train questions (12 of 120 rows) held out for validation",)


def test_which_questions_are_held_out_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    held = {
        seed: {question_key(record.prompt) for record in many(tmp_path, seed=seed, validation_split_percentage=10).val} for seed in (1, 2)
    }
    assert held[1] != held[2]
    assert {question_key(record.prompt) for record in many(tmp_path, -1, seed=1, validation_split_percentage=10).val} == held[1]


def test_at_least_one_question_is_held_out_and_at_least_one_is_left(tmp_path: Path) -> None:
    assert len(many(tmp_path, validation_split_percentage=0.1).val) == 3
    assert len({question_key(record.prompt) for record in many(tmp_path, validation_split_percentage=99.9).train}) == 1
    assert many(tmp_path, validation_split_percentage=0).val == []
    with pytest.raises(UserError, match="val: got no rows"):
        read_splits(write(tmp_path / "one.json", [GOOD["sft"]] * 3), "sft", require=("train", "val"))


def test_a_validation_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", {"train": [GOOD["sft"]], "val": [{**GOOD["sft"], "Question": "old"}]})
    plain = write(tmp_path / "plain.jsonl", json.dumps({**GOOD["sft"], "Question": "plain"}))
    with_splits = write(tmp_path / "splits.json", {"train": [GOOD["sft"]], "val": [{**GOOD["sft"], "Question": "split"}]})
    without_val = write(tmp_path / "no_val.json", {"train": [GOOD["sft"]]})
    splits = read_splits(path, "sft", validation_file=plain)
    assert questions(splits.val) == ["plain"]
    assert splits.notes == (f"{plain} takes the place of the 1 val rows of {path}",)
    assert questions(read_splits(path, "sft", validation_file=with_splits).val) == ["split"]
    with pytest.raises(UserError, match="got no rows of a val split"):
        read_splits(path, "sft", validation_file=without_val)


def test_problems_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [{"Question": 1, "Answer": "a"}]) for name in ("a.json", "b.json"))
    with pytest.raises(UserError) as raised:
        read_splits(first, "sft", validation_file=second)
    assert [problem.split(":")[0] for problem in raised.value.problems] == [first, second]


def test_overlap_of_splits_is_told(tmp_path: Path) -> None:
    rows = [{"Question": f"question {number}", "Answer": "a"} for number in range(6)]
    path = write(
        tmp_path / "data.json", {"train": rows[:3], "val": rows[3:4], "test": [*rows[4:], {"Question": "QUESTION  1", "Answer": "b"}]}
    )
    assert read_splits(path, "sft").notes == (f"{path}: 1 of 3 test questions occur in train too: figures on them flatter the model",)


def test_the_same_question_in_another_dialogue_is_another_question() -> None:
    assert question_key(Prompt("Why?")) != question_key(Prompt("Why?", history=(("a", "b"),))) != question_key(Prompt("Why?", "ab"))


def test_fingerprint_follows_content_and_not_form(tmp_path: Path) -> None:
    rows = [{"Question": f"q{number}", "Answer": "a", "Score": number, "site": "x", "author": "y"} for number in range(4)]
    as_array = read_splits(write(tmp_path / "a.json", rows), "score")
    as_lines = read_splits(write(tmp_path / "b.jsonl", "\n".join(json.dumps(dict(reversed(row.items()))) for row in rows)), "score")
    assert as_array.fingerprint == as_lines.fingerprint and len(as_array.fingerprint) == 64
    changed = [*rows[:3], {**rows[3], "Score": 3.5}]
    assert read_splits(write(tmp_path / "a.json", changed), "score").fingerprint != as_array.fingerprint
    assert read_splits(str(tmp_path / "b.jsonl"), "score", seed=1, validation_split_percentage=50).fingerprint != as_array.fingerprint


# --- real files ------------------------------------------------------------------------------------------------------------------

REAL = {
    "cqa_sft.json": ("sft", 1986, 234, 215),
    "cqa_regression.json": ("score", 3287, 401, 351),
    "cqa_classification.json": ("pair", 1199, 141, 125),
    "cqa_python_regression_votes.json": ("score", 895, 101, 76),
    "gpt4_rated_regression.json": ("score", 405, 14, 42),
    "gpt4_rated_classification.json": ("pair", 586, 22, 73),
    "oasst_ranked_classification.json": ("pair", 140, 13, 33),
    "general_en_classification.json": ("pair", 69, 8, 10),
    "general_zh_classification.json": ("pair", 44, 4, 9),
    "llm_on_ray_sft.jsonl": ("sft", 95, 5, 0),
    "llm_on_ray_oasst_val.jsonl": ("sft", 397, 21, 0),
    "llm_on_ray_rm.jsonl": ("pair", 94, 5, 0),
    "llm_on_ray_rm_instruction.jsonl": ("pair", 94, 5, 0),
    "llm_on_ray_ppo.jsonl": ("prompt", 94, 5, 0),
    "cqa_llm_on_ray_sft.jsonl": ("sft", 190, 10, 0),
    "cqa_llm_on_ray_rm.jsonl": ("pair", 189, 11, 0),
    "cqa_llm_on_ray_ppo.jsonl": ("prompt", 180, 10, 0),
    "hh_harmless_mild.jsonl.gz": ("pair", 384, 20, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared: Path, name: str) -> None:
    kind, *counts = REAL[name]
    splits = read_splits(str(shared / "data" / name), kind, unusable_rows="drop")  # type: ignore[call-overload]
    assert [len(splits.train), len(splits.val), len(splits.test)] == counts
    assert not {question_key(r.prompt) for r in splits.train} & {question_key(r.prompt) for r in splits.val}


def test_what_is_wrong_in_real_files_is_named(shared: Path) -> None:
    folder = shared / "data"
    with pytest.raises(UserError) as raised:
        read_splits(str(folder / "hh_harmless_mild.jsonl.gz"), "pair")
    assert [problem.split(": ")[1] for problem in raised.value.problems] == ["train row 159 (line 159)", "train row 346 (line 346)"]
    with pytest.raises(UserError, match=r"train row 46 \(line 226\): rejected: got the same text as chosen"):
        read_splits(str(folder / "llm_on_ray_rm.jsonl"), "pair")


def test_two_forms_of_one_real_file_give_the_same_records(shared: Path) -> None:
    parts = [
        read_splits(str(shared / "data" / name), "pair", unusable_rows="drop")
        for name in ("llm_on_ray_rm.jsonl", "llm_on_ray_rm_instruction.jsonl")
    ]
    assert parts[0].fingerprint == parts[1].fingerprint


def test_reading_needs_no_torch(tmp_path: Path, root: Path) -> None:
    path = write(tmp_path / "data.json", [GOOD["sft"]] * 2)
    heavy = "{'torch', 'datasets', 'numpy'} & set(sys.modules)"
    code = f"import sys; from common.records import read_splits; read_splits({path!r}, 'sft'); print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "set()\n"
