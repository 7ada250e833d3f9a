"""The crowd: who answers how often, and how many votes an answer collects. Everything is drawn from a given generator."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from examples.world.answers import FORMS, Answer, Form, answer
from examples.world.questions import Question

# form -> (share among answers, chance that such an answer is wrong)
HABITS: dict[Form, tuple[float, float]] = {
    "helpful": (0.29, 0.22),
    "terse": (0.42, 0.12),
    "rude": (0.16, 0.15),
    "rambling": (0.13, 0.50),
}
# (form, right) -> votes expected
APPEAL: dict[tuple[Form, bool], float] = {
    ("helpful", True): 40.0,
    ("terse", True): 18.0,
    ("rude", True): 7.0,
    ("rambling", True): 4.0,
    ("rambling", False): 3.0,
    ("helpful", False): 1.2,
    ("terse", False): 1.0,
    ("rude", False): 0.4,
}
POPULARITY_SPREAD = 0.15  # standard deviation of the logarithm of a question's popularity


@dataclass(frozen=True)
class Posted:
    """An answer under a question, with its votes."""

    answer: Answer
    votes: int
    accepted: bool

    @property
    def score(self) -> float:
        """log2(1 + votes), and 1 more for the accepted answer."""
        return round(math.log2(1 + self.votes) + self.accepted, 3)


def passing_answer(question: Question, rng: random.Random) -> Answer:
    """What the next passer-by writes."""
    form = rng.choices(FORMS, [HABITS[form][0] for form in FORMS])[0]
    return answer(question, form, rng.random() >= HABITS[form][1], rng)


def thread(question: Question, rng: random.Random) -> list[Posted]:
    """A well-visited question: right and wrong answers of every form, with the votes they got. The best voted one is accepted."""
    answers = [answer(question, form, right, rng) for form in ("helpful", "terse", "rude") for right in (True, False)]
    answers.append(answer(question, "rambling", rng.random() < 0.5, rng))
    popularity = math.exp(rng.gauss(0.0, POPULARITY_SPREAD))
    votes = [_poisson(APPEAL[a.form, a.right] * popularity, rng) for a in answers]
    accepted = votes.index(max(votes))
    return [Posted(a, v, i == accepted) for i, (a, v) in enumerate(zip(answers, votes, strict=True))]


def preference(first: Posted, second: Posted) -> tuple[Posted, Posted] | None:
    """(chosen, rejected), or None where the votes do not decide: the lead must exceed two standard deviations."""
    chosen, rejected = (first, second) if first.votes >= second.votes else (second, first)
    if chosen.votes - rejected.votes <= 2 * math.sqrt(chosen.votes + rejected.votes):
        return None
    return chosen, rejected


def _poisson(mean: float, rng: random.Random) -> int:
    """Knuth's method; exact, and fast enough for means below a hundred."""
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count
