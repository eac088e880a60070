"""Texts of strangers on a screen, where some characters are commands."""

import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of controls and of marks of direction


def hidden(text: str) -> bool:
    """Whether a text has characters that change what a screen shows."""
    if text.isascii():
        return not text.isprintable()
    return any(unicodedata.category(letter) in INVISIBLE for letter in text)


def visible(text: str) -> str:
    """The text with such characters spelled out."""
    if not hidden(text):
        return text
    return "".join(repr(one)[1:-1] if hidden(one) else one for one in text)
