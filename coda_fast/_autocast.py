"""Autocast, on devices that have it and on those that do not ("meta")."""

from __future__ import annotations

import contextlib

import torch


def autocasting(kind: str) -> bool:
    """Whether autocast is on for device type ``kind``."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """Context in which autocast leaves dtypes alone."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
