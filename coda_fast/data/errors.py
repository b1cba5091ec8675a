"""What is wrong with pictures and with sets of them."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names what was expected and what was found."""


class ImageError(ValueError):
    """A picture that cannot be used. ``reason``: what was expected and what was found; the message names
    the file before it.
    """

    def __init__(self, reason: str, name: str = ""):
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name

    def __reduce__(self):
        return type(self), (self.reason, self.name)
