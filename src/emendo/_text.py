"""How texts are compared."""

from __future__ import annotations

import unicodedata


def normalised(text: str) -> str:
    """A text without what does not tell it apart: case, the amount of white space and the Unicode form."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
