"""Which questions belong to which split. No wording of a test question occurs in train, and neither do its operands in any order."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from examples.world.facts import ATTRIBUTES, COUNTRIES, NUMBERS
from examples.world.questions import EXTREMES, PHRASINGS, Question

# questions that have to be read
TRAIN_READ, VAL_READ, TEST_READ = 700, 104, 60
TEST_READ_UNSEEN = 12  # among TEST_READ: in the phrasing that training never sees
# phrasings of each fact; the last one of the family is for test alone
TRAIN_PHRASINGS, VAL_PHRASINGS = 14, 1
TEST_FACTS_UNSEEN = 24  # facts that test also asks in that phrasing


@dataclass(frozen=True)
class QuestionSplits:
    train: list[Question]
    val: list[Question]
    test: list[Question]


def split_questions(rng: random.Random) -> QuestionSplits:
    """All questions of the sample data, each split shuffled."""
    splits = QuestionSplits([], [], [])
    _split_facts(splits, rng)
    _split_reading(splits, rng)
    for questions in (splits.train, splits.val, splits.test):
        rng.shuffle(questions)
    return splits


def _split_facts(splits: QuestionSplits, rng: random.Random) -> None:
    facts = list(itertools.product(ATTRIBUTES, COUNTRIES))
    unseen = len(PHRASINGS["fact"]) - 1
    for slots in facts:
        phrasings = rng.sample(range(unseen), unseen)
        for i, phrasing in enumerate(phrasings):
            split = splits.train if i < TRAIN_PHRASINGS else splits.val if i < TRAIN_PHRASINGS + VAL_PHRASINGS else splits.test
            split.append(Question("fact", phrasing, slots))
    splits.test.extend(Question("fact", unseen, slots) for slots in rng.sample(facts, TEST_FACTS_UNSEEN))


def _split_reading(splits: QuestionSplits, rng: random.Random) -> None:
    """Sets of operands go to one split each: 7 in 10 to train, 1 to val, 2 to test."""
    triples = [tuple(map(str, numbers)) for numbers in itertools.combinations(NUMBERS, 3)]
    rng.shuffle(triples)
    first, second = round(0.7 * len(triples)), round(0.8 * len(triples))
    unseen = len(PHRASINGS["compare"]) - 1
    splits.train.extend(_draw(triples[:first], list(range(unseen)), TRAIN_READ, rng))
    splits.val.extend(_draw(triples[first:second], list(range(unseen)), VAL_READ, rng))
    splits.test.extend(_draw(triples[second:], list(range(unseen)), TEST_READ - TEST_READ_UNSEEN, rng))
    splits.test.extend(_draw(triples[second:], [unseen], TEST_READ_UNSEEN, rng))


def _draw(triples: list[tuple[str, ...]], phrasings: list[int], count: int, rng: random.Random) -> list[Question]:
    """`count` different questions about these operands, in any order."""
    drawn: dict[Question, None] = {}
    while len(drawn) < count:
        operands = rng.sample(rng.choice(triples), 3)
        drawn[Question("compare", rng.choice(phrasings), (rng.choice(EXTREMES), *operands))] = None
    return list(drawn)
