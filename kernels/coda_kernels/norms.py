"""The norms of a DAU on the device: functions s that scale a weight w to s(|w|^2) w.

To add a norm, write two functions here, enter them in ``NORMS``, and do the same for torch in
``coda_fast/_norms.py``; kernels are compiled with the functions that they are given.
"""

from __future__ import annotations

import typing

import triton
import triton.language as tl


class Norm(typing.NamedTuple):
    """A norm as functions of float32 blocks and the constant EPS; q is |w|^2."""

    scale: triton.runtime.JITFunction  # (q, EPS) -> s(q); NaN if q is infinite: w is too long for float32
    slope: triton.runtime.JITFunction  # (factor, |w|, q, EPS) -> factor ds/d|w|, finite at w = 0


@triton.jit
def squash_scale(b_square, EPS: tl.constexpr):
    """sqrt(q) / (1 + q)."""
    return tl.sqrt(b_square) / (1 + b_square)


@triton.jit
def squash_slope(b_factor, b_length, b_square, EPS: tl.constexpr):
    """factor (1 - q) / (1 + q)^2, as two quotients because the square would overflow; 0 at w = 0, where
    the factor may be anything.
    """
    return tl.where(b_length == 0, 0, b_factor * ((1 - b_square) / (1 + b_square)) / (1 + b_square))


@triton.jit
def l2_scale(b_square, EPS: tl.constexpr):
    """1 / max(sqrt(q), eps)."""
    return tl.where(
        b_square == float("inf"),
        float("nan"),
        1 / tl.maximum(tl.sqrt(b_square), EPS, propagate_nan=tl.PropagateNan.ALL),
    )


@triton.jit
def l2_slope(b_factor, b_length, b_square, EPS: tl.constexpr):
    """-factor / q; 0 for lengths up to eps."""
    return tl.where(b_length <= EPS, 0, -b_factor / tl.where(b_square == 0, 1, b_square))


NORMS = {"squash": Norm(squash_scale, squash_slope), "l2": Norm(l2_scale, l2_slope)}


def named(name: str) -> Norm:
    """The norm of this name; ValueError if there is none."""
    if name not in NORMS:
        raise ValueError(
            f"norm: expected one of {', '.join(map(repr, NORMS))} (coda_kernels.norms.NORMS), got {name!r}"
        )
    return NORMS[name]
