"""The implementations (backends) of the DAU layer, and the choice among them.

``reference`` is the definition: two functions, F(x, u) and its transpose G(x, v), which autograd
differentiates. ``factored`` and ``triton`` are fused: each is a module with the functions of ``Backend``.
They know nothing about autograd; ``coda_fast.ops`` makes operators of them.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Protocol

import torch

from coda_fast._spec import Gradients, Kept, Parameters, Spec

FUSED = ("factored", "triton")
BACKENDS = ("reference", *FUSED)


class Backend(Protocol):
    """A fused backend: a module with these functions, which do not check their arguments.

    ``input`` is x, [N, C, H, W]; ``applied`` is u, of the same shape, or None if u is x itself;
    ``parameters`` have the dtype and device of x. F(x, u) is [N, n, OH, OW], in the memory format
    ``_geometry.format_of(x)``.
    """

    def align(
        self,
        input: torch.Tensor,
        applied: torch.Tensor | None,
        parameters: Parameters,
        spec: Spec,
        *,
        keep: str,
    ) -> tuple[torch.Tensor, Kept]:
        """F(x, u), and what ``keep``, a key of ``coda_fast._spec.KEEPS``, requests; None for the rest."""

    def align_backward(
        self,
        grad: torch.Tensor,
        input: torch.Tensor,
        applied: torch.Tensor | None,
        parameters: Parameters,
        kept: Kept,
        spec: Spec,
        *,
        detach: bool,
        needs: Gradients,
    ) -> Gradients:
        """The gradients of <grad, F(x, u)>, None where ``needs`` is False. If u is x, the gradient in x
        includes that in u. With ``detach`` (explanation mode) there is only the direct term G(x, grad), in
        place of the gradient in u, or of that in x if u is x. ``kept`` is what ``align`` has kept, at least
        |w|^2.
        """

    def adjoint(
        self, input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec
    ) -> torch.Tensor:
        """G(x, v), in the shape, dtype and memory format of x."""

    def adjoints(
        self,
        values: torch.Tensor,
        input: torch.Tensor,
        applied: torch.Tensor | None,
        parameters: Parameters,
        kept: Kept,
        spec: Spec,
    ) -> torch.Tensor:
        """G(x, v_k) for K values [K, N, n, OH, OW], as [K, N, C, H, W] in the dtype and memory format of u.
        ``kept`` is what ``align`` has kept, if anything.
        """

    def kept_shapes(self, input: torch.Tensor, parameters: Parameters, spec: Spec, *, keep: str) -> Kept:
        """The shapes of what ``align`` keeps; (0,) for what it does not keep."""

    def gradients_like(self, parameters: Parameters) -> Parameters:
        """Uninitialised tensors with the layout of the parameter gradients that ``align_backward`` makes."""


def fused(name: str) -> Backend:
    """The fused backend of this name; ValueError if there is none."""
    if name not in FUSED:
        raise ValueError(f"backend: expected {' or '.join(map(repr, FUSED))}, got {name!r}")
    return importlib.import_module(f"coda_fast.backends.{name}")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why and what to use instead."""


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """The backend that serves a device under ``backend="auto"``, and why each one can or cannot run there."""

    device: str
    auto: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f'device {self.device}: "auto" is "{self.auto}"']
        return "\n".join(lines + [f"  {name:10} {reason}" for name, reason in self.reasons.items()])


def backend_info(device: torch.device | str = "cpu") -> BackendInfo:
    """The backend that ``backend="auto"`` picks for tensors on ``device``, and why.

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
    """Raise a ValueError unless ``name`` is a backend or "auto"."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(
            f"backend: expected one of {', '.join(map(repr, (*BACKENDS, 'auto')))}, got {name!r}"
        )


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use for tensors of this device and dtype: "reference", "factored" or "triton".

    Raises:
        ValueError: there is no such backend. BackendUnavailable: it cannot run here.
    """
    check_name(name)
    if name == "triton" and (missing := _triton_unavailable(device.type)):
        raise BackendUnavailable(
            f'backend="triton" is not available: {missing}; use backend="auto" or "factored"'
        )
    name = _auto(device) if name == "auto" else name
    # float64 on tensor cores is not worth a kernel; the factored backend computes the same
    return "factored" if name == "triton" and dtype == torch.float64 else name


def _auto(device: torch.device) -> str:
    """The backend for "auto": Triton only on kinds of GPU on which its kernels have passed their tests."""
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


# Mark these as constants for torch.compile, as torch.compiler.assume_constant_result does, but without
# importing the compiler.
for _function in (_triton_unavailable, _auto):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010
