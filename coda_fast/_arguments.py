"""Checks of a network's arguments: each returns the value in one form or raises an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch

from coda_fast._geometry import integer, pair

# The largest image side, kernel, stride, padding or dilation, in pixels. A file that asks for more is damaged
# or hostile.
MOST = 1 << 16
FLOAT32 = torch.finfo(torch.float32)


def number(value, name: str) -> float:
    """``value`` as a finite float within the range of float32; NumPy numbers are accepted."""
    try:
        if isinstance(value, bool | str | bytes | bytearray):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:
        found = math.inf
    if not abs(found) <= FLOAT32.max:
        raise ValueError(f"{name}: expected a finite number, at most {FLOAT32.max:.1e}, got {short(value)}")
    return found


def positive_integer(value, name: str, most: int | None = None) -> int:
    """``value`` as an int of at least 1; NumPy integers are accepted."""
    try:
        found = integer(value)
    except TypeError:
        found = 0
    if found < 1 or found > (most or found):
        raise ValueError(
            f"{name}: expected a positive int{'' if most is None else f', at most {most}'}, got "
            f"{short(value)}"
        )
    return found


def temperature(value) -> float:
    """A positive number that float32 can divide by."""
    found = number(value, "temperature")
    if found < FLOAT32.tiny:
        least = f", at least {FLOAT32.tiny:.1e}" * (found > 0)
        raise ValueError(f"temperature: expected a positive number{least}, got {found:g}")
    return found


def short(value) -> str:
    """A value as text for a message, at most 100 characters long."""
    text = (
        f"about 2**{value.bit_length() - 1}"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )
    return text if len(text) <= 100 else f"{text[:97]}..."


def list_of(values, name: str, count: int | None = None) -> list:
    """``values`` as a list, which must have ``count`` entries if that is given."""
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise TypeError(f"{name}: expected a list with an entry for each layer, got {short(values)}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name}: expected {count} entries, as many as out_channels, got {len(values)}")
    return list(values)


def each(value, name: str, count: int) -> list:
    """One value for each layer, from a list or from a single value for all layers."""
    return (
        list_of(value, name, count)
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        else [value] * count
    )


def pairs(values, name: str, count: int, least: int = 1) -> list:
    """A pair of ints for each layer; paddings may also be strings ("same", "valid")."""
    found = []
    for index, value in enumerate(list_of(values, name, count)):
        if not (isinstance(value, str) and name == "paddings"):
            value = pair(value, f"{name}[{index}]", least)
            if max(value) > MOST:
                raise ValueError(f"{name}[{index}]: expected at most {MOST}, got {short(max(value))}")
        found.append(value)
    return found


def names(values, count: int) -> list[str]:
    """A name for each of ``count`` classes."""
    if (
        isinstance(values, str | Mapping)
        or not hasattr(values, "__len__")
        or not all(isinstance(name, str) for name in values)
    ):
        raise ValueError(f"class_names: expected a list of strings, got {short(values)}")
    if len(values) != count:
        raise ValueError(f"class_names: expected {count} names, one for each class, got {len(values)}")
    return list(values)
