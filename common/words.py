"""Words of a text in any script, for metrics and rules that count them."""

from __future__ import annotations

import re
import unicodedata

# Written without spaces: Thai and Lao, Myanmar, Khmer, CJK radicals, Kana and Bopomofo, Han and its extensions.
_UNSPACED = re.compile(
    "(["
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "])"
)


def set_apart(text: str) -> str:
    """The text with spaces around every character of a script without spaces; other text stays as it is."""
    return _UNSPACED.sub(r" \1 ", text)


def split_words(text: str) -> list[str]:
    """Words without case and punctuation; characters one by one in scripts without spaces."""
    # letters, marks and numbers make words; `\w` would cut Hindi words at their vowel signs
    folded = set_apart(unicodedata.normalize("NFKC", text).casefold())
    return "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in folded).split()
