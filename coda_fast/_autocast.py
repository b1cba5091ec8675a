"""Autocast, on devices that have it and on those that do not ("meta")."""

from __future__ import annotations

import contextlib

import torch


def autocasting(kind: str) -> bool:
    """Whether autocast is on for device type ``kind``."""
    # torch 2.11 cannot compile torch.amp.is_autocast_available
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Context in which autocast leaves dtypes alone."""
    return torch.autocast(kind, enabled=False) if autocasting(kind) else contextlib.nullcontext()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 at least: what is summed, squared or divided by T in float16 leaves its range,
    in bfloat16 its digits.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def cast_as_convolution(kind: str, arguments) -> tuple:
    """What autocast does to the inputs of a convolution: float32 and lower go to its dtype, float64 (and
    what is no tensor) stays.
    """
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype != torch.float64 else a for a in arguments
    )
