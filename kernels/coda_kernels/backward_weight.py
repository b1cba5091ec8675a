"""Gradients of the parameters: sums over all pixels of (something of the pixel) x (its patch), split over
pixels, added in fixed order.

dA_o
    = sum_p gs_o z u^T + (sum_p t_o z z^T) A_o + (sum_p t_o z) b_o^T
        rows (o, k) made in registers: the Khatri-Rao product gs (x) z
db_o   = sum_p gs_o u^T + (sum_p t_o z)^T A_o + (sum_p t_o) b_o^T            rows as they are
dB
    = sum_p dz x^T
        the same: both are columns of [dz | gs]
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, times, widen, window_offsets


@triton.jit
def _outer_sum(
    i,
    first,
    count,
    image_ptr,
    starts_ptr,
    rows_ptr,
    scale_ptr,
    out_ptr,
    totals_ptr,
    PP,
    s_rows,
    rows,
    units,
    WP,
    width,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    R: tl.constexpr,
    SCALED: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    WINDOWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """``sum_p row_p (x) image_p`` over ``count`` pixels from ``first`` on: tile ``i``, of BO BR rows and BN
    of ``width`` columns.

    SCALED: row (o, k) is ``scale_o z_k``, BO units with BR of their R ranks; else BO = 1 and BR rows, and the
    rows' own sums too where they do not come pixels first. WINDOWS: image_p is the window that begins at
    starts_p, else R numbers. This loop runs over pixels, so that finding their windows would be its overhead:
    hence the table of starts.
    """
    columns = (width + BN - 1) // BN
    i_rows, i_n = i // columns, i % columns
    ranks: tl.constexpr = R // BR if SCALED else 1
    o_o = i_rows // ranks * BO + tl.arange(0, BO)
    o_r = (i_rows % ranks if SCALED else i_rows) * BR + tl.arange(0, BR)
    o_j, o_p = i_n * BN + tl.arange(0, BN), tl.arange(0, BP)
    if PIXELS_FIRST:
        p_rows = (
            rows_ptr
            + first * s_rows
            + (o_p * s_rows)[None, :]
            + (o_r if SCALED else tl.where(o_r < rows, o_r, 0))[:, None]
        )
    else:
        p_rows = rows_ptr + first + (tl.where(o_r < rows, o_r, 0) * s_rows)[:, None] + o_p[None, :]
    if SCALED:
        p_scale = scale_ptr + first + (tl.where(o_o < units, o_o, 0) * PP)[:, None] + o_p[None, :]
    p_starts = starts_ptr + first + o_p
    if WINDOWS:
        p_u = image_ptr + window_offsets(o_j, WP, CP, KH, KW, DH, DW)[None, :]
    else:
        p_u = image_ptr + first * R + (o_p * R)[:, None] + (o_j % R)[None, :]
    b_acc = tl.zeros((BN, BO * BR) if SCALED else (BO * BR, BN), tl.float32)
    b_totals = tl.zeros((BR,), tl.float32)
    for _ in range(0, count, BP):
        if WINDOWS:
            b_start = tl.multiple_of(tl.load(p_starts), 8)  # rows of a canvas are whole 16-byte words
            b_u = tl.load(p_u + b_start[:, None])
            p_starts += BP
        else:
            b_u = tl.load(p_u)
            p_u += BP * R
        b_rows = tl.load(p_rows)
        if SCALED:
            b_rows = tl.reshape(times(b_rows[None, :, :], tl.load(p_scale)[:, None, :]), (BO * BR, BP))
            p_scale += BP
        elif not PIXELS_FIRST:
            b_totals += tl.sum(widen(b_rows), 1)
        # what is made in registers comes second: first, it would go to the tensor cores from there, which
        # ptxas serialises
        b_acc = (
            dot(tl.trans(b_u), tl.trans(b_rows), b_acc, PRECISION)
            if SCALED
            else dot(b_rows, b_u, b_acc, PRECISION)
        )
        p_rows += BP * s_rows if PIXELS_FIRST else BP
    if SCALED:
        m_row = tl.reshape(tl.broadcast_to((o_o < units)[:, None], (BO, BR)), (BO * BR,))
        o_row = tl.reshape(o_o[:, None] * R + o_r[None, :], (BO * BR,))
    else:
        m_row, o_row = o_r < rows, o_r
    if SCALED:
        b_acc = tl.trans(b_acc)
    tl.store(
        out_ptr + o_row.to(tl.int64)[:, None] * width + o_j[None, :],
        b_acc,
        m_row[:, None] & (o_j < width)[None, :],
    )
    if not SCALED and not PIXELS_FIRST:  # whole blocks of 16, so that nothing is left unwritten
        tl.store(totals_ptr + o_r, b_totals, mask=o_r < tl.where(i_n == 0, (rows + 15) // 16 * 16, 0))


@triton.jit(do_not_specialize=["PP", "chunk", "weights", "moments", "directs", "WP", "rows", "units"])
def parameter_sums(
    u_ptr,  # canvas [N, HP, WP, CP]
    starts_ptr,  # [PP]: where in u the window of a pixel starts
    z_ptr,  # [PP, R]
    gs_ptr,  # [n, PP]
    t_ptr,  # [n, PP]
    # [PP, >= rows], stride s_e: rows of their own, dz, gs or both; zeros past the last pixel, like all rows
    # here
    e_ptr,
    weight_ptr,  # out [parts, n, R, K], float32: sum_p gs z u^T
    moments_ptr,  # out [parts, n, R, R], float32: sum_p t z z^T
    direct_ptr,  # out [parts, rows, K], float32: sum_p e u^T
    first_ptr,  # out [parts, n, R], float32: sum_p t z
    zeroth_ptr,  # out [parts, n], float32: sum_p t
    s_part: tl.int64,  # between parts of any of them
    weights: tl.int32,  # programs that do each job, in this order; the rest sums t z and t
    moments: tl.int32,
    directs: tl.int32,
    PP: tl.int64,  # pixels, rounded up to whole blocks
    chunk: tl.int32,  # pixels a part, whole blocks
    s_e: tl.int32,
    rows: tl.int32,
    units: tl.int32,
    WP: tl.int32,
    depth: tl.int32,  # K
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """All sums over one part of the pixels."""
    i, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * chunk
    count = tl.minimum(PP - first, chunk).to(tl.int32)
    shift = part * s_part
    narrowest: tl.constexpr = BN if BN < R else R
    narrower: tl.constexpr = narrowest if narrowest < 64 else 64  # columns of what is as wide as z
    lower: tl.constexpr = 64 if BR * BO > 64 else BR * BO  # rows of what is not scaled
    if i < weights:
        _outer_sum(
            i,
            first,
            count,
            u_ptr,
            starts_ptr,
            z_ptr,
            gs_ptr,
            weight_ptr + shift,
            zeroth_ptr,
            PP,
            R,
            0,
            units,
            WP,
            depth,
            CP,
            KH,
            KW,
            DH,
            DW,
            R,
            True,
            True,
            True,
            PRECISION,
            BO,
            BR,
            BN,
            BP,
        )
    elif i < weights + moments:
        _outer_sum(
            i - weights,
            first,
            count,
            z_ptr,
            starts_ptr,
            z_ptr,
            t_ptr,
            moments_ptr + shift,
            zeroth_ptr,
            PP,
            R,
            0,
            units,
            WP,
            R,
            CP,
            KH,
            KW,
            DH,
            DW,
            R,
            True,
            True,
            False,
            PRECISION,
            BO,
            BR,
            narrower,
            BP,
        )
    elif i < weights + moments + directs:
        _outer_sum(
            i - weights - moments,
            first,
            count,
            u_ptr,
            starts_ptr,
            e_ptr,
            e_ptr,
            direct_ptr + shift,
            zeroth_ptr,
            PP,
            s_e,
            rows,
            units,
            WP,
            depth,
            CP,
            KH,
            KW,
            DH,
            DW,
            R,
            False,
            True,
            True,
            PRECISION,
            1,
            lower,
            BN if BN < 128 else 128,
            BP,
        )
    else:
        _outer_sum(
            i - weights - moments - directs,
            first,
            count,
            z_ptr,
            starts_ptr,
            t_ptr,
            t_ptr,
            first_ptr + shift,
            zeroth_ptr + shift,
            PP,
            PP,
            units,
            units,
            WP,
            R,
            CP,
            KH,
            KW,
            DH,
            DW,
            R,
            False,
            False,
            False,
            PRECISION,
            1,
            lower,
            narrower,
            BP,
        )


@triton.jit(do_not_specialize=["weights", "parts", "reduce_parts", "rank", "C", "CP", "TAPS"])
def finish(
    # [parts, n, R, K], float32, and so on: what `parameter_sums` leaves, t and with it its sums times scale
    weight_sum_ptr,
    moments_ptr,  # [parts, n, R, R]
    direct_ptr,  # [parts, n, K]
    first_ptr,  # [parts, n, R]
    zeroth_ptr,  # [parts, n]
    reduce_sum_ptr,  # [parts of their own, R, K]
    weight_ptr,  # packed [n', R, K]
    bias_ptr,  # packed [n', K]
    scale_ptr,  # [n]
    d_reduce_ptr,  # out [rank, C, kh, kw]
    d_weight_ptr,  # out [n, rank, C, kh, kw]
    d_bias_ptr,  # out [n, C, kh, kw]
    weights: tl.int32,  # programs for dA and db; the rest makes dB
    parts: tl.int32,
    s_part: tl.int64,
    reduce_parts: tl.int32,
    s_reduce: tl.int64,
    rank: tl.int32,
    C: tl.int32,
    TAPS: tl.int32,
    K: tl.int32,
    CP: tl.int32,
    R: tl.constexpr,
    LAST: tl.constexpr,  # parameters are channels last
    HAS_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Adds up the parts, with what comes from the norm, in the layout and dtype of the parameters."""
    BR: tl.constexpr = R if R < 64 else 64
    blocks = (K + BK - 1) // BK
    i = tl.program_id(0)
    o_r = tl.arange(0, BR)
    if i < weights:
        i_o, o_k = tl.cast(i // blocks, tl.int64), i % blocks * BK + tl.arange(0, BK)
        m_k = o_k < K
        i_a = i_o * (R * K)
        inverse = 1 / tl.load(scale_ptr + i_o)
        tap, o_c = o_k // CP, o_k % CP
        m_out, o_out = (o_c < C) & (tap < TAPS), tap * C + o_c if LAST else o_c * TAPS + tap
        if HAS_BIAS:
            b_b = widen(tl.load(bias_ptr + i_o * K + o_k, mask=m_k, other=0))
        if WEIGHT:
            for r in range(0, R, BR):
                b_acc = tl.zeros((BR, BK), tl.float32)
                for j in range(0, R, BR):
                    b_h = tl.zeros((BR, BR), tl.float32)
                    o_h = (r + o_r)[:, None] * R + (j + o_r)[None, :]
                    for part in range(parts):
                        b_h += tl.load(moments_ptr + (part * s_part + i_o * (R * R)) + o_h)
                    b_a = widen(
                        tl.load(
                            weight_ptr + i_a + (j + o_r)[:, None] * K + o_k[None, :],
                            mask=m_k[None, :],
                            other=0,
                        )
                    )
                    b_acc = dot(b_h, b_a, b_acc, PRECISION)
                if HAS_BIAS:
                    b_first = tl.zeros((BR,), tl.float32)
                    for part in range(parts):
                        b_first += tl.load(first_ptr + (part * s_part + i_o * R + r) + o_r)
                    b_acc += b_first[:, None] * b_b[None, :]
                b_acc *= inverse
                o_sum = (r + o_r)[:, None] * K + o_k[None, :]
                for part in range(parts):
                    b_acc += tl.load(
                        weight_sum_ptr + (part * s_part + i_a) + o_sum, mask=m_k[None, :], other=0
                    )
                p_out = (
                    d_weight_ptr + (i_o * rank + r) * (C * TAPS) + o_r[:, None] * (C * TAPS) + o_out[None, :]
                )
                tl.store(
                    p_out,
                    narrow(b_acc, d_weight_ptr.dtype.element_ty),
                    m_out[None, :] & (r + o_r < rank)[:, None],
                )
        if BIAS:
            zeroth = 0.0
            for part in range(parts):
                zeroth += tl.load(zeroth_ptr + part * s_part + i_o)
            b_sum = zeroth * b_b
            for r in range(0, R, BR):
                b_first = tl.zeros((BR,), tl.float32)
                for part in range(parts):
                    b_first += tl.load(first_ptr + (part * s_part + i_o * R + r) + o_r)
                b_a = widen(
                    tl.load(
                        weight_ptr + i_a + (r + o_r)[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0
                    )
                )
                b_sum += tl.sum(b_first[:, None] * b_a, 0)
            b_sum *= inverse
            for part in range(parts):
                b_sum += tl.load(direct_ptr + (part * s_part + i_o * K) + o_k, mask=m_k, other=0)
            tl.store(d_bias_ptr + i_o * (C * TAPS) + o_out, narrow(b_sum, d_bias_ptr.dtype.element_ty), m_out)
    else:
        i_r, o_k = (i - weights) // blocks, (i - weights) % blocks * BK + tl.arange(0, BK)
        o_row = i_r * BR + o_r
        tap, o_c = o_k // CP, o_k % CP
        b_reduce = tl.zeros((BR, BK), tl.float32)
        for part in range(reduce_parts):
            b_reduce += tl.load(
                reduce_sum_ptr + part * s_reduce + o_row[:, None] * K + o_k[None, :],
                mask=(o_k < K)[None, :],
                other=0,
            )
        m_rows = (o_row < rank)[:, None] & ((o_c < C) & (tap < TAPS))[None, :]
        p_reduce = (
            d_reduce_ptr
            + o_row[:, None] * (C * TAPS)
            + (tap * C + o_c if LAST else o_c * TAPS + tap)[None, :]
        )
        tl.store(p_reduce, narrow(b_reduce, d_reduce_ptr.dtype.element_ty), m_rows)
