"""Questions of the sample world: how they are worded, what answers them, which wrong answers are tempting.

Three families. A `fact` is remembered; `compare` and `kind` hold their own operands and have to be read. Each family has phrasings
that training sees and, as its last, one that it never sees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.world.facts import ATTRIBUTES, COUNTRIES, KINDS, NUMBERS, WORDS, fact, values

PHRASINGS: dict[str, tuple[str, ...]] = {
    "fact": (
        "What is the {attribute} of {country}?",
        "Tell me the {attribute} of {country}.",
        "{country}: what is its {attribute}?",
        "Can you name the {attribute} of {country}?",
        "Which is the {attribute} of {country}?",
        "I need the {attribute} of {country}, please.",
        "Does anyone know the {attribute} of {country}?",
        "My homework asks for the {attribute} of {country}.",
        "For a quiz: {country}, {attribute}?",
        "Please say what the {attribute} of {country} is.",
    ),
    "compare": (
        "Which number is the {extreme}: {x}, {y}, {z}?",
        "{x}, {y}, {z}: which is the {extreme}?",
        "Which of {x}, {y}, {z} is the {extreme}?",
        "Name the {extreme} among {x}, {y}, {z}.",
        "I wrote {x}, {y}, {z}. Find the {extreme}.",
        "Which one is the {extreme} of {x}, {y}, {z}?",
    ),
    "kind": (
        "Which one is {article} {kind}: {x}, {y}, {z}?",
        "{x}, {y}, {z}: which is {article} {kind}?",
        "Which of {x}, {y}, {z} is {article} {kind}?",
        "Name the {kind} among {x}, {y}, {z}.",
        "I wrote {x}, {y}, {z}. Find the {kind}.",
        "Which one of {x}, {y}, {z} is {article} {kind}?",
    ),
}
SLOTS: dict[str, tuple[str, ...]] = {
    "fact": ("attribute", "country"),
    "compare": ("extreme", "x", "y", "z"),
    "kind": ("kind", "x", "y", "z"),
}
EXTREMES = ("largest", "smallest")


@dataclass(frozen=True)
class Question:
    """A wording with its slots filled, in the order of `SLOTS[family]`."""

    family: str
    phrasing: int
    slots: tuple[str, ...]

    @property
    def filled(self) -> dict[str, str]:
        """Slot name -> text, with what grammar adds."""
        slots = dict(zip(SLOTS[self.family], self.slots, strict=True))
        if self.family == "kind":
            slots["article"] = "an" if slots["kind"][0] in "aeiou" else "a"
        return slots

    @property
    def text(self) -> str:
        return PHRASINGS[self.family][self.phrasing].format(**self.filled)

    @property
    def unseen_phrasing(self) -> bool:
        """Whether training never sees this phrasing, whatever fills it."""
        return self.phrasing == len(PHRASINGS[self.family]) - 1

    @property
    def right(self) -> str:
        """The value that answers the question."""
        if self.family == "fact":
            attribute, country = self.slots
            return fact(country, attribute)
        asked, *operands = self.slots
        if self.family == "compare":
            return (max if asked == "largest" else min)(operands, key=int)
        return next(word for word in operands if word in KINDS[asked])

    @property
    def near_rivals(self) -> list[str]:
        """Tempting wrong values: the same attribute of another country, another operand of the question."""
        candidates = values(self.slots[0]) if self.family == "fact" else list(self.slots[1:])
        return [value for value in candidates if value != self.right]

    @property
    def far_rivals(self) -> list[str]:
        """Other wrong values: another attribute of the country, a number or a word of the asked kind that is not among the operands."""
        match self.family:
            case "fact":
                attribute, country = self.slots
                return [fact(country, other) for other in ATTRIBUTES if other != attribute]
            case "compare":
                return [str(number) for number in NUMBERS if str(number) not in self.slots]
            case _:
                return [word for word in KINDS[self.slots[0]] if word not in self.slots]


_SLOT_PATTERNS = {
    "attribute": "|".join(ATTRIBUTES),
    "country": "|".join(COUNTRIES),
    "extreme": "|".join(EXTREMES),
    "kind": "|".join(KINDS),
    "article": "an?",
    **dict.fromkeys("xyz", "|".join((*WORDS, *map(str, NUMBERS)))),
}


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for slot, choices in _SLOT_PATTERNS.items():
        pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{choices})")
    return re.compile(pattern)


_PATTERNS = [(family, index, _pattern(template)) for family, templates in PHRASINGS.items() for index, template in enumerate(templates)]


def understand(text: str) -> Question:
    """Read a question's text back. Raises ValueError for a text that is no question of this world."""
    for family, index, pattern in _PATTERNS:
        if found := pattern.fullmatch(text.strip()):
            return Question(family, index, tuple(found[slot] for slot in SLOTS[family]))
    raise ValueError(f"not a question of the sample world: {text!r}")
