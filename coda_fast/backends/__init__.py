"""Choice of the implementation. ``reference`` is two functions that automatic differentiation goes through:

``align(input, applied, reduction_weight, weight, bias, geometry, norm, eps)``
    F(x, u), the layer where u is x
``adjoint(input, value, reduction_weight, weight, bias, geometry, norm, eps)``   G(x, v), its transpose in u

The others are fused: ``align`` also takes ``keep`` and returns what the backward pass wants, and there are
``align_backward`` and ``kept_shapes``. They know nothing of autograd; ``coda_fast.ops`` makes operators of
them, ``backends/factored.py`` is the model.
"""

from __future__ import annotations

import dataclasses

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
    device = torch.device(device)
    missing = _triton_unavailable(device.type)
    passed = not missing and _verified(device)
    state = (
        "verified on such a device"
        if passed
        else 'not verified on such a device yet, so "auto" does not pick them'
    )
    reasons = {
        "reference": "available: the definition, weights materialised, for tests",
        "factored": "available: library matrix products, memory-lean, any device and dtype",
        "triton": f"not available: {missing}"
        if missing
        else f"available: fused kernels, {state}; float64 goes to factored",
    }
    return BackendInfo(str(device), _auto(device), reasons)


def check_name(name: str) -> None:
    """ValueError unless ``name`` is a backend or "auto"."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(
            f"backend: expected one of {', '.join(map(repr, (*BACKENDS, 'auto')))}, got {name!r}"
        )


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use for tensors of this device and dtype: "reference", "factored" or "triton".
    ValueError, BackendUnavailable.
    """
    check_name(name)
    if name == "triton" and (missing := _triton_unavailable(device.type)):
        raise BackendUnavailable(
            f'backend="triton" is not available: {missing}; use backend="auto" or "factored"'
        )
    name = _auto(device) if name == "auto" else name
    # tensor cores have no float64 worth a kernel; the factored backend computes the same thing
    return "factored" if name == "triton" and dtype == torch.float64 else name


def _auto(device: torch.device) -> str:
    """Fused kernels only on GPUs whose table says that they passed their tests there."""
    return (
        "triton"
        if device.type == "cuda" and not _triton_unavailable("cuda") and _verified(device)
        else "factored"
    )


def _verified(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from coda_kernels.config import verified

    return verified(torch.cuda.get_device_capability(device), torch.version.hip)


def _triton_unavailable(kind: str) -> str | None:
    try:
        import coda_kernels
    except ImportError:
        return "the package coda_kernels is not importable (install coda-fast, or put kernels/ on PYTHONPATH)"
    return coda_kernels.unavailable(kind)


# Constants under torch.compile, which need not trace them: torch.compiler.assume_constant_result without
# importing the compiler
_triton_unavailable._dynamo_marked_constant = _auto._dynamo_marked_constant = True
