"""A DAU layer without its tensors (``Spec``), its tensors by name, and the calls of the three operators.

Operators have flat schemas. All other code passes these tuples around whole; only ``flatten`` and
``rebuild`` know the order of the arguments in a schema.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple, TypeVar

import torch

from coda_fast import _norms
from coda_fast._geometry import Geometry


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a DAU layer is besides its parameters."""

    geometry: Geometry
    norm: str  # a name in ``coda_fast._norms.NORMS``
    eps: float  # least length of w under "l2"

    def scale(self, length: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """s(|w|^2), from |w| and its square."""
        return _norms.named(self.norm).scale(length, square, self.eps)

    def slope(self, factor: torch.Tensor, length: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """``factor ds/d|w|``, from |w| and its square."""
        return _norms.named(self.norm).slope(factor, length, square, self.eps)

    def flat(self) -> tuple:
        """Stride, padding, dilation, norm and eps; the kernel is in the shape of the weight."""
        g = self.geometry
        return list(g.stride), list(g.padding), list(g.dilation), self.norm, self.eps


class Parameters(NamedTuple):
    """The parameters of a layer, or one thing for each of them (a shape, a dtype, a tangent)."""

    reduction_weight: Any  # B, [r, C, kh, kw]
    weight: Any  # A, [n, r, C, kh, kw]
    bias: Any = None  # b, [n, C, kh, kw], or None


class Kept(NamedTuple):
    """What ``align`` keeps for its backward pass, as tensors, shapes or dtypes; None for what it does not."""

    dot: Any = None  # <w, u>, [n, P]
    square: Any = None  # |w|^2, [n, P]
    contraction: Any = None  # A u of all pixels, in a layout of the backend's choice
    prepared: Any = None  # the parameters, in a layout of the backend's choice


# What ``align`` keeps for the backward pass under each value of ``keep``; each value keeps all that those
# before it keep. A backend that makes no contraction, or has no layout of its own, keeps None there.
KEEPS = {
    "nothing": Kept(dot=False, square=False, contraction=False, prepared=False),
    "norm": Kept(dot=False, square=True, contraction=False, prepared=True),
    "products": Kept(dot=True, square=True, contraction=False, prepared=True),
    "contraction": Kept(dot=True, square=True, contraction=True, prepared=True),
}


class Gradients(NamedTuple):
    """The gradients of ``F(x, u)``, or for each of them whether it is needed."""

    input: Any = None  # in x
    applied: Any = None  # in u
    reduction_weight: Any = None
    weight: Any = None
    bias: Any = None


class Align(NamedTuple):
    """A call of ``torch.ops.coda_fast.align``: F(x, u)."""

    input: torch.Tensor
    applied: torch.Tensor | None  # u; None means u = x
    parameters: Parameters
    spec: Spec
    detach: bool
    keep: str
    backend: str


class AlignBackward(NamedTuple):
    """A call of ``torch.ops.coda_fast.align_backward``: the gradients of F(x, u)."""

    grad: torch.Tensor
    input: torch.Tensor
    applied: torch.Tensor | None
    parameters: Parameters
    kept: Kept
    spec: Spec
    detach: bool
    needs: Gradients
    backend: str


class Adjoint(NamedTuple):
    """A call of ``torch.ops.coda_fast.adjoint``: G(x, v)."""

    input: torch.Tensor
    value: torch.Tensor
    parameters: Parameters
    spec: Spec
    backend: str


Call = TypeVar("Call", Align, AlignBackward, Adjoint)


def flatten(call: Align | AlignBackward | Adjoint) -> list:
    """The arguments of the operator, in the order of its schema."""
    flat: list = []
    for value in call:
        if isinstance(value, Spec):
            flat.extend(value.flat())
        elif isinstance(value, Gradients):
            flat.append(list(value))
        elif isinstance(value, (Parameters, Kept)):
            flat.extend(value)  # not +=, which torch.compile of torch 2.11 refuses for a named tuple
        else:
            flat.append(value)
    return flat


def rebuild(kind: type[Call], arguments) -> Call:
    """The inverse of ``flatten``: the call with these arguments."""
    rest, found = iter(arguments), {}
    take = lambda part: part(*itertools.islice(rest, len(part._fields)))
    for name in kind._fields:
        if name == "parameters":
            found[name] = take(Parameters)
        elif name == "kept":
            found[name] = take(Kept)
        elif name == "needs":
            found[name] = Gradients(*next(rest))
        elif name == "spec":
            stride, padding, dilation, norm, eps = itertools.islice(rest, 5)
            kernel = found["parameters"].weight.shape[3:]
            geometry = Geometry(tuple(kernel), tuple(stride), tuple(dilation), tuple(padding))
            found[name] = Spec(geometry, norm, eps)
        else:
            found[name] = next(rest)
    return kind(**found)
