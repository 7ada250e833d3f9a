"""Words in any script."""

from __future__ import annotations

import pytest
from rouge_score.tokenize import tokenize

from common.words import set_apart, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't PANIC, it's 42.", ["don", "t", "panic", "it", "s", "42"]),
        ("北京是首都。", ["北", "京", "是", "首", "都"]),
        ("Tokyoは東京です", ["tokyo", "は", "東", "京", "で", "す"]),
        ("Straße ÉTÉ", ["strasse", "été"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ＡＢＣ １２", ["abc", "12"]),  # full width letters
        (" \n!?", []),
    ],
)
def test_split_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_ascii_text_is_split_as_rouge_score_does() -> None:
    text = "The quick-brown fox_jumps; over (the) lazy dog's 3.5 fleas!\tOK"
    assert split_words(text) == tokenize(text, None)


def test_text_with_spaces_stays_as_it_is() -> None:
    text = "Naïve text, with Ελληνικά и русский."
    assert set_apart(text) == text
    assert set_apart("a北b").split() == ["a", "北", "b"]
