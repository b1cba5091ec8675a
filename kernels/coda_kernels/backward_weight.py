"""Gradients of the parameters: sums over all pixels of (something of the pixel) x (its patch), split over pixels, added in fixed order.

dA_o   = sum_p gs_o z u^T + (sum_p t_o z z~^T) A~_o     rows (o, k) made in registers: the Khatri-Rao product gs (x) z
db_o   = sum_p gs_o u^T + ...                           rows as they are
dB     = sum_p dz x^T
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, times, window_offsets


@triton.jit(do_not_specialize=["chunk"])
def outer_sum(
    u_ptr,  # canvas [N, HP, WP, CP]
    starts_ptr,  # [PP]: where in u the window of a pixel starts
    rows_ptr,  # z [PP, R] where SCALED, else the rows: [PP, >= ROWS] with PIXELS_FIRST, else [ROWS, PP]
    scale_ptr,  # [n, PP], or unused without SCALED
    partial_ptr,  # out [splits, ROWS, K], float32
    PP: tl.int64,  # pixels, rounded up to whole blocks; rows or their scale are zeros past the last one
    chunk: tl.int32,  # pixels a split, whole blocks
    s_rows: tl.int64,
    WP: tl.int32,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # n R where scaled
    R: tl.constexpr,
    SCALED: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """``sum_p row_p (x) u_p`` over one split of the pixels: a tile of BO BR rows and BN entries of the window.

    SCALED: row (o, k) is ``scale_o z_k``, BO units with BR of their R ranks; else BO = 1 and BR rows. This loop runs over pixels, so that
    finding their windows would be its overhead: `project` left a table of their starts.
    """
    columns: tl.constexpr = (K + BN - 1) // BN
    ranks: tl.constexpr = R // BR if SCALED else 1
    units: tl.constexpr = ROWS // R if SCALED else 1
    i_rows, i_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    first = tl.program_id(1).to(tl.int64) * chunk
    o_o = i_rows // ranks * BO + tl.arange(0, BO)
    o_r = (i_rows % ranks if SCALED else i_rows) * BR + tl.arange(0, BR)
    o_j, o_p = i_n * BN + tl.arange(0, BN), tl.arange(0, BP)
    if PIXELS_FIRST:
        p_rows = rows_ptr + first * s_rows + (o_p * s_rows)[None, :] + (o_r if SCALED else o_r % ROWS)[:, None]
    else:
        p_rows = rows_ptr + first + (o_r % ROWS * s_rows)[:, None] + o_p[None, :]
    p_scale = scale_ptr + first + (o_o % units * PP)[:, None] + o_p[None, :]
    p_starts = starts_ptr + first + o_p
    p_u = u_ptr + window_offsets(o_j, WP, CP, KH, KW, DH, DW)[None, :]
    b_acc = tl.zeros((BO * BR, BN), tl.float32)
    count = tl.minimum(PP - first, chunk).to(tl.int32)
    for _ in range(0, count, BP):
        b_start = tl.multiple_of(tl.load(p_starts), 8)  # rows of a canvas are whole 16-byte words
        b_u = tl.load(p_u + b_start[:, None])
        b_rows = tl.load(p_rows)
        if SCALED:
            b_rows = tl.reshape(times(b_rows[None, :, :], tl.load(p_scale)[:, None, :]), (BO * BR, BP))
            p_scale += BP
        b_acc = dot(b_rows, b_u, b_acc, PRECISION)
        p_starts += BP
        p_rows += BP * s_rows if PIXELS_FIRST else BP
    if SCALED:
        m_row = tl.reshape(tl.broadcast_to((o_o < units)[:, None], (BO, BR)), (BO * BR,))
        o_row = tl.reshape(o_o[:, None] * R + o_r[None, :], (BO * BR,))
    else:
        m_row, o_row = o_r < ROWS, o_r
    p_out = partial_ptr + tl.program_id(1).to(tl.int64) * (ROWS * K) + o_row.to(tl.int64)[:, None] * K + o_j[None, :]
    tl.store(p_out, b_acc, m_row[:, None] & (o_j < K)[None, :])
