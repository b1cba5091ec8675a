"""Gradients of the parameters: sums over all pixels of (something of the pixel) x (its patch), split over pixels, added in fixed order.

    dA_o   = sum_p gs_o z u^T + (sum_p t_o z z~^T) A~_o     rows (o, k) made in registers: the Khatri-Rao product gs (x) z
    db_o   = sum_p gs_o u^T + ...                           rows as they are
    dB     = sum_p dz x^T
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, times, window_offsets, window_starts


@triton.jit
def outer_sum(
    u_ptr,  # canvas [N, HP, WP, CP]
    rows_ptr,  # row k of pixel p at k s_row + p s_pixel: z [P, R] where scaled, else the rows themselves
    scale_ptr,  # [n, P], or unused without SCALED
    partial_ptr,  # out [splits, ROWS, K], float32
    P: "i64",
    chunk: "i64",  # pixels a split, a multiple of BP
    s_row: "i64",
    s_pixel: "i64",
    OH: tl.constexpr,
    OW: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # n R where scaled
    R: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """``sum_p row_p (x) u_p`` over one split of the pixels: a tile of BO BR rows and BN entries of the window.

    SCALED: row (o, k) is ``scale_o z_k``, BO units with BR of their R ranks; else BO = 1 and BR rows. The size of the image is fixed at
    compile time: this loop runs over pixels, and finding them is its overhead.
    """
    columns: tl.constexpr = (K + BN - 1) // BN
    ranks: tl.constexpr = R // BR if SCALED else 1
    i_rows, i_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_s = tl.program_id(1).to(tl.int64)
    o_o = i_rows // ranks * BO + tl.arange(0, BO)
    o_r = (i_rows % ranks if SCALED else i_rows) * BR + tl.arange(0, BR)
    o_j = i_n * BN + tl.arange(0, BN)
    o_x = window_offsets(o_j, WP, CP, KH, KW, DH, DW)
    if SCALED:
        m_row = tl.reshape(tl.broadcast_to((o_o < ROWS // R)[:, None], (BO, BR)), (BO * BR,))
        o_row = tl.reshape(o_o[:, None] * R + o_r[None, :], (BO * BR,))
        p_scale = scale_ptr + (tl.minimum(o_o, ROWS // R - 1).to(tl.int64) * P)[:, None]
        p_rows = rows_ptr + (o_r * s_row)[:, None]
    else:
        m_row, o_row = o_r < ROWS, o_r
        p_rows = rows_ptr + (tl.minimum(o_r, ROWS - 1) * s_row)[:, None]
    b_acc = tl.zeros((BO * BR, BN), tl.float32)
    stop = tl.minimum((i_s + 1) * chunk, P)
    for p in range(i_s * chunk, stop, BP):
        o_p = p + tl.arange(0, BP)
        m_p = o_p < stop
        o_p = tl.minimum(o_p, P - 1)
        b_u = tl.load((u_ptr + window_starts(p, o_p, OH, OW, HP, WP, CP, SH, SW))[:, None] + o_x[None, :])
        b_rows = tl.load(p_rows + (o_p * s_pixel)[None, :], mask=m_p[None, :], other=0)
        if SCALED:
            b_scale = tl.load(p_scale + o_p[None, :], mask=m_p[None, :], other=0)
            b_rows = tl.reshape(times(b_rows[None, :, :], b_scale[:, None, :]), (BO * BR, BP))
        b_acc = dot(b_rows, b_u, b_acc, PRECISION)
    p_out = partial_ptr + i_s * (ROWS * K) + o_row.to(tl.int64)[:, None] * K + o_j[None, :]
    tl.store(p_out, b_acc, m_row[:, None] & (o_j < K)[None, :])
