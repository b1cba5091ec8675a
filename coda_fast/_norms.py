"""The norms of a DAU: functions s that scale a dynamic weight w to ``s(|w|^2) w``, so that its length is
bounded.

To add a norm, write a class here, enter it in ``NORMS``, and do the same for the Triton kernels in
``coda_kernels/norms.py``; every backend, check and derivative then finds it. Below, q is |w|^2.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch


class Norm(Protocol):
    """A norm as functions of the length |w| and its square q, which autograd can differentiate."""

    def scale(self, length: torch.Tensor, square: torch.Tensor, eps: float) -> torch.Tensor:
        """s(q). NaN where q is infinite: |w|^2 has left the range of the dtype."""

    def slope(
        self, factor: torch.Tensor, length: torch.Tensor, square: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """``factor * ds/d|w|``, which overflows only if ``factor`` does. At w = 0 any value will do."""

    def curvature(self, length: torch.Tensor, square: torch.Tensor, eps: float) -> torch.Tensor:
        """``(d slope_1 / d|w|) / |w|`` with ``slope_1 = (ds/d|w|) / |w|``, for second derivatives, where
        |w| > ``flat_below(eps)``.
        """

    def flat_below(self, eps: float) -> float:
        """The length up to which s is constant, or its slope does not matter because w = 0."""


class Squash:
    """``s(q) = sqrt(q) / (1 + q)``: the scaled weight is shorter than 1 (SQ in arXiv:2104.00032)."""

    def scale(self, length, square, eps):
        return length / (1 + square)

    def slope(self, factor, length, square, eps):
        # (1 + q)^2 would overflow where each quotient does not
        return factor * ((1 - square) / (1 + square)) / (1 + square)

    def curvature(self, length, square, eps):
        return (3 * square.square() - 6 * square - 1) / (length * square * (1 + square) ** 3)

    def flat_below(self, eps):
        return 0.0


class L2:
    """``s(q) = 1 / max(sqrt(q), eps)``: the scaled weight has length 1 (L2 in arXiv:2104.00032)."""

    def scale(self, length, square, eps):
        # NaN where the square is infinite, as in Squash, rather than 1 / infinity = 0
        return torch.where(square == math.inf, math.nan, 1 / length.clamp_min(eps))

    def slope(self, factor, length, square, eps):
        return torch.where(length > eps, -factor / square, 0)

    def curvature(self, length, square, eps):
        return 3 / length**5

    def flat_below(self, eps):
        return eps


NORMS: dict[str, Norm] = {"squash": Squash(), "l2": L2()}


def named(name: str) -> Norm:
    """The norm of this name.

    Raises:
        ValueError: there is no such norm.
    """
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {name!r}")
    return NORMS[name]
