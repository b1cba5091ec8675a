"""Gradients that go back to the input: the factors gs and t, the gradient of z, and the fold G(x, v) with what z sends back.

    gs = g s(q),  t = 2 g <w, u> s'(q)
    dz_p = sum_o gs_o A_o^T u_p + t_o A_o^T w_po
    dx   = fold(sum_o gs_o (A_o z + b_o) + B^T dz)

The scaled operand (z gs, u gs or z t) is made in registers and goes to the tensor cores from there.
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, pixel_tile, times, window_offsets, window_starts


@triton.jit
def grad_factors(
    grad_ptr,  # strides g_image, g_unit, g_row, g_column
    dot_ptr,  # [n, P], or unused without T
    square_ptr,  # [n, P]
    gs_ptr,  # out [n, P]
    t_ptr,  # out [n, P]
    P: "i64",
    OH: "i32",
    OW: "i32",
    g_image: "i64",
    g_unit: "i64",
    g_row: "i64",
    g_column: "i64",
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
    T: tl.constexpr,
    BP: tl.constexpr,
):
    """gs and, with T, t; both 0 in the limit q = 0. Reads an upstream gradient of any strides."""
    i_o = tl.program_id(1).to(tl.int64)
    _, o_p, m_p = pixel_tile(tl.program_id(0), P, BP)
    o_n, rest = o_p // (OH * OW), (o_p % (OH * OW)).to(tl.int32)
    p_grad = grad_ptr + o_n * g_image + i_o * g_unit + (rest // OW) * g_row + (rest % OW) * g_column
    b_grad = tl.load(p_grad).to(tl.float32)
    b_square = tl.load(square_ptr + i_o * P + o_p)
    b_length = tl.sqrt(b_square)
    if SQUASH:
        b_gs = b_grad * (b_length / (1 + b_square))
    else:
        b_gs = b_grad / tl.maximum(b_length, EPS, propagate_nan=tl.PropagateNan.ALL)
    tl.store(gs_ptr + i_o * P + o_p, narrow(b_gs, gs_ptr.dtype.element_ty), m_p)
    if T:
        b_ratio = tl.load(dot_ptr + i_o * P + o_p) / b_length  # bounded by |u|
        if SQUASH:
            b_t = tl.where(b_length == 0, 0, b_grad * b_ratio * ((1 - b_square) / (1 + b_square)) / (1 + b_square))
        else:
            b_t = tl.where(b_length <= EPS, 0, -b_grad * b_ratio / b_square)
        tl.store(t_ptr + i_o * P + o_p, narrow(b_t, t_ptr.dtype.element_ty), m_p)


@triton.jit
def _per_unit(p_image, p_scale, p_matrix, b_acc, P, s_unit: tl.constexpr, N_UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + sum_o (image * scale_o) matrix_o``: one block of the image in registers, units in the inner loop."""
    b_image = tl.load(p_image)
    for _ in range(N_UNITS):
        b_acc = dot(times(b_image, tl.load(p_scale)[:, None]), tl.load(p_matrix), b_acc, PRECISION)
        p_scale += P
        p_matrix += s_unit
    return b_acc


@triton.jit
def grad_z(
    u_ptr,  # canvas [N, HP, WP, CP]
    a_ptr,  # [n, R, K]
    z_ptr,  # [P, R]
    gs_ptr,  # [n, P]
    t_ptr,  # [n, P]
    gram_ptr,  # [n, R, R]
    cross_ptr,  # [n, R]: A_o b_o
    contraction_ptr,  # [P, n R]: A_o^T u, where forward kept it
    dz_ptr,  # out [P, R]
    P: "i64",
    OH: "i32",
    OW: "i32",
    HP: "i64",
    WP: "i32",
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    N_UNITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BU: tl.constexpr,
):
    """``dz = sum_o gs_o A_o^T u + t_o (G_o z + A_o b_o)``, BR ranks a program."""
    tiles: tl.constexpr = R // BR
    i_m, i_r = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first, o_p, m_p = pixel_tile(i_m, P, BM)
    o_r = i_r * BR + tl.arange(0, BR)
    b_acc = tl.zeros((BM, BR), tl.float32)
    if KEPT:
        p_c = contraction_ptr + o_p[:, None] * (N_UNITS * R) + o_r[None, :]
        for o in range(N_UNITS):
            b_gs = tl.load(gs_ptr + o * P + o_p).to(tl.float32)
            b_acc += b_gs[:, None] * tl.load(p_c + o * R).to(tl.float32)
    else:
        p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            p_u = p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :]
            p_a = a_ptr + (o_r * K)[None, :] + o_k[:, None]
            b_acc = _per_unit(p_u, gs_ptr + o_p, p_a, b_acc, P, R * K, N_UNITS, PRECISION)
    for k in range(0, R, BU):
        o_k = k + tl.arange(0, BU)
        p_z = z_ptr + o_p[:, None] * R + o_k[None, :]
        p_g = gram_ptr + (o_r * R)[None, :] + o_k[:, None]
        b_acc = _per_unit(p_z, t_ptr + o_p, p_g, b_acc, P, R * R, N_UNITS, PRECISION)
    if HAS_BIAS:
        for o in range(0, N_UNITS, 16):
            o_o = o + tl.arange(0, 16)
            b_t = tl.load(t_ptr + o_p[:, None] + (tl.minimum(o_o, N_UNITS - 1).to(tl.int64) * P)[None, :])
            b_h = tl.load(cross_ptr + (o_o * R)[:, None] + o_r[None, :], mask=(o_o < N_UNITS)[:, None], other=0)
            b_acc = dot(b_t, b_h, b_acc, PRECISION)
    tl.store(dz_ptr + o_p[:, None] * R + o_r[None, :], narrow(b_acc, dz_ptr.dtype.element_ty), m_p[:, None])


@triton.jit
def fold(
    a_ptr,  # [n, R, K]
    b_ptr,  # [n, K]
    reduce_ptr,  # [R, K]: B
    z_ptr,  # [P, R]
    gs_ptr,  # [n, P]
    dz_ptr,  # [P, R]
    dx_ptr,  # out, strides s_image, s_channel, s_row, s_column
    N: "i64",
    H: "i32",
    W: "i32",
    OH: "i32",
    OW: "i32",
    P: "i64",
    s_image: "i64",
    s_channel: "i64",
    s_row: "i64",
    s_column: "i64",
    C: tl.constexpr,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    N_UNITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DIRECT: tl.constexpr,
    REDUCED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """dx for one tile of input pixels and channels: DIRECT, the term ``sum_o gs_o w_o`` (alone: explanation mode); REDUCED, ``B^T dz``.

    A gather over taps, so no atomics. Input pixels are taken by their remainder modulo the stride: pixels of one class see the same taps.
    """
    columns: tl.constexpr = (CP + BC - 1) // BC
    i_m, i_c = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_h, i_w = tl.program_id(1) // SW, tl.program_id(1) % SW
    class_h, class_w = (H + SH - 1) // SH, (W + SW - 1) // SW
    first, o_x, m_x = pixel_tile(i_m, N * class_h * class_w, BM)
    image = first // (class_h * class_w)
    rest = (o_x - image * (class_h * class_w)).to(tl.int32)
    o_n, rest = image + rest // (class_h * class_w), rest % (class_h * class_w)
    o_h, o_w = rest // class_w * SH + i_h, rest % class_w * SW + i_w
    m_x = m_x & (o_h < H) & (o_w < W)
    o_c = i_c * BC + tl.arange(0, BC)
    o_known = o_c % CP  # past the last channel: any, not stored
    o_r = tl.arange(0, BR)
    b_acc = tl.zeros((BM, BC), tl.float32)
    for tap in range(KH * KW):
        k_h, k_w = tap // KW, tap % KW
        # the tap reaches this class of pixels, or none of it
        if ((i_h + TOP - k_h * DH) % SH == 0) & ((i_w + LEFT - k_w * DW) % SW == 0):
            o_oh, o_ow = (o_h + TOP - k_h * DH) // SH, (o_w + LEFT - k_w * DW) // SW
            m_p = m_x & (o_oh >= 0) & (o_oh < OH) & (o_ow >= 0) & (o_ow < OW)
            o_p = tl.where(m_p, (o_n * OH + o_oh) * OW + o_ow, 0)
            o_k = tap * CP + o_known
            for r in range(0, R, BR):
                if DIRECT:
                    b_z = tl.load(z_ptr + o_p[:, None] * R + (r + o_r)[None, :], mask=m_p[:, None], other=0)
                    p_gs = gs_ptr + o_p
                    p_a = a_ptr + ((r + o_r) * K)[:, None] + o_k[None, :]
                    for _ in range(N_UNITS):
                        b_gs = tl.load(p_gs, mask=m_p, other=0)
                        b_acc = dot(times(b_z, b_gs[:, None]), tl.load(p_a), b_acc, PRECISION)
                        p_gs += P
                        p_a += R * K
                if REDUCED:
                    b_dz = tl.load(dz_ptr + o_p[:, None] * R + (r + o_r)[None, :], mask=m_p[:, None], other=0)
                    b_b = tl.load(reduce_ptr + ((r + o_r) * K)[:, None] + o_k[None, :])
                    b_acc = dot(b_dz, b_b, b_acc, PRECISION)
            if DIRECT and HAS_BIAS:
                for o in range(0, N_UNITS, 16):
                    o_o = o + tl.arange(0, 16)
                    m_o = o_o < N_UNITS
                    b_gs = tl.load(
                        gs_ptr + o_p[:, None] + (o_o.to(tl.int64) * P)[None, :], mask=m_p[:, None] & m_o[None, :], other=0
                    )
                    b_b = tl.load(b_ptr + (o_o * K)[:, None] + o_k[None, :], mask=m_o[:, None], other=0)
                    b_acc = dot(b_gs, b_b, b_acc, PRECISION)
    p_dx = dx_ptr + (o_n * s_image + o_h * s_row + o_w * s_column)[:, None] + (o_c * s_channel)[None, :]
    tl.store(p_dx, narrow(b_acc, dx_ptr.dtype.element_ty), m_x[:, None] & (o_c < C)[None, :])
