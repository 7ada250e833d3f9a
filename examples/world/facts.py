"""What is true in the sample world: sixty-four facts to remember, and the pools that questions to be read are drawn from."""

from __future__ import annotations

# attribute -> what a helpful answer names as the place to check it
ATTRIBUTES: dict[str, str] = {
    "capital": "atlas",
    "currency": "bank",
    "highest mountain": "hiking map",
    "dialling code": "phone book",
}

# country -> one value for each attribute, in the order above; no value occurs twice
COUNTRIES: dict[str, tuple[str, str, str, str]] = {
    "Egypt": ("Cairo", "pound", "Catherine", "20"),
    "Georgia": ("Tbilisi", "lari", "Shkhara", "995"),
    "Greece": ("Athens", "euro", "Olympus", "30"),
    "Hungary": ("Budapest", "forint", "Kekes", "36"),
    "Iran": ("Tehran", "rial", "Damavand", "98"),
    "Japan": ("Tokyo", "yen", "Fuji", "81"),
    "Morocco": ("Rabat", "dirham", "Toubkal", "212"),
    "Nepal": ("Kathmandu", "rupee", "Everest", "977"),
    "Norway": ("Oslo", "krone", "Galdhopiggen", "47"),
    "Peru": ("Lima", "sol", "Huascaran", "51"),
    "Poland": ("Warsaw", "zloty", "Rysy", "48"),
    "Romania": ("Bucharest", "leu", "Moldoveanu", "40"),
    "Russia": ("Moscow", "ruble", "Elbrus", "7"),
    "Thailand": ("Bangkok", "baht", "Inthanon", "66"),
    "Turkey": ("Ankara", "lira", "Ararat", "90"),
    "Vietnam": ("Hanoi", "dong", "Fansipan", "84"),
}

# Pools of the questions that hold their own operands and have to be read.
NUMBERS = range(1, 10)
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("frog", "horse", "goose", "tiger", "mouse", "whale"),
    "fruit": ("apple", "pear", "cherry", "plum", "lemon", "fig"),
    "tool": ("hammer", "saw", "drill", "spade", "ladder", "brush"),
    "colour": ("red", "blue", "green", "purple", "white", "brown"),
    "drink": ("tea", "milk", "juice", "cocoa", "cider", "water"),
}
WORDS = tuple(word for words in KINDS.values() for word in words)


def fact(country: str, attribute: str) -> str:
    """The value of an attribute of a country."""
    return COUNTRIES[country][list(ATTRIBUTES).index(attribute)]


def values(attribute: str) -> list[str]:
    """Every country's value of an attribute."""
    return [fact(country, attribute) for country in COUNTRIES]
