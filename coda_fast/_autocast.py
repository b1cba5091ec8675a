"""Autocast, on devices that have it and on the device "meta", which has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch


def autocasting(kind: str) -> bool:
    """Whether autocast is on for device type ``kind``."""
    # torch 2.11 cannot compile torch.amp.is_autocast_available
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Context in which autocast leaves dtypes alone."""
    return torch.autocast(kind, enabled=False) if autocasting(kind) else contextlib.nullcontext()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 or wider. Sums, squares and divisions by the temperature T overflow or underflow
    in float16 and lose digits in bfloat16.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def cast_as_convolution(kind: str, arguments: Iterable) -> tuple:
    """The arguments as autocast passes them to a convolution: float32 and narrower tensors in its dtype,
    float64 tensors and anything that is not a tensor unchanged.
    """
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype != torch.float64 else a for a in arguments
    )
