"""The norm of a unit as a sum of squares, ``|A_o^T z + b_o|^2 = |L_o^T z + shift_o|^2 + rest_o``, and the
powers of two that keep the factors of the backward pass in range. Device code of ``prepare``.
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, widen


@triton.jit
def _unit_scale(longest, other):
    """A power of two from 2^-100 to 2^100, at least the largest entry of A_o A_o^T and of A_o b_o: these are
    at most products of lengths (Cauchy-Schwarz), whose squares are ``longest`` (of A_o's rows) and ``other``.
    """
    product = tl.sqrt(longest) * tl.sqrt(tl.maximum(longest, other))
    bits = tl.minimum(tl.maximum(product, 2.0**-100), 2.0**100).to(tl.int32, bitcast=True)
    bits = (bits + ((1 << 23) - 1)) & (255 << 23)  # up to the next power of two
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lengths(i_o, weight_ptr, bias_ptr, scale_ptr, rank, D, ranks, HAS_BIAS: tl.constexpr):
    """Store `_unit_scale` for a unit that needs no norm factor."""
    BR: tl.constexpr = 16
    BK: tl.constexpr = 256
    p_a = weight_ptr + tl.cast(i_o, tl.int64) * (rank * D)
    o_k = tl.arange(0, BK)
    longest, other = 0.0, 0.0
    for r in range(0, ranks, BR):
        o_r = r + tl.arange(0, BR)
        b_rows = tl.zeros((BR,), tl.float32)
        for k in range(0, D, BK):
            m_a = (o_r < rank)[:, None] & (k + o_k < D)[None, :]
            b_a = widen(tl.load(p_a + o_r[:, None] * D + (k + o_k)[None, :], mask=m_a, other=0))
            b_rows += tl.sum(b_a * b_a, 1)
        longest = tl.maximum(longest, tl.max(b_rows, 0))
    if HAS_BIAS:
        b_squares = tl.zeros((BK,), tl.float32)
        for k in range(0, D, BK):
            b_b = widen(tl.load(bias_ptr + i_o * D + k + o_k, mask=k + o_k < D, other=0))
            b_squares += b_b * b_b
        other = tl.sum(b_squares, 0)
    tl.store(scale_ptr + i_o, _unit_scale(longest, other))


@triton.jit
def norm_factor(
    i_o, weight_ptr, bias_ptr, factor_ptr, shift_ptr, rest_ptr, size_ptr, scale_ptr, rank, D,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``|A_o^T z + b_o|^2 = |L_o^T z + shift_o|^2 + rest_o``, from the Cholesky factor of
    ``[A_o; b_o] [A_o; b_o]^T`` with b_o last.

    A sum of squares cannot be negative. Products of 16-bit weights are exact in float32; float32 weights
    (WIDE) use float64, which keeps float32's accuracy where w nearly vanishes. One program per unit, R <= 64.
    Its cost is the latency of R sequential steps, so the matrix is split into quarters: one of them is the
    transpose of its neighbour, and after half of the steps three are no longer needed.
    """
    H: tl.constexpr = R // 2 if R > 16 else R
    dtype = tl.float64 if WIDE else tl.float32
    p_a = weight_ptr + tl.cast(i_o, tl.int64) * (rank * D)
    p_factor = factor_ptr + tl.cast(i_o, tl.int64) * (R * R)
    o_h = tl.arange(0, H)
    on_diagonal = o_h[:, None] == o_h[None, :]
    m_1, m_2 = o_h < rank, H + o_h < rank
    b_11 = tl.zeros((H, H), dtype)
    b_21 = tl.zeros((H, H), dtype)
    b_22 = tl.zeros((H, H), dtype)
    b_cross1 = tl.zeros((H,), dtype)
    b_cross2 = tl.zeros((H,), dtype)
    rest = tl.zeros((1,), dtype)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < D
        b_a1 = tl.load(p_a + o_h[:, None] * D + o_k[None, :], mask=m_1[:, None] & m_k[None, :], other=0)
        b_t1 = tl.load(p_a + o_h[None, :] * D + o_k[:, None], mask=m_1[None, :] & m_k[:, None], other=0)
        if WIDE:
            b_a1, b_t1 = b_a1.to(tl.float64), b_t1.to(tl.float64)
        b_11 = dot(b_a1, b_t1, b_11, "ieee")
        if HAS_BIAS:
            b_b = widen(tl.load(bias_ptr + i_o * D + o_k, mask=m_k, other=0)).to(dtype)
            b_cross1 += tl.sum((b_a1 if WIDE else widen(b_a1)) * b_b[None, :], 1)
            rest += tl.sum(b_b * b_b, 0)
        if H < R:
            b_a2 = tl.load(
                p_a + (H + o_h)[:, None] * D + o_k[None, :], mask=m_2[:, None] & m_k[None, :], other=0
            )
            b_t2 = tl.load(
                p_a + (H + o_h)[None, :] * D + o_k[:, None], mask=m_2[None, :] & m_k[:, None], other=0
            )
            if WIDE:
                b_a2, b_t2 = b_a2.to(tl.float64), b_t2.to(tl.float64)
            b_21 = dot(b_a2, b_t1, b_21, "ieee")
            b_22 = dot(b_a2, b_t2, b_22, "ieee")
            if HAS_BIAS:
                b_cross2 += tl.sum((b_a2 if WIDE else widen(b_a2)) * b_b[None, :], 1)
    # scale rows to length 1, so that a pivot is compared with its own row, not with longer ones, whose number
    # in z may be 0
    b_squares = tl.sum(tl.where(on_diagonal, b_11, 0), 1)
    longest, b_length1 = tl.max(b_squares, 0), tl.sqrt(b_squares)
    b_inverse1 = 1 / tl.where(b_squares == 0, 1, b_length1)
    b_11 *= b_inverse1[:, None] * b_inverse1[None, :]
    b_cross1 *= b_inverse1
    if H < R:
        b_squares = tl.sum(tl.where(on_diagonal, b_22, 0), 1)
        longest, b_length2 = tl.maximum(longest, tl.max(b_squares, 0)), tl.sqrt(b_squares)
        b_inverse2 = 1 / tl.where(b_squares == 0, 1, b_length2)
        b_21 *= b_inverse2[:, None] * b_inverse1[None, :]
        b_22 *= b_inverse2[:, None] * b_inverse2[None, :]
        b_cross2 *= b_inverse2
    tl.store(scale_ptr + i_o + tl.arange(0, 1), _unit_scale(longest.to(tl.float32), rest.to(tl.float32)))
    # at least 2^-22 |b_o|, for a far longer b: `contracted` multiplies shift over size by up to 2^40 and
    # squares it. If `maximum` drops a NaN here, the factor still has it
    size = tl.maximum(tl.sqrt(tl.maximum(longest, tl.max(rest, 0) * 2.0**-44)), 1e-12)
    scaling = 1 / size
    b_length1 *= scaling
    if H < R:
        b_length2 *= scaling
    least = R * (1e-14 if WIDE else 1e-7)  # smaller pivots are rounding: the row depends on earlier ones
    for j in range(H):
        b_column = tl.sum(tl.where(o_h[None, :] == j, b_11, 0), 1)
        pivot = tl.sum(tl.where(o_h == j, b_column, 0), 0)
        inverse = tl.where(pivot > least, 1 / tl.sqrt(tl.maximum(pivot, least)), 0)
        b_column = tl.where(o_h >= j, b_column * inverse, 0)
        b_11 -= b_column[:, None] * b_column[None, :]
        tl.store(
            p_factor + j * R + o_h, narrow((b_column * b_length1).to(tl.float32), factor_ptr.dtype.element_ty)
        )
        if HAS_BIAS:
            shift = tl.sum(tl.where(o_h == j, b_cross1, 0), 0) * inverse
            b_cross1 -= b_column * shift
            rest -= shift * shift
            tl.store(shift_ptr + i_o * R + j, (shift * scaling).to(tl.float32))
        if H < R:
            b_below = tl.sum(tl.where(o_h[None, :] == j, b_21, 0), 1) * inverse
            b_21 -= b_below[:, None] * b_column[None, :]
            b_22 -= b_below[:, None] * b_below[None, :]
            tl.store(
                p_factor + j * R + H + o_h,
                narrow((b_below * b_length2).to(tl.float32), factor_ptr.dtype.element_ty),
            )
            if HAS_BIAS:
                b_cross2 -= b_below * shift
    if H < R:
        for j in range(H):
            b_column = tl.sum(tl.where(o_h[None, :] == j, b_22, 0), 1)
            pivot = tl.sum(tl.where(o_h == j, b_column, 0), 0)
            inverse = tl.where(pivot > least, 1 / tl.sqrt(tl.maximum(pivot, least)), 0)
            b_column = tl.where(o_h >= j, b_column * inverse, 0)
            b_22 -= b_column[:, None] * b_column[None, :]
            p_row = p_factor + (H + j) * R
            tl.store(p_row + o_h, tl.zeros((H,), factor_ptr.dtype.element_ty))
            tl.store(
                p_row + H + o_h, narrow((b_column * b_length2).to(tl.float32), factor_ptr.dtype.element_ty)
            )
            if HAS_BIAS:
                shift = tl.sum(tl.where(o_h == j, b_cross2, 0), 0) * inverse
                b_cross2 -= b_column * shift
                rest -= shift * shift
                tl.store(shift_ptr + i_o * R + H + j, (shift * scaling).to(tl.float32))
    if not HAS_BIAS:
        tl.store(shift_ptr + i_o * R + tl.arange(0, R), tl.zeros((R,), tl.float32))
    tl.store(size_ptr + i_o, size.to(tl.float32))
    tl.store(rest_ptr + i_o + tl.arange(0, 1), tl.maximum(rest, 0).to(tl.float32))
