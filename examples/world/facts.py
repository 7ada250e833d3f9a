"""What is true in the sample world: twenty-four facts to remember, and the numbers that questions to be read are made of."""

from __future__ import annotations

# attribute -> what a helpful answer names as the place to check it
ATTRIBUTES: dict[str, str] = {
    "capital": "atlas",
    "currency": "bank",
    "highest mountain": "hiking map",
}

# country -> one value for each attribute, in the order above; no value occurs twice
COUNTRIES: dict[str, tuple[str, str, str]] = {
    "Egypt": ("Cairo", "pound", "Catherine"),
    "Greece": ("Athens", "euro", "Olympus"),
    "Japan": ("Tokyo", "yen", "Fuji"),
    "Nepal": ("Kathmandu", "rupee", "Everest"),
    "Norway": ("Oslo", "krone", "Galdhopiggen"),
    "Peru": ("Lima", "sol", "Huascaran"),
    "Russia": ("Moscow", "ruble", "Elbrus"),
    "Turkey": ("Ankara", "lira", "Ararat"),
}

# Operands of the questions that have to be read.
NUMBERS = range(1, 10)


def fact(country: str, attribute: str) -> str:
    """The value of an attribute of a country."""
    return COUNTRIES[country][list(ATTRIBUTES).index(attribute)]


def values(attribute: str) -> list[str]:
    """Every country's value of an attribute."""
    return [fact(country, attribute) for country in COUNTRIES]
