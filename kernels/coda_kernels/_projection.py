"""The padded copy of an image, from which windows are read, and z = B x. Device code of ``prepare`` and
``prepare_backward``.
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, pixel_tile, widen, window_starts

PADDING_BLOCK = tl.constexpr(2048)  # entries of the padded image per program


@triton.jit
def pad_image(
    i, image_ptr, padded_ptr, total, s_image, s_channel, s_row, s_column, H, W, HP, WP, top, left,
    C: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Write the zero-padded, channels-last copy [N, HP, WP, CP] of an image [N, C, H, W] of any strides;
    it has ``total`` entries.
    """
    first = tl.cast(i, tl.int64) * PADDING_BLOCK
    o = tl.arange(0, PADDING_BLOCK)
    width = WP * CP
    o_rest = (first % width).to(tl.int32) + o
    o_row = first // width + o_rest // width
    o_n, o_h = o_row // HP, (o_row % HP).to(tl.int32) - top
    o_rest = o_rest % width
    o_w, o_c = o_rest // CP - left, o_rest % CP
    m_x = (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W) & (o_c < C) & (first + o < total)
    o_x = (
        o_n * s_image + o_c.to(tl.int64) * s_channel + o_h.to(tl.int64) * s_row + o_w.to(tl.int64) * s_column
    )
    b_x = tl.load(image_ptr + tl.where(m_x, o_x, 0), mask=m_x, other=0)
    tl.store(padded_ptr + first + o, b_x, mask=first + o < total)


@triton.jit
def project(
    i, x_ptr, reduce_ptr, bias_ptr, z_ptr, beta_ptr, length_ptr, starts_ptr, starts, s_image, s_channel,
    s_row, s_column, H, W, top, left, P, PP, OH, OW, HP, WP, SH, SW, rank, units, units_padded, depth,
    C: tl.constexpr, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, BETA: tl.constexpr, LENGTH: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``[z | beta] = x_p [B; b]^T``; with LENGTH also ``|x_p|^2``, with ``starts`` also where windows start.
    There is no z if R = 0, and no beta without BETA.

    It reads the original image and parameters, so that it does not wait for their copies.
    """
    TAPS: tl.constexpr = KH * KW
    NB = units_padded if BETA else 0
    columns = tl.maximum((R + NB + BN - 1) // BN, 1)  # one if only lengths are wanted
    i_m, i_n = i // columns, i % columns
    first, o_p, o_known = pixel_tile(i_m, P, BM)
    m_p = o_p < PP
    # one 64-bit division per tile: pixels are relative to its first image
    image = first // (OH * OW)
    rest = (o_known - image * (OH * OW)).to(tl.int32)
    o_n, rest = image + rest // (OH * OW), rest % (OH * OW)
    o_h, o_w = rest // OW * SH - top, rest % OW * SW - left
    o_image = o_n * s_image
    o_j = i_n * BN + tl.arange(0, BN)
    # columns before R are rows of B, the others rows of b; masked ones are zero, at an address that exists
    if R > 0 and BETA:
        m_w = ((o_j < R) & (o_j < rank)) | ((o_j >= R) & (o_j - R < units))
        p_w = tl.where(o_j < R, reduce_ptr, bias_ptr) + tl.where(m_w, tl.where(o_j < R, o_j, o_j - R), 0) * (
            C * TAPS
        )
    elif R > 0:
        m_w = o_j < rank
        p_w = reduce_ptr + tl.where(m_w, o_j, 0) * (C * TAPS)
    else:
        m_w = o_j < (units if BETA else 0)
        p_w = bias_ptr + tl.where(m_w, o_j, 0) * (C * TAPS)
    b_acc = tl.zeros((BM, BN), tl.float32)
    b_length = tl.zeros((BM,), tl.float32)
    for k in range(0, depth, BK):
        o_k = k + tl.arange(0, BK)
        tap, o_c = o_k // CP, o_k % CP
        m_k = (o_c < C) & (tap < TAPS)
        o_y, o_x = o_h[:, None] + (tap // KW * DH)[None, :], o_w[:, None] + (tap % KW * DW)[None, :]
        m_x = (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W) & m_k[None, :]
        o_y, o_x = tl.where(m_x, o_y, 0), tl.where(m_x, o_x, 0)  # a valid address even if masked
        p_x = x_ptr + (o_image[:, None] + o_y.to(tl.int64) * s_row + o_x.to(tl.int64) * s_column)
        b_x = tl.load(p_x + (o_c.to(tl.int64) * s_channel)[None, :], mask=m_x, other=0)
        o_d = tap * C + o_c if LAST else o_c * TAPS + tap
        b_w = tl.load(p_w[None, :] + o_d[:, None], mask=m_w[None, :] & m_k[:, None], other=0)
        b_acc = dot(b_x, b_w, b_acc, PRECISION)
        if LENGTH:
            b_wide = widen(b_x)
            b_length += tl.sum(b_wide * b_wide, 1)
    if R > 0:
        m_z = m_p[:, None] & (o_j < R)[None, :]
        tl.store(z_ptr + o_p[:, None] * R + o_j[None, :], narrow(b_acc, z_ptr.dtype.element_ty), m_z)
    if BETA:
        m_b = m_p[:, None] & ((o_j >= R) & (o_j < R + NB))[None, :]
        tl.store(beta_ptr + o_p[:, None] * NB + (o_j - R)[None, :], b_acc, m_b)
    # not "m_p & (i_n == 0)": Triton 3.9's interpreter refuses a mask made from a scalar
    m_once = o_p < tl.where(i_n == 0, PP, 0)
    if LENGTH:
        tl.store(length_ptr + o_p, b_length, m_once)
    if starts:
        tl.store(starts_ptr + o_p, window_starts(first, o_known, OH, OW, HP, WP, CP, SH, SW), m_once)
