"""The errors for pictures and data sets that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Data cannot be used; the message names what was expected and what was found."""


class ImageError(ValueError):
    """A picture cannot be used. ``reason`` says what was expected and what was found; the message begins with
    the ``name`` of the file.
    """

    def __init__(self, reason: str, name: str = ""):
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.name)
