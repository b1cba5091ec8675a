"""F(x, u): y_po = s(|w_po|^2) <w_po, u_p> with w_po = A_o z_p + b_o, in one pass; two exact forms, neither of
which stores w.

contracted
    <w, u> = sum_k z_k (A_ok . u) + b_o . u      |w|^2 = |L_o^T z + shift_o|^2 + rest_o     r small against d
generated
    w = A_o z + b_o, a tile of d at a time in registers: <w, u> += w u, |w|^2 += w w
        r >= 128 or d <= 64
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, landed, narrow, pixel_tile, scaled, widen, window_offsets, window_starts


@triton.jit
def _inverse_power_of_two(b_x):
    """1 / 2^floor(log2 x) for x >= 0, a scale that rounds nothing; from 2^-100 to 2^40, so that its square
    times a norm is finite.
    """
    b_x = tl.clamp(b_x, 2.0**-40, 2.0**100)
    return ((254 << 23) - (b_x.to(tl.int32, bitcast=True) & (255 << 23))).to(tl.float32, bitcast=True)


@triton.jit
def _finish(
    b_dot,
    b_square,
    length_ptr,
    y_ptr,
    dot_ptr,
    square_ptr,
    o_p,
    m_p,
    o_o,
    P,
    units,
    keep,
    depth,
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
):
    """Scale, and store y as [P, n] and what backward needs as [n, P]."""
    # Cauchy-Schwarz; only rounding can violate it, and only where w nearly vanishes. A vector may be longer
    # by ``flushed`` than it seems: squares below the least number are 0
    flushed = tl.sqrt(depth * 1.1754944e-38)
    b_bound = (tl.sqrt(b_square) + flushed) * (tl.sqrt(tl.load(length_ptr + o_p)) + flushed)[:, None]
    b_dot = tl.clamp(b_dot, -b_bound, b_bound, propagate_nan=tl.PropagateNan.ALL)
    m_y = m_p[:, None] & (o_o < units)[None, :]
    b_y = scaled(b_square, SQUASH, EPS) * b_dot
    tl.store(y_ptr + o_p[:, None] * units + o_o[None, :], narrow(b_y, y_ptr.dtype.element_ty), m_y)
    o_kept = o_p[:, None] + (o_o.to(tl.int64) * P)[None, :]
    if keep > 1:
        tl.store(dot_ptr + o_kept, b_dot, m_y)
    if keep > 0:
        tl.store(square_ptr + o_kept, b_square, m_y)


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "keep"])
def contracted(
    u_ptr,  # canvas [N, HP, WP, CP]
    # [n', R, K], n' = n rounded up to whole blocks, as for everything of a unit that is read by blocks
    a_ptr,
    z_ptr,  # [PP, R]
    beta_ptr,  # [PP, NB], float32, NB = n' or 0
    length_ptr,  # [PP]: |u_p|^2
    factor_ptr,  # [n', R, R]: L_o^T over its largest entry
    shift_ptr,  # [n', R], over the same
    rest_ptr,  # [n']
    scale_ptr,  # [n']: that largest entry
    y_ptr,  # out [P, n]
    dot_ptr,  # out [n, P]
    square_ptr,  # out [n, P]
    contraction_ptr,  # out [P, n R]
    P: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    units: tl.int32,
    keep: tl.int32,  # what is stored for backward: 0 nothing, 1 |w|^2, 2 <w, u> too
    NB: tl.int32,  # n', or 0 without a bias
    # K and R, as bounds of loops: known at run time only, so that these are pipelined and not unrolled
    depth: tl.int32,
    ranks: tl.int32,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
    KEEP_CONTRACTION: tl.constexpr,
    NORM_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Implicit GEMM [pixels, d] x [d, n R]; its tile is contracted with z in registers, then the norm reuses
    the same registers.

    NORM_ONLY leaves the product out: |w|^2 is all that the adjoint map needs.
    """
    blocks = (units + BO - 1) // BO
    i_m, i_n = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, o_all, o_p = pixel_tile(i_m, P, BM)
    m_p = o_all < P
    p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
    o_j, o_r = tl.arange(0, BO * R), tl.arange(0, R)
    i_j = tl.cast(i_n, tl.int64) * (BO * R)
    p_a = a_ptr + i_j * K + o_j * K
    b_acc = tl.zeros((BM, BO * R), tl.float32)
    for k in range(0, 0 if NORM_ONLY else depth, BK):
        o_k = k + tl.arange(0, BK)
        b_u = tl.load(p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :])
        b_a = tl.load(p_a[None, :] + o_k[:, None])
        b_acc = dot(b_u, b_a, b_acc, PRECISION)
    o_o = i_n * BO + tl.arange(0, BO)
    if KEEP_CONTRACTION:
        m_c = m_p[:, None] & (i_j + o_j < units * R)[None, :]
        p_c = contraction_ptr + o_p[:, None] * (units * R) + (i_j + o_j)[None, :]
        tl.store(p_c, narrow(b_acc, contraction_ptr.dtype.element_ty), m_c)
    # <w, u> is reduced before the norm is begun: one accumulator alive at a time (the other order spilled 592
    # bytes)
    b_z = tl.load(z_ptr + o_p[:, None] * R + o_r[None, :])
    b_wide = widen(b_z)
    b_dot = tl.sum(tl.reshape(b_acc, (BM, BO, R)) * b_wide[:, None, :], 2)
    if HAS_BIAS and not NORM_ONLY:
        b_dot += tl.load(beta_ptr + o_p[:, None] * NB + o_o[None, :])
    # |L^T z + shift|^2 + rest in units of the largest entries of z and of L: 16-bit z is
    # exact in float16, and L loses less than z did
    b_inverse = _inverse_power_of_two(tl.max(tl.abs(b_wide), 1))
    o_b = tl.arange(0, BR)
    p_l = factor_ptr + i_j * R + (o_j * R)[None, :] + o_b[:, None]
    p_z = z_ptr + o_p[:, None] * R + o_b[None, :]
    # zeros without a bias; starting from a constant spills
    b_v = b_inverse[:, None] * tl.load(shift_ptr + i_j + o_j)[None, :]
    for k in range(0, ranks, BR):  # z again, a piece at a time: all of L at once took 40 registers
        b_l = tl.load(p_l + k)
        b_unit = widen(tl.load(p_z + k)) * b_inverse[:, None]
        b_v = landed(dot(narrow(b_unit, b_l.dtype), b_l, b_v, PRECISION))
    b_size = tl.load(scale_ptr + o_o)[None, :] / b_inverse[:, None]
    b_square = tl.sum(tl.reshape(b_v * b_v, (BM, BO, R)), 2) * (b_size * b_size)
    if HAS_BIAS:
        b_square += tl.load(rest_ptr + o_o)[None, :]
    _finish(
        b_dot,
        b_square,
        length_ptr,
        y_ptr,
        dot_ptr,
        square_ptr,
        o_p,
        m_p,
        o_o,
        P,
        units,
        keep,
        depth,
        SQUASH,
        EPS,
    )


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "keep"])
def generated(
    u_ptr,  # canvas [N, HP, WP, CP]
    a_ptr,  # [n', R, K]
    b_ptr,  # [n', K]
    z_ptr,  # [PP, R]
    length_ptr,  # [PP]: |u_p|^2
    y_ptr,  # out [P, n]
    dot_ptr,  # out [n, P]
    square_ptr,  # out [n, P]
    P: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    units: tl.int32,
    keep: tl.int32,  # what is stored for backward: 0 nothing, 1 |w|^2, 2 <w, u> too
    depth: tl.int32,  # K and R, as above
    ranks: tl.int32,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """GEMM [pixels, R] x [R, BD of d] a unit: a tile of w, multiplied by u and by itself where it stands.
    z stays put if BR = R.
    """
    blocks = (units + BO - 1) // BO
    i_m, i_n = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, o_all, o_p = pixel_tile(i_m, P, BM)
    m_p = o_all < P
    p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
    o_j = tl.arange(0, BO * BD)
    o_unit, o_r = i_n * BO + o_j // BD, tl.arange(0, BR)
    p_a = a_ptr + o_unit.to(tl.int64) * (R * K) + o_j % BD
    p_z = z_ptr + o_p[:, None] * R + o_r[None, :]
    b_z = tl.load(p_z)
    b_dot = tl.zeros((BM, BO), tl.float32)
    b_square = tl.zeros((BM, BO), tl.float32)
    for k in range(0, depth, BD):
        b_w = tl.zeros((BM, BO * BD), tl.float32)
        if BR == R:
            b_w = dot(b_z, tl.load(p_a[None, :] + (o_r * K)[:, None] + k), b_w, PRECISION)
        else:
            for r in range(0, ranks, BR):
                b_w = dot(
                    tl.load(p_z + r), tl.load(p_a[None, :] + ((r + o_r) * K)[:, None] + k), b_w, PRECISION
                )
        if HAS_BIAS:
            b_w += widen(tl.load(b_ptr + o_unit * K + o_j % BD + k))[None, :]
        o_k = k + tl.arange(0, BD)
        b_u = widen(tl.load(p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :]))
        b_w = tl.reshape(b_w, (BM, BO, BD))
        b_dot += tl.sum(b_w * b_u[:, None, :], 2)
        b_square += tl.sum(b_w * b_w, 2)
    o_o = i_n * BO + tl.arange(0, BO)
    _finish(
        b_dot,
        b_square,
        length_ptr,
        y_ptr,
        dot_ptr,
        square_ptr,
        o_p,
        m_p,
        o_o,
        P,
        units,
        keep,
        depth,
        SQUASH,
        EPS,
    )
