"""What a pass needs before its products, in one launch: every program takes one of several jobs that do not
wait for each other.

    prepare            norms of the units, packed parameters, the canvas, and z = B x with <b_o, u> and |u|^2
    prepare_backward   z again and where windows start, Gram matrices, the factors gs and t, the canvas

A launch costs some microseconds of the host and of the device whatever it does, and jobs that wait for memory
or, as the norm does, for themselves leave room for the others.
"""

import triton
import triton.language as tl

from coda_kernels._tiles import dot, narrow, pixel_tile, scaled, widen, window_starts

PACK_ROWS = tl.constexpr(16)  # rows of packed parameters a program: sections of them are whole blocks of 16
CANVAS_BLOCK = tl.constexpr(2048)  # entries of the canvas a program
FACTOR_PIXELS = tl.constexpr(64)  # gradient factors: pixels a program, of 16 units each
GRAM_RANKS = tl.constexpr(64)  # at most, of a tile of a Gram matrix


@triton.jit
def _canvas(
    i,
    image_ptr,
    canvas_ptr,
    total,
    s_image,
    s_channel,
    s_row,
    s_column,
    H,
    W,
    HP,
    WP,
    top,
    left,
    C: tl.constexpr,
    CP: tl.constexpr,
):
    """The zero-padded, channels-last copy [N, HP, WP, CP] of an image [N, C, H, W] of any strides;
    ``total`` entries.
    """
    first = tl.cast(i, tl.int64) * CANVAS_BLOCK
    o = tl.arange(0, CANVAS_BLOCK)
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
    tl.store(canvas_ptr + first + o, b_x, mask=first + o < total)


@triton.jit
def _pack(
    i,
    reduce_ptr,
    weight_ptr,
    bias_ptr,
    packed_ptr,
    units,
    rank,
    C: tl.constexpr,
    CP: tl.constexpr,
    TAPS: tl.constexpr,
    LAST: tl.constexpr,
    NR,
    R: tl.constexpr,
    K,
    BK: tl.constexpr,
):
    """16 rows of [A; B; b], [NR + R + n', K] with patches as (kh, kw, CP), zeros where padded; A is [n',
    R] rows.
    """
    o_g, o_k = i * PACK_ROWS + tl.arange(0, PACK_ROWS), tl.arange(0, BK)
    first = i * PACK_ROWS
    if first < NR:
        p_source = weight_ptr
        o_row, m_row = (o_g // R) * rank + o_g % R, (o_g // R < units) & (o_g % R < rank)
    elif first < NR + R:
        p_source = reduce_ptr
        o_row, m_row = o_g - NR, o_g - NR < rank
    else:
        p_source = bias_ptr
        o_row, m_row = o_g - NR - R, o_g - NR - R < units
    p_rows = p_source + tl.where(m_row, o_row.to(tl.int64) * (C * TAPS), 0)[:, None]
    p_packed = packed_ptr + o_g.to(tl.int64)[:, None] * K
    for k in range(0, K, BK):
        tap, o_c = (k + o_k) // CP, (k + o_k) % CP
        m_k = (o_c < C) & (tap < TAPS)
        o_d = tap * C + o_c if LAST else o_c * TAPS + tap
        b_rows = tl.load(p_rows + o_d[None, :], mask=m_row[:, None] & m_k[None, :], other=0)
        tl.store(p_packed + (k + o_k)[None, :], b_rows, mask=(k + o_k < K)[None, :])


@triton.jit
def _unit_scale(longest, other):
    """A power of two, at least the largest entry of A_o A_o^T and of A_o b_o: products of lengths, by
    Cauchy-Schwarz. 2^-100 to 2^100.
    """
    product = tl.sqrt(longest) * tl.sqrt(tl.maximum(longest, other))
    bits = tl.minimum(tl.maximum(product, 2.0**-100), 2.0**100).to(tl.int32, bitcast=True)
    bits = (bits + ((1 << 23) - 1)) & (255 << 23)  # up to the next power of two
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _lengths(i_o, weight_ptr, bias_ptr, scale_ptr, rank, D, ranks, HAS_BIAS: tl.constexpr):
    """`_unit_scale` of a unit that needs no norm factor."""
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
def _norm_factor(
    i_o,
    weight_ptr,
    bias_ptr,
    factor_ptr,
    shift_ptr,
    rest_ptr,
    size_ptr,
    scale_ptr,
    rank,
    D,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    BK: tl.constexpr,
):
    """``|A_o z + b_o|^2 = |L_o^T z + shift_o|^2 + rest_o``, from the Cholesky factor of ``[A_o b_o]^T [A_o
    b_o]`` with b_o last.

    A sum of squares cannot be negative. 16-bit weights multiply exactly into float32 sums; float32 weights
    (WIDE) take float64, which keeps float32's accuracy where w nearly vanishes. One program a unit, R <= 64.
    What it costs is the latency of R steps one after the other, so that the matrix is taken in quarters, one
    of which is its transposed neighbour and three are gone after half of the steps.
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
    # rows of length 1, so that a pivot is compared with its own row, not with longer ones whose number in z
    # may be 0
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
    # that of a far longer b, too: `contracted` multiplies shift over size by up to 2^40 and squares it
    # NaN is in the factor, too
    size = tl.maximum(tl.sqrt(tl.maximum(longest, tl.max(rest, 0) * 2.0**-44)), 1e-12)
    scaling = 1 / size
    b_length1 *= scaling
    if H < R:
        b_length2 *= scaling
    least = R * (1e-14 if WIDE else 1e-7)  # pivots below are rounding: A_o has no more rows of its own
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


@triton.jit
def _project(
    i,
    x_ptr,
    reduce_ptr,
    bias_ptr,
    z_ptr,
    beta_ptr,
    length_ptr,
    starts_ptr,
    starts,
    s_image,
    s_channel,
    s_row,
    s_column,
    H,
    W,
    top,
    left,
    P,
    PP,
    OH,
    OW,
    HP,
    WP,
    SH,
    SW,
    rank,
    units,
    padded,
    depth,
    C: tl.constexpr,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    LAST: tl.constexpr,
    R: tl.constexpr,
    BETA: tl.constexpr,
    LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``[z | beta] = x_p [B; b]^T``, with LENGTH also ``|x_p|^2``; with ``starts``, where windows start. R =
    0, no BETA: not that part.

    It reads the image and the parameters as they are, so that it does not wait for their copies.
    """
    TAPS: tl.constexpr = KH * KW
    NB = padded if BETA else 0
    columns = tl.maximum((R + NB + BN - 1) // BN, 1)  # one where it is for the lengths alone
    i_m, i_n = i // columns, i % columns
    first, o_p, o_known = pixel_tile(i_m, P, BM)
    m_p = o_p < PP
    # one wide division serves the tile: pixels relative to its first image
    image = first // (OH * OW)
    rest = (o_known - image * (OH * OW)).to(tl.int32)
    o_n, rest = image + rest // (OH * OW), rest % (OH * OW)
    o_h, o_w = rest // OW * SH - top, rest % OW * SW - left
    o_image = o_n * s_image
    o_j = i_n * BN + tl.arange(0, BN)
    # columns before R are rows of B, those after it rows of b; what is padded is zero, and reads what exists
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
        o_y, o_x = tl.where(m_x, o_y, 0), tl.where(m_x, o_x, 0)  # masked or not, an address that exists
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
    # not "m_p & (i_n == 0)": Triton 3.9's interpreter refuses a mask made of a number
    m_once = o_p < tl.where(i_n == 0, PP, 0)
    if LENGTH:
        tl.store(length_ptr + o_p, b_length, m_once)
    if starts:
        tl.store(starts_ptr + o_p, window_starts(first, o_known, OH, OW, HP, WP, CP, SH, SW), m_once)


@triton.jit
def _gram(
    i,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    gram_ptr,
    cross_ptr,
    K,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of the Gram matrix of a unit, for the gradient ``A_o^T w = G_o z + A_o b_o``, over
    ``scale``; parameters packed.
    """
    BR: tl.constexpr = R if R < GRAM_RANKS else GRAM_RANKS
    tiles: tl.constexpr = R // BR
    i_o, i_t = i // (tiles * tiles), i % (tiles * tiles)
    i_i, i_j = i_t // tiles, i_t % tiles
    p_a = weight_ptr + tl.cast(i_o, tl.int64) * (R * K)
    o_i, o_j = i_i * BR + tl.arange(0, BR), i_j * BR + tl.arange(0, BR)
    b_gram = tl.zeros((BR, BR), tl.float32)
    b_cross = tl.zeros((BR,), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_i = tl.load(p_a + o_i[:, None] * K + o_k[None, :])
        b_j = tl.load(p_a + o_j[None, :] * K + o_k[:, None])
        b_gram = dot(b_i, b_j, b_gram, PRECISION)
        if HAS_BIAS:
            b_b = widen(tl.load(bias_ptr + i_o * K + o_k))
            b_cross += tl.sum(widen(b_i) * b_b[None, :], 1)
    inverse = 1 / tl.load(scale_ptr + i_o)
    b_gram, b_cross = b_gram * inverse, b_cross * inverse
    p_gram = gram_ptr + tl.cast(i_o, tl.int64) * (R * R)
    tl.store(p_gram + o_i[:, None] * R + o_j[None, :], narrow(b_gram, gram_ptr.dtype.element_ty))
    if HAS_BIAS:
        tl.store(
            cross_ptr + i_o * R + o_i,
            narrow(b_cross, cross_ptr.dtype.element_ty),
            mask=o_i >= tl.where(i_j == 0, 0, R),
        )


@triton.jit
def _saturated(b_x, dtype: tl.constexpr):
    """To ``dtype``; float16 stops at its largest number, where "l2" asks for 1 / eps of it at w = 0:
    infinity times 0 is NaN.
    """
    if dtype == tl.float16:
        b_x = tl.clamp(b_x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return narrow(b_x, dtype)


@triton.jit
def _grad_factors(
    i,
    grad_ptr,
    dot_ptr,
    square_ptr,
    scale_ptr,
    gs_ptr,
    t_ptr,
    e_ptr,
    full,
    P,
    PP,
    OH,
    OW,
    g_image,
    g_unit,
    g_row,
    g_column,
    s_e,
    first_e,
    units,
    padded,
    HAS_BIAS: tl.constexpr,
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
):
    """gs = g s(q) and, with ``full``, t = 2 g <w, u> s'(q); both 0 in the limit q = 0. Reads an upstream
    gradient of any strides.

    t goes with |w|^-2: times a power of two near |A_o|^2 it is of the size of the gradient, and fits float16.
    """
    BO: tl.constexpr = 16
    blocks = (units + BO - 1) // BO
    _, o_p, o_known = pixel_tile(i // blocks, P, FACTOR_PIXELS)
    o_o = i % blocks * BO + tl.arange(0, BO)
    m_o, m_g = (o_o < units)[None, :] & (o_p < PP)[:, None], (o_o < units)[None, :] & (o_p < P)[:, None]
    o_n, rest = o_known // (OH * OW), (o_known % (OH * OW)).to(tl.int32)
    o_grad = o_n * g_image + (rest // OW).to(tl.int64) * g_row + (rest % OW).to(tl.int64) * g_column
    b_grad = widen(
        tl.load(grad_ptr + o_grad[:, None] + (o_o.to(tl.int64) * g_unit)[None, :], mask=m_g, other=0)
    )
    o_kept, o_out = o_p[:, None] + (o_o * P)[None, :], o_p[:, None] + (o_o * PP)[None, :]
    # not 0, which may make infinity of 1 / eps, and NaN of the padding
    b_square = tl.load(square_ptr + o_kept, mask=m_g, other=1)
    b_length = tl.sqrt(b_square)
    b_gs = _saturated(b_grad * scaled(b_square, SQUASH, EPS), gs_ptr.dtype.element_ty)
    tl.store(gs_ptr + o_out, b_gs, m_o)
    if HAS_BIAS:  # columns past the last unit are written too, with zeros
        tl.store(
            e_ptr + o_p[:, None] * s_e + (first_e + o_o)[None, :],
            b_gs,
            (o_p < PP)[:, None] & (o_o < padded)[None, :],
        )
    if full:
        # of the size of |u|, also where q is flushed
        b_ratio = tl.load(dot_ptr + o_kept, mask=m_g, other=0) / tl.maximum(b_length, 1e-18)
        if SQUASH:
            b_t = tl.where(
                b_length == 0, 0, b_grad * b_ratio * ((1 - b_square) / (1 + b_square)) / (1 + b_square)
            )
        else:
            b_t = tl.where(b_length <= EPS, 0, -b_grad * b_ratio / tl.where(b_square == 0, 1, b_square))
        b_t *= tl.load(scale_ptr + tl.minimum(o_o, units - 1))[None, :]
        tl.store(t_ptr + o_out, _saturated(b_t, t_ptr.dtype.element_ty), m_o)


@triton.jit(
    do_not_specialize=[
        "canvases",
        "packs",
        "norms",
        "H",
        "W",
        "top",
        "left",
        "total",
        "P",
        "PP",
        "rank",
        "units",
        "OH",
        "OW",
        "HP",
        "WP",
        "SH",
        "SW",
    ]
)
def prepare(
    x_ptr,  # [N, C, H, W], what z is computed from, and beta and length where they are
    u_ptr,  # [N, C, H, W], what the canvas is a copy of
    reduce_ptr,  # [rank, C, kh, kw]
    weight_ptr,  # [n, rank, C, kh, kw]
    bias_ptr,  # [n, C, kh, kw]
    packed_ptr,  # out [n' R + R + n', K]: A, B and b with patches as (kh, kw, CP), zeros where padded
    # out [n', R, R]: L_o^T over the length of the longest row of A_o, which no entry exceeds: it fits any
    # dtype
    factor_ptr,
    shift_ptr,  # out [n', R], float32: over the same
    rest_ptr,  # out [n'], float32
    size_ptr,  # out [n'], float32: that length, at least 1e-12
    scale_ptr,  # out [n], float32: what the backward pass scales its factors and the Gram matrices with
    canvas_ptr,  # out [N, HP, WP, CP]
    # out [PP, R], PP = P rounded up to whole blocks, as for everything that is read by blocks of pixels
    z_ptr,
    beta_ptr,  # out [PP, n'], float32
    length_ptr,  # out [PP], float32
    norms: tl.int32,  # programs that do each job, in this order; the rest projects
    packs: tl.int32,
    canvases: tl.int32,
    x_image,
    x_channel,
    x_row,
    x_column,
    u_image,
    u_channel,
    u_row,
    u_column,
    H: tl.int32,
    W: tl.int32,
    top: tl.int32,
    left: tl.int32,
    total: tl.int64,  # entries of the canvas
    P: tl.int64,
    PP: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    rank: tl.int32,
    units: tl.int32,
    padded: tl.int32,  # n'
    # K, as the bound of a loop: known at run time only, so that it is pipelined and not unrolled
    depth: tl.int32,
    C: tl.constexpr,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    LAST: tl.constexpr,  # parameters are channels last, (kh, kw, C) within a row, else (C, kh, kw)
    R: tl.constexpr,
    Z: tl.constexpr,  # project with B
    BETA: tl.constexpr,  # project with b
    LENGTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FACTOR: tl.constexpr,  # the contracted form's
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The norms, packed parameters, canvas, z, <b_o, u> and |u|^2 of a forward pass. The longest jobs
    begin first.
    """
    i = tl.program_id(0)
    if i < norms:
        if FACTOR:
            _norm_factor(
                i,
                weight_ptr,
                bias_ptr,
                factor_ptr,
                shift_ptr,
                rest_ptr,
                size_ptr,
                scale_ptr,
                rank,
                C * KH * KW,
                R,
                HAS_BIAS,
                WIDE,
                32 if not WIDE else 16,
            )
        else:
            _lengths(i, weight_ptr, bias_ptr, scale_ptr, rank, C * KH * KW, R, HAS_BIAS)
    elif i < norms + packs:
        _pack(
            i - norms,
            reduce_ptr,
            weight_ptr,
            bias_ptr,
            packed_ptr,
            units,
            rank,
            C,
            CP,
            KH * KW,
            LAST,
            padded * R,
            R,
            depth,
            BK,
        )
    elif i < norms + packs + canvases:
        _canvas(
            i - norms - packs,
            u_ptr,
            canvas_ptr,
            total,
            u_image,
            u_channel,
            u_row,
            u_column,
            H,
            W,
            HP,
            WP,
            top,
            left,
            C,
            CP,
        )
    else:
        _project(
            i - norms - packs - canvases,
            x_ptr,
            reduce_ptr,
            bias_ptr,
            z_ptr,
            beta_ptr,
            length_ptr,
            z_ptr,
            0,
            x_image,
            x_channel,
            x_row,
            x_column,
            H,
            W,
            top,
            left,
            P,
            PP,
            OH,
            OW,
            HP,
            WP,
            SH,
            SW,
            rank,
            units,
            padded,
            depth,
            C,
            CP,
            KH,
            KW,
            DH,
            DW,
            LAST,
            R if Z else 0,
            BETA,
            LENGTH,
            PRECISION,
            BM,
            BN,
            BK,
        )


@triton.jit(
    do_not_specialize=[
        "projects",
        "grams",
        "canvases",
        "g_image",
        "g_unit",
        "g_row",
        "g_column",
        "full",
        "H",
        "W",
        "top",
        "left",
        "total",
        "P",
        "PP",
        "rank",
        "units",
        "OH",
        "OW",
        "HP",
        "WP",
        "SH",
        "SW",
    ]
)
def prepare_backward(
    x_ptr,  # [N, C, H, W], what z is computed from
    u_ptr,  # [N, C, H, W], what the canvas is a copy of
    reduce_ptr,  # [rank, C, kh, kw]
    weight_ptr,  # packed [n', R, K]
    bias_ptr,  # packed [n', K]
    scale_ptr,  # [n]: what t is multiplied by and the Gram matrix divided by
    grad_ptr,  # strides g_image, g_unit, g_row, g_column
    dot_ptr,  # [n, P], or unused without ``full``
    square_ptr,  # [n, P]
    gs_ptr,  # out [n, PP], with zeros past P
    t_ptr,  # out [n, PP], likewise
    e_ptr,  # out: column first_e + o of [PP, s_e] is gs_o too, with a bias
    gram_ptr,  # out [n, R, R]: A_o A_o^T
    cross_ptr,  # out [n, R]: A_o b_o
    canvas_ptr,  # out [N, HP, WP, CP]
    z_ptr,  # out [PP, R]
    starts_ptr,  # out [PP], int64
    projects: tl.int32,  # programs that do each job, in this order; the rest makes gradient factors
    grams: tl.int32,
    canvases: tl.int32,
    x_image,
    x_channel,
    x_row,
    x_column,
    u_image,
    u_channel,
    u_row,
    u_column,
    g_image: tl.int64,
    g_unit: tl.int64,
    g_row: tl.int64,
    g_column: tl.int64,
    H: tl.int32,
    W: tl.int32,
    top: tl.int32,
    left: tl.int32,
    total: tl.int64,
    P: tl.int64,
    PP: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    rank: tl.int32,
    units: tl.int32,
    padded: tl.int32,  # n'
    s_e: tl.int32,
    first_e: tl.int32,
    full: tl.int32,  # whether t and the starts are wanted
    depth: tl.int32,
    C: tl.constexpr,
    CP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    LAST: tl.constexpr,  # parameters are channels last, (kh, kw, C) within a row, else (C, kh, kw)
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUASH: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z, Gram matrices, canvas and gradient factors of a backward pass."""
    i = tl.program_id(0)
    if i < projects:
        _project(
            i,
            x_ptr,
            reduce_ptr,
            reduce_ptr,
            z_ptr,
            z_ptr,
            z_ptr,
            starts_ptr,
            full,
            x_image,
            x_channel,
            x_row,
            x_column,
            H,
            W,
            top,
            left,
            P,
            PP,
            OH,
            OW,
            HP,
            WP,
            SH,
            SW,
            rank,
            units,
            padded,
            depth,
            C,
            CP,
            KH,
            KW,
            DH,
            DW,
            LAST,
            R,
            False,
            False,
            PRECISION,
            BM,
            BN,
            BK,
        )
    elif i < projects + grams:
        _gram(
            i - projects,
            weight_ptr,
            bias_ptr,
            scale_ptr,
            gram_ptr,
            cross_ptr,
            depth,
            R,
            HAS_BIAS,
            PRECISION,
            BK,
        )
    elif i < projects + grams + canvases:
        _canvas(
            i - projects - grams,
            u_ptr,
            canvas_ptr,
            total,
            u_image,
            u_channel,
            u_row,
            u_column,
            H,
            W,
            HP,
            WP,
            top,
            left,
            C,
            CP,
        )
    else:
        _grad_factors(
            i - projects - grams - canvases,
            grad_ptr,
            dot_ptr,
            square_ptr,
            scale_ptr,
            gs_ptr,
            t_ptr,
            e_ptr,
            full,
            P,
            PP,
            OH,
            OW,
            g_image,
            g_unit,
            g_row,
            g_column,
            s_e,
            first_e,
            units,
            padded,
            HAS_BIAS,
            SQUASH,
            EPS,
        )
