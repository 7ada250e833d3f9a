"""Which questions belong to which split. No wording of a test question occurs in train, and neither do its operands in any order."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from examples.world.facts import ATTRIBUTES, COUNTRIES, KINDS, NUMBERS
from examples.world.questions import EXTREMES, PHRASINGS, Question

# questions of each reading family
TRAIN_READ, VAL_READ, TEST_READ = 1000, 40, 60
TEST_READ_UNSEEN = 12  # among TEST_READ: in the phrasing that training never sees
# phrasings of each fact; the last one of the family is for test alone
TRAIN_PHRASINGS, VAL_PHRASINGS = 6, 1
TEST_FACTS_UNSEEN = 32  # facts that test also asks in that phrasing


@dataclass(frozen=True)
class QuestionSplits:
    train: list[Question]
    val: list[Question]
    test: list[Question]


def split_questions(rng: random.Random) -> QuestionSplits:
    """All questions of the sample data, each split shuffled."""
    splits = QuestionSplits([], [], [])
    _split_facts(splits, rng)
    _split_reading("compare", [tuple(map(str, numbers)) for numbers in itertools.combinations(NUMBERS, 3)], splits, rng)
    _split_reading("kind", _kind_triples(), splits, rng)
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


def _kind_triples() -> list[tuple[str, ...]]:
    """Three words of three different kinds, once for each set."""
    return [words for kinds in itertools.combinations(KINDS, 3) for words in itertools.product(*(KINDS[kind] for kind in kinds))]


def _split_reading(family: str, triples: list[tuple[str, ...]], splits: QuestionSplits, rng: random.Random) -> None:
    """Sets of operands go to one split each: 7 in 10 to train, 1 to val, 2 to test."""
    triples = rng.sample(triples, len(triples))
    first, second = round(0.7 * len(triples)), round(0.8 * len(triples))
    unseen = len(PHRASINGS[family]) - 1
    splits.train.extend(_draw(family, triples[:first], list(range(unseen)), TRAIN_READ, rng))
    splits.val.extend(_draw(family, triples[first:second], list(range(unseen)), VAL_READ, rng))
    splits.test.extend(_draw(family, triples[second:], list(range(unseen)), TEST_READ - TEST_READ_UNSEEN, rng))
    splits.test.extend(_draw(family, triples[second:], [unseen], TEST_READ_UNSEEN, rng))


def _draw(family: str, triples: list[tuple[str, ...]], phrasings: list[int], count: int, rng: random.Random) -> list[Question]:
    """`count` different questions about these operands, in any order."""
    drawn: dict[Question, None] = {}
    while len(drawn) < count:
        operands = rng.sample(triple := rng.choice(triples), len(triple))
        asked = rng.choice(EXTREMES if family == "compare" else [kind for kind in KINDS if set(KINDS[kind]) & set(triple)])
        drawn[Question(family, rng.choice(phrasings), (asked, *operands))] = None
    return list(drawn)
