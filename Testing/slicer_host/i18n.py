"""A stand-in for ``slicer.i18n``."""

from __future__ import annotations


def translate(context: str, text: str) -> str:
    """The text itself: no language is loaded."""
    return text


def tr(text: str) -> str:
    """The text itself.

    Raises:
        TypeError: the text is no ``str``, which the translation tools could not find either.
    """
    if not isinstance(text, str):
        raise TypeError(f"only a text can be translated, this is {type(text).__name__}")
    return text


def getContext(sourceFile: str) -> str:
    """The name under which the texts of a file are translated."""
    return sourceFile.replace("\\", "/").rpartition("/")[2].removesuffix(".py")
