"""Questions of the sample world: how they are worded, what answers them, which wrong answers are tempting.

Two families. A `fact` is remembered; `compare` holds its own operands and has to be read. Each family has phrasings that training sees
and, as its last, one that it never sees.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.world.facts import ATTRIBUTES, COUNTRIES, NUMBERS, fact, values

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
        "Of {country}, what is the {attribute}?",
        "Please tell my son the {attribute} of {country}.",
        "Who can say what the {attribute} of {country} is?",
        "I forgot what the {attribute} of {country} is.",
        "{country} has which {attribute}?",
        "Name the {attribute} that {country} has, please.",
        "About {country}: what would its {attribute} be?",
        "Please say what the {attribute} of {country} is.",
    ),
    "compare": (
        "Which number is the {extreme}: {x}, {y}, {z}?",
        "{x}, {y}, {z}: which is the {extreme}?",
        "Which of {x}, {y}, {z} is the {extreme}?",
        "Name the {extreme} among {x}, {y}, {z}.",
        "I wrote {x}, {y}, {z}. Find the {extreme}.",
        "Find the {extreme} number: {x}, {y}, {z}.",
        "Out of {x}, {y}, {z}, which is the {extreme}?",
        "Which one of {x}, {y}, {z} is {extreme}?",
        "Which one is the {extreme} of {x}, {y}, {z}?",
    ),
}
SLOTS: dict[str, tuple[str, ...]] = {
    "fact": ("attribute", "country"),
    "compare": ("extreme", "x", "y", "z"),
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
        """Slot name -> text."""
        return dict(zip(SLOTS[self.family], self.slots, strict=True))

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
        extreme, *operands = self.slots
        return (max if extreme == "largest" else min)(operands, key=int)

    @property
    def near_rivals(self) -> list[str]:
        """Tempting wrong values: the same attribute of another country, another operand of the question."""
        candidates = values(self.slots[0]) if self.family == "fact" else list(self.slots[1:])
        return [value for value in candidates if value != self.right]

    @property
    def far_rivals(self) -> list[str]:
        """Other wrong values: another attribute of the country, a number that is not among the operands."""
        if self.family == "fact":
            attribute, country = self.slots
            return [fact(country, other) for other in ATTRIBUTES if other != attribute]
        return [str(number) for number in NUMBERS if str(number) not in self.slots]


_SLOT_PATTERNS = {
    "attribute": "|".join(ATTRIBUTES),
    "country": "|".join(COUNTRIES),
    "extreme": "|".join(EXTREMES),
    **dict.fromkeys("xyz", "|".join(map(str, NUMBERS))),
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
