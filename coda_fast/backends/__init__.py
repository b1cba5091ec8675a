"""Choice of the implementation. A backend is a module with two functions, differentiable to any order:

``align(input, applied, reduction_weight, weight, bias, geometry, norm, eps)``   F(x, u), the layer where u is x
``adjoint(input, value, reduction_weight, weight, bias, geometry, norm, eps)``   G(x, v), its transpose in u
"""

from __future__ import annotations

import dataclasses
import importlib

import torch

BACKENDS = ("reference", "factored", "triton")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why and what to use instead."""


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """Which backend serves a device under ``backend="auto"``, and why the others do or do not."""

    device: str
    auto: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f'device {self.device}: "auto" is "{self.auto}"']
        return "\n".join(lines + [f"  {name:10} {reason}" for name, reason in self.reasons.items()])


def backend_info(device: torch.device | str = "cpu") -> BackendInfo:
    """What ``backend="auto"`` picks for tensors on ``device``, and why.

    >>> import coda_fast
    >>> coda_fast.backend_info("cpu").auto
    'factored'
    """
    missing = _triton_unavailable()
    reasons = {
        "reference": "available: the definition, weights materialised, for tests",
        "factored": "available: library matrix products, memory-lean, any device",
        "triton": f"not available: {missing}" if missing else "available: fused kernels",
    }
    return BackendInfo(str(torch.device(device)), "factored", reasons)


def check_name(name: str) -> None:
    """ValueError unless ``name`` is a backend or "auto"."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: expected one of {', '.join(map(repr, (*BACKENDS, 'auto')))}, got {name!r}")


def choose(name: str):
    """The module that implements backend ``name``. Raises ValueError, BackendUnavailable."""
    check_name(name)
    if name == "auto":
        name = "factored"
    if name == "triton" and (missing := _triton_unavailable()):
        raise BackendUnavailable(f'backend="triton" is not available: {missing}; use backend="auto" or "factored"')
    return importlib.import_module(f"coda_fast.backends.{name}")


def _triton_unavailable() -> str | None:
    try:
        import coda_kernels
    except ImportError:
        return "the package coda_kernels is not importable (install coda-fast, or put kernels/ on PYTHONPATH)"
    return coda_kernels.unavailable()
