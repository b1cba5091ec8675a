"""Gradients that go back to the input: the gradient of z, and the fold G(x, v) with what z sends back.

    dz_p = sum_o gs_o A_o^T u_p + t_o A_o^T w_po
    dx   = fold(sum_o gs_o (A_o z + b_o) + B^T dz)           gs = g s(q), t = 2 g <w, u> s'(q): prepare.py

The scaled operand (z gs, u gs or z t) is made in registers and goes to the tensor cores from there.
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, landed, narrow, pixel_tile, times, widen, window_offsets, window_starts


@triton.jit
def _per_unit(
    b_image, p_scale, m_scale, p_matrix, b_acc, PP, units, s_unit: tl.constexpr, PRECISION: tl.constexpr
):
    """``acc + sum_o (image * scale_o) matrix_o``: one block of the image stays in registers, units in the
    inner loop.

    float32 sums the units apart: one long chain of additions loses twice as much as eager torch does.
    """
    b_before = b_acc
    if b_image.dtype == tl.float32:
        b_acc = tl.zeros_like(b_acc)
    for _ in range(units):
        b_scale = tl.load(p_scale) if m_scale is None else tl.load(p_scale, mask=m_scale, other=0)
        b_acc = landed(dot(times(b_image, b_scale[:, None]), tl.load(p_matrix), b_acc, PRECISION))
        p_scale += PP
        p_matrix += s_unit
    return b_before + b_acc if b_image.dtype == tl.float32 else b_acc


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "units"])
def grad_z(
    u_ptr,  # canvas [N, HP, WP, CP]
    a_ptr,  # [n, R, K]
    z_ptr,  # [PP, R]
    gs_ptr,  # [n, PP]
    t_ptr,  # [n, PP]
    gram_ptr,  # [n, R, R]
    cross_ptr,  # [n, R]: A_o b_o
    contraction_ptr,  # [P, n R]: A_o^T u, where forward kept it
    e_ptr,  # out: dz, with zeros past P, is the first R columns of [PP, s_e]
    P: tl.int64,
    PP: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    s_e: tl.int32,
    # n, K and R, as bounds of loops: known at run time only, so that these are pipelined and not unrolled
    units: tl.int32,
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
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BU: tl.constexpr,
):
    """``dz = sum_o gs_o A_o^T u + t_o (G_o z + A_o b_o)``, BR ranks a program; t comes scaled up, G and A
    b scaled down.
    """
    tiles: tl.constexpr = R // BR
    i_m, i_r = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first, o_all, o_p = pixel_tile(i_m, P, BM)
    o_r = i_r * BR + tl.arange(0, BR)
    b_acc = tl.zeros((BM, BR), tl.float32)
    if KEPT:
        p_c = contraction_ptr + o_p[:, None] * (units * R) + o_r[None, :]
        for o in range(units):
            b_gs = widen(tl.load(gs_ptr + o * PP + o_p))
            b_acc += b_gs[:, None] * widen(tl.load(p_c + o * R))
    else:
        p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
        for k in range(0, depth, BK):
            o_k = k + tl.arange(0, BK)
            p_u = p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :]
            p_a = a_ptr + (o_r * K)[None, :] + o_k[:, None]
            b_acc = _per_unit(tl.load(p_u), gs_ptr + o_p, None, p_a, b_acc, PP, units, R * K, PRECISION)
    for k in range(0, ranks, BU):
        o_k = k + tl.arange(0, BU)
        p_z = z_ptr + o_p[:, None] * R + o_k[None, :]
        p_g = gram_ptr + (o_r * R)[None, :] + o_k[:, None]
        b_acc = _per_unit(tl.load(p_z), t_ptr + o_p, None, p_g, b_acc, PP, units, R * R, PRECISION)
    if HAS_BIAS:
        for o in range(0, units, 16):
            o_o = o + tl.arange(0, 16)
            b_t = tl.load(t_ptr + o_p[:, None] + (tl.minimum(o_o, units - 1) * PP)[None, :])
            b_h = tl.load(cross_ptr + (o_o * R)[:, None] + o_r[None, :], mask=(o_o < units)[:, None], other=0)
            b_acc = dot(b_t, b_h, b_acc, PRECISION)
    b_acc = tl.where((o_all < P)[:, None], b_acc, 0)
    tl.store(
        e_ptr + o_all[:, None] * s_e + o_r[None, :],
        narrow(b_acc, e_ptr.dtype.element_ty),
        (o_all < PP)[:, None],
    )


@triton.jit
def _class_pixels(i_m, o_i, N, class_h, class_w, BM: tl.constexpr):
    """Image, row and column, within their class, of the input pixels of tile ``i_m``, and which exist."""
    first = tl.cast(i_m, tl.int64) * BM
    o_x = tl.minimum(first + o_i, N * class_h * class_w - 1)
    image = first // (class_h * class_w)
    rest = (o_x - image * (class_h * class_w)).to(tl.int32)
    o_n, rest = image + rest // (class_h * class_w), rest % (class_h * class_w)
    return o_n, rest // class_w, rest % class_w, first + o_i < N * class_h * class_w


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW", "taps", "units"])
def fold(
    a_ptr,  # [n, R, K]
    rows_ptr,  # [E, K]: rows of B, of b, or both
    z_ptr,  # [PP, R]
    gs_ptr,  # [n, PP]
    e_ptr,  # [PP, s_e]: dz, gs, or both
    dx_ptr,  # out [N, H, W, C]
    N: tl.int64,
    H: tl.int32,
    W: tl.int32,
    OH: tl.int32,
    OW: tl.int32,
    PP: tl.int64,
    units: tl.int32,  # n, kh kw and E, as bounds of loops
    taps: tl.int32,
    columns_e: tl.int32,
    s_e: tl.int32,
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
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """dx for a tile of input pixels and channels: the transposed convolution of [dz | gs] with [B; b] and,
    with DIRECT, of gs (x) z with A.

    A gather over taps, so no atomics. Input pixels are taken by their remainder modulo the stride: pixels of
    one class see the same taps.
    """
    columns: tl.constexpr = (CP + BC - 1) // BC
    i_m, i_c = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_h, i_w = tl.program_id(1), tl.program_id(2)
    class_h, class_w = (H + SH - 1) // SH, (W + SW - 1) // SW
    o_n, o_a, o_b, m_x = _class_pixels(i_m, tl.arange(0, BM), N, class_h, class_w, BM)
    m_x = m_x & (o_a * SH + i_h < H) & (o_b * SW + i_w < W)
    # the output pixel on the same spot; a tap adds a constant. Relative to the tile's first, so that a row
    # costs 32 bits
    n_first, a_first, b_first, exists = _class_pixels(i_m, 0, N, class_h, class_w, BM)
    first_p = tl.minimum((n_first * OH + a_first) * OW + b_first, N * OH * OW - 1)
    o_rel = ((o_n * OH + o_a) * OW + o_b - first_p).to(tl.int32)
    o_c = i_c * BC + tl.arange(0, BC)
    o_known = o_c % CP  # past the last channel: any, not stored
    o_r, o_e = tl.arange(0, BR), tl.arange(0, BE)
    b_acc = tl.zeros((BM, BC), tl.float32)
    for tap in range(taps):
        t_h, t_w = i_h + TOP - tap // KW * DH, i_w + LEFT - tap % KW * DW
        # the tap reaches this class of pixels, or none of it
        if (t_h % SH == 0) & (t_w % SW == 0):
            t_h, t_w = t_h // SH, t_w // SW
            m_p = m_x & (o_a + t_h >= 0) & (o_a + t_h < OH) & (o_b + t_w >= 0) & (o_b + t_w < OW)
            o_p = tl.where(m_p, o_rel + t_h * OW + t_w, 0)
            o_k = tap * CP + o_known
            if DIRECT:
                for r in range(0, R, BR):
                    b_z = tl.load(
                        z_ptr + first_p * R + o_p[:, None] * R + (r + o_r)[None, :],
                        mask=m_p[:, None],
                        other=0,
                    )
                    p_a = a_ptr + ((r + o_r) * K)[:, None] + o_k[None, :]
                    b_acc = _per_unit(
                        b_z, gs_ptr + first_p + o_p, m_p, p_a, b_acc, PP, units, R * K, PRECISION
                    )
            for e in range(0, columns_e, BE):
                b_e = tl.load(
                    e_ptr + first_p * s_e + o_p[:, None] * s_e + (e + o_e)[None, :],
                    mask=m_p[:, None],
                    other=0,
                )
                b_rows = tl.load(rows_ptr + ((e + o_e) * K)[:, None] + o_k[None, :])
                b_acc = dot(b_e, b_rows, b_acc, PRECISION)
    # found anew, not carried through the loop in the layout of the store: 64 registers (a range that looks
    # different keeps it so)
    o_n, o_a, o_b, m_x = _class_pixels(i_m, tl.arange(BM, 2 * BM) - BM, N, class_h, class_w, BM)
    o_h, o_w = o_a * SH + i_h, o_b * SW + i_w
    m_x = m_x & (o_h < H) & (o_w < W)
    p_dx = dx_ptr + (((o_n * H + o_h) * W + o_w) * C)[:, None] + o_c[None, :]
    tl.store(p_dx, narrow(b_acc, dx_ptr.dtype.element_ty), m_x[:, None] & (o_c < C)[None, :])
