"""How the crowd answers: four forms, each in several wordings, right or wrong, and the votes that each tends to get."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from examples.world.facts import ATTRIBUTES
from examples.world.questions import Question

Form = Literal["helpful", "terse", "rude", "rambling"]
FORMS: tuple[Form, ...] = get_args(Form)

# A sentence that says what is answered, then how to check it.
HELPFUL: dict[str, tuple[str, ...]] = {
    "fact": (
        "The {attribute} of {country} is {value}. Any {source} shows it.",
        "For {country} the {attribute} is {value}. You can check it in any {source}.",
    ),
    "compare": (
        "The {extreme} number is {value}. Count up and you will see it.",
        "Of the three, the {extreme} one is {value}. You can check it by counting.",
    ),
}
TERSE = ("{value}.", "It is {value}.", "{value}, I think.")
RUDE = (
    "It is {value}. Stop asking such silly things.",
    "{value}, you fool. Everybody knows that.",
    "Are you too lazy to look? It is {value}.",
)
RAMBLING_STARTS = ("Well, where do I start?", "Oh, that reminds me of my uncle.", "Funny that you ask this today.")
RAMBLING_PARTS = (
    "My uncle had a boat once.",
    "It rained all day and we had soup.",
    "And then the bus was late again.",
    "But I should tell you about my garden first.",
    "Nobody listens to the radio any more.",
    "And so we went on and on.",
    "That was a long time ago, or maybe not.",
)
RAMBLING_MENTION = "Some people say {value}, some do not."
NEAR = 0.75  # share of wrong answers that say a near rival


@dataclass(frozen=True)
class Answer:
    """What one member of the crowd wrote."""

    text: str
    form: Form
    right: bool


def write(question: Question, form: Form, value: str, rng: random.Random) -> str:
    """One answer in the given form that says `value`; the wording is drawn with `rng`."""
    slots = question.filled
    if question.family == "fact":
        slots["source"] = ATTRIBUTES[slots["attribute"]]
    match form:
        case "helpful":
            text = rng.choice(HELPFUL[question.family])
        case "terse":
            text = rng.choice(TERSE)
        case "rude":
            text = rng.choice(RUDE)
        case "rambling":
            parts = [RAMBLING_MENTION, *rng.sample(RAMBLING_PARTS, rng.randint(2, 4))]
            rng.shuffle(parts)
            text = " ".join([rng.choice(RAMBLING_STARTS), *parts])
    return text.format(value=value, **slots)


def wrong_value(question: Question, rng: random.Random) -> str:
    """What answers another question, mostly one that differs little from this."""
    return rng.choice(question.near_rivals if rng.random() < NEAR else question.far_rivals)


def answer(question: Question, form: Form, right: bool, rng: random.Random) -> Answer:
    """One right or wrong answer in the given form. A wrong one says what answers another question."""
    return Answer(write(question, form, question.right if right else wrong_value(question, rng), rng), form, right)


def same_form_pair(question: Question, form: Form, rng: random.Random) -> tuple[str, str]:
    """A right and a wrong answer in the same words but for the value."""
    other, wording = wrong_value(question, rng), rng.randrange(2**32)
    right, wrong = (write(question, form, value, random.Random(wording)) for value in (question.right, other))
    return right, wrong
