"""Choice of the implementation of the DAU layer.

``reference`` is the definition: two functions, F(x, u) and its transpose G(x, v), that automatic
differentiation goes through. ``factored`` and ``triton`` are fused: each is a module with the functions of
``Backend``. They know nothing of autograd; ``coda_fast.ops`` makes operators of them.
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
    """A fused backend: a module with these functions, which compute, and check nothing.

    x is [N, C, H, W], ``applied`` is u of the same shape, None where it is x itself; ``parameters`` have the
    dtype and device of x. F(x, u) is [N, n, OH, OW], in the memory format that ``_geometry.format_of`` gives.
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
        """F(x, u), and what ``keep``, a key of ``coda_fast._spec.KEEPS``, asks for; None for the rest."""

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
        """Gradients of <grad, F(x, u)>, None where ``needs`` is False; that in u is part of that in x where u
        is x. With ``detach`` (explanation mode) the direct term G(x, grad) alone, in the place of u's
        gradient, which is x's where u is x. ``kept``: what ``align`` has left; at least |w|^2.
        """

    def adjoint(
        self, input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec
    ) -> torch.Tensor:
        """G(x, v), in shape, dtype and memory format of x."""

    def adjoints(
        self,
        values: torch.Tensor,
        input: torch.Tensor,
        applied: torch.Tensor | None,
        parameters: Parameters,
        kept: Kept,
        spec: Spec,
    ) -> torch.Tensor:
        """G(x, v_k) of K values [K, N, n, OH, OW] as [K, N, C, H, W], in dtype and format of u. ``kept``:
        what ``align`` has left, if anything.
        """

    def kept_shapes(self, input: torch.Tensor, parameters: Parameters, spec: Spec, *, keep: str) -> Kept:
        """Shapes of what ``align`` keeps; (0,) for what it does not."""

    def gradients_like(self, parameters: Parameters) -> Parameters:
        """Empty tensors such as ``align_backward`` makes for the gradients of parameters."""


def fused(name: str) -> Backend:
    """The fused backend of this name; ValueError if there is none."""
    if name not in FUSED:
        raise ValueError(f"backend: expected {' or '.join(map(repr, FUSED))}, got {name!r}")
    return importlib.import_module(f"coda_fast.backends.{name}")


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
for _function in (_triton_unavailable, _auto):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010
