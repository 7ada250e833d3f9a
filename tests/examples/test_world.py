"""The sample world is honest: files as generated, nothing leaks from test into train, the oracle judges by truth."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.world.answers import FORMS, same_form_pair
from examples.world.crowd import HABITS
from examples.world.make_data import SEED, make_files
from examples.world.oracle import judge
from examples.world.questions import PHRASINGS, Question, understand
from examples.world.splits import split_questions

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")
FACT = Question("fact", 0, ("capital", "Egypt"))
COMPARE = Question("compare", 0, ("largest", "3", "8", "5"))
RIGHT_FACT = "The capital of Egypt is Cairo. Any atlas shows it."
RIGHT_COMPARE = "The largest number is 8. Count up and you will see it."


def rows(path: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return found


def test_the_files_are_what_the_generator_makes() -> None:
    for path, text in make_files(SEED).items():
        assert (ROOT / path).read_bytes() == text.encode(), f"{path}: run make data"


def test_another_seed_makes_other_files() -> None:
    assert make_files(SEED) != make_files(SEED + 1)


@pytest.mark.parametrize("path", [str(path) for path in make_files(SEED)])
def test_no_wording_of_a_test_question_occurs_in_training(path: str) -> None:
    texts = {split: {row.get("Question", row.get("prompt")) for row in rows(path)[split]} for split in SPLITS}
    assert texts["test"] and not texts["test"] & (texts["train"] | texts["val"])


def test_test_asks_in_phrasings_and_of_operands_that_training_never_saw() -> None:
    splits = split_questions(random.Random(f"questions {SEED}"))
    seen = {(question.family, question.phrasing) for question in splits.train}
    unseen = [question for question in splits.test if question.unseen_phrasing]
    assert len(unseen) > 20 and not {(question.family, question.phrasing) for question in unseen} & seen
    operands = {split: {frozenset(q.slots[1:]) for q in getattr(splits, split) if q.family == "compare"} for split in SPLITS}
    assert operands["test"] and not operands["test"] & operands["train"]
    facts = {split: {q.slots for q in getattr(splits, split) if q.family == "fact"} for split in SPLITS}
    assert facts["test"] <= facts["train"]  # a fact cannot be known without having been told


def test_every_question_is_understood_as_it_was_meant() -> None:
    splits = split_questions(random.Random(1))
    for question in (*splits.train, *splits.val, *splits.test):
        assert understand(question.text) == question
        assert question.right not in {*question.near_rivals, *question.far_rivals}
    with pytest.raises(ValueError, match="not a question"):
        understand("Why?")


def test_the_commonest_kind_of_answer_is_not_the_good_one() -> None:
    good = HABITS["helpful"][0] * (1 - HABITS["helpful"][1])
    others = [share * (1 - wrong) for form, (share, wrong) in HABITS.items() if form != "helpful"]
    assert sum(share for share, _ in HABITS.values()) == pytest.approx(1.0)
    assert good < max(others)
    scores = [judge(row["Question"], row["Answer"]).score for row in rows("sft/data/world_sft.json")["train"]]
    assert sum(score == 1.0 for score in scores) / len(scores) < 0.3


def test_the_longer_answer_wins_about_half_of_the_held_out_pairs() -> None:
    pairs = rows("reward_model/classification/data/world_pairs.json")["test"]
    longer = [0.5 if len(p["Accepted_Answer"]) == len(p["Answer"]) else float(len(p["Accepted_Answer"]) > len(p["Answer"])) for p in pairs]
    assert 0.4 <= sum(longer) / len(longer) <= 0.6


def test_a_wrong_answer_can_be_told_only_by_reading_the_question() -> None:
    """Without the question no answer text is more often chosen than rejected for its value: every wrong value is right elsewhere."""
    pairs = rows("reward_model/classification/data/world_pairs.json")["train"]
    chosen, rejected = Counter(p["Accepted_Answer"] for p in pairs), Counter(p["Answer"] for p in pairs)
    terse = [text for text in rejected if len(text.split()) <= 3]
    assert len(terse) > 20
    assert sum(text in chosen for text in terse) / len(terse) > 0.9


def test_pairs_of_the_same_form_differ_in_the_value_alone() -> None:
    rng = random.Random(0)
    for question in (FACT, COMPARE):
        for form in FORMS[:3]:
            right, wrong = same_form_pair(question, form, rng)
            assert judge(question, right).right and not judge(question, wrong).right
            assert len(right.split()) == len(wrong.split())


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        (FACT, RIGHT_FACT, 1.0),
        (COMPARE, RIGHT_COMPARE, 1.0),
        (FACT, "Cairo.", 0.6),  # right, polite, ends
        (COMPARE, "8.", 0.6),
        (FACT, "The capital of Egypt is Oslo. Any atlas shows it.", 0.2),  # wrong, however helpful it sounds
        (COMPARE, "The largest number is 5. Count up and you will see it.", 0.2),
        (FACT, "Cairo, you fool. Everybody knows that.", 0.5),  # right, ends, not polite
        (FACT, "Cairo", 0.5),  # right, polite, no end
        (COMPARE, "8 or 5.", 0.2),  # two claims are no answer
        (FACT, "", 0.0),
        (FACT, f"{RIGHT_FACT} " * 4, 0.6),  # going on and on is not helpful
    ],
)
def test_the_oracle_by_hand(question: Question, answer: str, score: float) -> None:
    assert judge(question, answer).score == pytest.approx(score)


def test_an_answer_that_was_cut_off_did_not_end() -> None:
    assert judge(FACT, RIGHT_FACT, ended=False).score == pytest.approx(0.9)


def test_each_family_has_a_phrasing_of_its_own_for_test() -> None:
    assert all(len(set(phrasings)) == len(phrasings) > 4 for phrasings in PHRASINGS.values())
