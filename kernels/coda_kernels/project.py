"""z = B x_p and beta_o = <b_o, u_p>: the small convolution before a layer, and the squared length of every patch."""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, pixel_tile, widen, window_offsets, window_starts


@triton.jit(do_not_specialize=["P"])  # a ragged last batch compiles nothing anew
def project(
    x_ptr,  # canvas [N, HP, WP, CP]
    w_ptr,  # [ROWS, K]: R rows of B, NB of b
    z_ptr,  # out [PP, R], PP = P rounded up to whole blocks, as for everything that is read by blocks of pixels
    beta_ptr,  # out [PP, NB], float32
    length_ptr,  # out [PP], float32
    starts_ptr,  # out [PP], int64
    P: tl.int64,
    PP: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    depth: tl.int32,  # K, as the bound of a loop: known at run time only, so that it is pipelined and not unrolled
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    NB: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``[z | beta] = x_p [B; b]^T``; with LENGTH, ``|x_p|^2``; with STARTS, where windows start; R = 0 or NB = 0: not that part."""
    columns: tl.constexpr = (ROWS + BN - 1) // BN
    i_m, i_n = tl.program_id(0) // columns, tl.program_id(0) % columns
    first, o_p, o_known = pixel_tile(i_m, P, BM)
    m_p = o_p < PP
    o_start = window_starts(first, o_known, OH, OW, HP, WP, CP, SH, SW)
    p_row = x_ptr + o_start
    o_j = i_n * BN + tl.arange(0, BN)
    b_acc = tl.zeros((BM, BN), tl.float32)
    b_length = tl.zeros((BM,), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        b_x = tl.load(p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :])
        b_w = tl.load(w_ptr + (o_j % ROWS * K)[None, :] + o_k[:, None])
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
        if LENGTH:
            b_wide = tl.where(o_k[None, :] < KH * KW * CP, widen(b_x), 0)
            b_length += tl.sum(b_wide * b_wide, 1)
    if R > 0:
        m_z = m_p[:, None] & (o_j < R)[None, :]
        tl.store(z_ptr + o_p[:, None] * R + o_j[None, :], narrow(b_acc, z_ptr.dtype.element_ty), m_z)
    if NB > 0:
        m_b = m_p[:, None] & ((o_j >= R) & (o_j < R + NB))[None, :]
        tl.store(beta_ptr + o_p[:, None] * NB + (o_j - R)[None, :], b_acc, m_b)
    m_once = o_p < tl.where(i_n == 0, PP, 0)  # not "m_p & (i_n == 0)": Triton 3.9's interpreter refuses a mask made of a number
    if LENGTH:
        tl.store(length_ptr + o_p, b_length, m_once)
    if STARTS:
        tl.store(starts_ptr + o_p, o_start, m_once)
