"""Once a step and per unit, from A~_o = [A_o b_o]: the triangular factor of the norm, or the Gram matrix of its gradient."""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, widen


@triton.jit
def gram(
    a_ptr,  # [n, R, K]
    b_ptr,  # [n, K]
    scale_ptr,  # [n]: what both are divided by
    gram_ptr,  # out [n, R, R]: A_o A_o^T
    cross_ptr,  # out [n, R]: A_o b_o
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile [BR, BR] of the Gram matrix of one unit, for the gradient ``A_o^T w = G_o z + A_o b_o``."""
    tiles: tl.constexpr = R // BR
    i_o, i_t = tl.program_id(0) // (tiles * tiles), tl.program_id(0) % (tiles * tiles)
    i_i, i_j = i_t // tiles, i_t % tiles
    p_a = a_ptr + tl.cast(i_o, tl.int64) * (R * K)
    o_i, o_j = i_i * BR + tl.arange(0, BR), i_j * BR + tl.arange(0, BR)
    b_gram = tl.zeros((BR, BR), tl.float32)
    b_cross = tl.zeros((BR,), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_i = tl.load(p_a + o_i[:, None] * K + o_k[None, :])
        b_j = tl.load(p_a + o_j[None, :] * K + o_k[:, None])
        b_gram = dot(b_i, b_j, b_gram, PRECISION)
        if HAS_BIAS:
            b_b = widen(tl.load(b_ptr + i_o * K + o_k))
            b_cross += tl.sum(widen(b_i) * b_b[None, :], 1)
    inverse = 1 / tl.load(scale_ptr + i_o)
    b_gram, b_cross = b_gram * inverse, b_cross * inverse
    p_gram = gram_ptr + tl.cast(i_o, tl.int64) * (R * R)
    tl.store(p_gram + o_i[:, None] * R + o_j[None, :], narrow(b_gram, gram_ptr.dtype.element_ty))
    if HAS_BIAS:
        tl.store(cross_ptr + i_o * R + o_i, narrow(b_cross, cross_ptr.dtype.element_ty), mask=o_i >= tl.where(i_j == 0, 0, R))


@triton.jit
def norm_factor(
    a_ptr,  # [n, R, K]
    b_ptr,  # [n, K]
    factor_ptr,  # out [n, R, R]: L_o^T over its largest entry, so that it fits any dtype
    shift_ptr,  # out [n, R], float32: over the same
    rest_ptr,  # out [n], float32
    scale_ptr,  # out [n], float32: that largest entry, at least 1e-12
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BK: tl.constexpr,
):
    """``|A_o z + b_o|^2 = |L_o^T z + shift_o|^2 + rest_o``, from the Cholesky factor of ``[A_o b_o]^T [A_o b_o]`` with b_o last.

    A sum of squares cannot be negative. 16-bit weights multiply exactly into float32 sums; float32 weights (WIDE) take float64, which
    keeps float32's accuracy where w nearly vanishes. One program a unit, the matrix in registers, R <= 64.
    """
    i_o = tl.program_id(0)
    dtype = tl.float64 if WIDE else tl.float32
    p_a = a_ptr + tl.cast(i_o, tl.int64) * (R * K)
    o_r = tl.arange(0, R)
    b_gram = tl.zeros((R, R), dtype)
    b_cross = tl.zeros((R,), dtype)
    rest = tl.zeros((1,), dtype)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_a = tl.load(p_a + o_r[:, None] * K + o_k[None, :])
        b_t = tl.load(p_a + o_r[None, :] * K + o_k[:, None])
        if WIDE:
            b_a, b_t = b_a.to(tl.float64), b_t.to(tl.float64)
        b_gram = dot(b_a, b_t, b_gram, "ieee")
        if HAS_BIAS:
            b_b = widen(tl.load(b_ptr + i_o * K + o_k)).to(dtype)
            b_cross += tl.sum((b_a if WIDE else widen(b_a)) * b_b[None, :], 1)
            rest += tl.sum(b_b * b_b, 0)
    trace = tl.sum(tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_gram, 0), 1), 0)
    least = trace * (1e-14 if WIDE else 1e-7)  # pivots below are rounding: A_o has no more rows of its own
    b_factor = tl.zeros((R, R), dtype)
    b_shift = tl.zeros((R,), dtype)
    for j in range(R):
        b_column = tl.sum(tl.where(o_r[None, :] == j, b_gram, 0), 1)
        pivot = tl.sum(tl.where(o_r == j, b_column, 0), 0)
        inverse = tl.where(pivot > least, 1 / tl.sqrt(tl.maximum(pivot, least)), 0)
        b_column = tl.where(o_r >= j, b_column * inverse, 0)
        b_factor = tl.where(o_r[None, :] == j, b_column[:, None], b_factor)
        b_gram -= b_column[:, None] * b_column[None, :]
        if HAS_BIAS:
            shift = tl.sum(tl.where(o_r == j, b_cross, 0), 0) * inverse
            b_shift = tl.where(o_r == j, shift, b_shift)
            b_cross -= b_column * shift
            rest -= shift * shift
    scale = tl.maximum(tl.max(tl.max(tl.abs(b_factor), 1), 0), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    p_factor = factor_ptr + i_o * (R * R)
    tl.store(p_factor + o_r[None, :] * R + o_r[:, None], narrow((b_factor / scale).to(tl.float32), factor_ptr.dtype.element_ty))
    tl.store(scale_ptr + i_o, scale.to(tl.float32))
    tl.store(shift_ptr + i_o * R + o_r, (b_shift / scale).to(tl.float32))
    tl.store(rest_ptr + i_o + tl.arange(0, 1), tl.maximum(rest, 0).to(tl.float32))
