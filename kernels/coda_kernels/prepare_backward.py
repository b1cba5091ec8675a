"""What a backward pass needs before its products, in one launch: z (recomputed), the starts of windows, Gram
matrices, the padded image, and the factors of the gradient.

    gs = g s(q),   t = 2 g <w, u> s'(q) = g (<w, u> / |w|) ds/d|w|         q = |w|^2

Every program does one of these jobs, as in ``prepare``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from coda_kernels._projection import pad_image, project
from coda_kernels._tiles import dot, narrow, pixel_tile, widen
from coda_kernels.compile import launch
from coda_kernels.layer import Layer, cdiv, strides, whole_blocks
from coda_kernels.prepare import projection_spec

FACTOR_PIXELS = tl.constexpr(64)  # gradient factors: pixels per program, for 16 units
GRAM_RANKS = tl.constexpr(64)  # the most ranks of a tile of a Gram matrix


@triton.jit
def _gram(
    i, weight_ptr, bias_ptr, scale_ptr, gram_ptr, cross_ptr, K, R: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of a unit's Gram matrix G_o = A_o A_o^T, over ``scale``, for ``A_o w = G_o z + A_o b_o`` in the
    gradient of z; from packed parameters.
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
    """To ``dtype``; float16 saturates at its largest number, because under "l2" a factor is 1 / eps at w = 0,
    and infinity times 0 would be NaN.
    """
    if dtype == tl.float16:
        b_x = tl.clamp(b_x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return narrow(b_x, dtype)


@triton.jit
def _grad_factors(
    i, grad_ptr, dot_ptr, square_ptr, scale_ptr, gs_ptr, t_ptr, e_ptr, full, P, PP, OH, OW, g_image, g_unit,
    g_row, g_column, s_e, first_e, units, units_padded, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr,
    SLOPE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """gs = g s(q) and, with ``full``, t = 2 g <w, u> s'(q); both are 0 in the limit q = 0. The upstream
    gradient may have any strides.

    t scales like |w|^-2: times a power of two near |A_o|^2 it is as large as the gradient, and fits float16.
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
    # not 0, for which 1 / eps may be infinite, and the padding NaN
    b_square = tl.load(square_ptr + o_kept, mask=m_g, other=1)
    b_length = tl.sqrt(b_square)
    b_gs = _saturated(b_grad * SCALE(b_square, EPS), gs_ptr.dtype.element_ty)
    tl.store(gs_ptr + o_out, b_gs, m_o)
    if HAS_BIAS:  # columns past the last unit are written as zeros
        tl.store(
            e_ptr + o_p[:, None] * s_e + (first_e + o_o)[None, :],
            b_gs,
            (o_p < PP)[:, None] & (o_o < units_padded)[None, :],
        )
    if full:
        # at most about |u|, even where q is flushed to 0
        b_ratio = tl.load(dot_ptr + o_kept, mask=m_g, other=0) / tl.maximum(b_length, 1e-18)
        b_t = SLOPE(b_grad * b_ratio, b_length, b_square, EPS)
        b_t *= tl.load(scale_ptr + tl.minimum(o_o, units - 1))[None, :]
        tl.store(t_ptr + o_out, _saturated(b_t, t_ptr.dtype.element_ty), m_o)


@triton.jit(do_not_specialize=[
    "projects", "grams", "paddings", "g_image", "g_unit", "g_row", "g_column", "full", "H", "W", "top",
    "left", "total", "P", "PP", "rank", "units", "OH", "OW", "HP", "WP", "SH", "SW",
])  # fmt: skip
def prepare_backward(
    x_ptr,  # [N, C, H, W]: the image from which z is computed
    u_ptr,  # [N, C, H, W]: the image that is padded
    reduce_ptr,  # [rank, C, kh, kw]
    weight_ptr,  # packed [n', R, K]
    bias_ptr,  # packed [n', K]
    scale_ptr,  # [n]: t is multiplied, and the Gram matrix and A_o b_o divided, by it
    grad_ptr,  # strides g_image, g_unit, g_row, g_column
    dot_ptr,  # [n, P], or unused without ``full``
    square_ptr,  # [n, P]
    gs_ptr,  # out [n, PP], with zeros past P
    t_ptr,  # out [n, PP], likewise
    e_ptr,  # out, with a bias: column first_e + o of [PP, s_e] is gs_o, too
    gram_ptr,  # out [n, R, R]: A_o A_o^T over ``scale``
    cross_ptr,  # out [n, R]: A_o b_o over ``scale``
    padded_ptr,  # out [N, HP, WP, CP]
    z_ptr,  # out [PP, R]
    starts_ptr,  # out [PP], int64
    projects: tl.int32,  # number of programs for each job, in this order; the others make gradient factors
    grams: tl.int32,
    paddings: tl.int32,
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
    units_padded: tl.int32,  # n'
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
    SCALE: tl.constexpr,
    SLOPE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute z, Gram matrices, padded image and gradient factors of a backward pass."""
    i = tl.program_id(0)
    if i < projects:
        project(
            i, x_ptr, reduce_ptr, reduce_ptr, z_ptr, z_ptr, z_ptr, starts_ptr, full, x_image, x_channel,
            x_row, x_column, H, W, top, left, P, PP, OH, OW, HP, WP, SH, SW, rank, units, units_padded,
            depth, C, CP, KH, KW, DH, DW, LAST, R, False, False, PRECISION, BM, BN, BK,
        )  # fmt: skip
    elif i < projects + grams:
        _gram(
            i - projects, weight_ptr, bias_ptr, scale_ptr, gram_ptr, cross_ptr, depth, R, HAS_BIAS,
            PRECISION, BK,
        )  # fmt: skip
    elif i < projects + grams + paddings:
        pad_image(
            i - projects - grams, u_ptr, padded_ptr, total, u_image, u_channel, u_row, u_column, H, W, HP,
            WP, top, left, C, CP,
        )  # fmt: skip
    else:
        _grad_factors(
            i - projects - grams - paddings, grad_ptr, dot_ptr, square_ptr, scale_ptr, gs_ptr, t_ptr, e_ptr,
            full, P, PP, OH, OW, g_image, g_unit, g_row, g_column, s_e, first_e, units, units_padded,
            HAS_BIAS, SCALE, SLOPE, EPS,
        )  # fmt: skip


class Factors(NamedTuple):
    """What ``prepare_backward`` makes, None for what was not requested."""

    padded: torch.Tensor  # the padded u
    z: torch.Tensor  # [PP, R]
    gs: torch.Tensor  # [n, PP]
    e: torch.Tensor  # [dz | gs], [PP, ranks + n']; ``grad_z`` fills dz; gs is there with a bias
    t: torch.Tensor | None  # times ``layer.scale``, [n, PP]
    starts: torch.Tensor | None  # of windows in the padded image, int64, [PP]
    gram: torch.Tensor | None  # A_o A_o^T over ``layer.scale``, [n, R, R]
    cross: torch.Tensor | None  # A_o b_o over ``layer.scale``, [n, R]


def run(
    layer: Layer,
    *,
    x: torch.Tensor,
    u: torch.Tensor,
    grad: torch.Tensor,
    dot: torch.Tensor | None,
    square: torch.Tensor,
    ranks: int = 0,
    full: bool = False,
) -> Factors:
    """The factors of a backward pass. ``ranks`` is R if dz will be needed, else 0. With ``full`` they include
    the padded image, the starts of its windows and t; otherwise ``padded`` is u itself.
    """
    s, pixels = layer.shape, square.shape[1]
    whole = whole_blocks(pixels)
    padded, paddings = layer.padded_image(u) if full else (u, 0)
    gs = x.new_empty(s.units, whole)
    made = Factors(
        padded=padded,
        z=x.new_empty(whole, s.R),
        gs=gs,
        e=x.new_empty(whole, ranks + layer.bias_rows),
        t=torch.empty_like(gs) if full else None,
        starts=x.new_empty(whole, dtype=torch.int64) if full else None,
        gram=x.new_empty(s.units, s.R, s.R) if ranks else None,
        cross=x.new_empty(s.units, s.R) if ranks else None,
    )
    no_starts = x.new_empty(0, dtype=torch.int64)
    grams = s.units * cdiv(s.R, GRAM_RANKS.value) ** 2 if ranks else 0
    factors = cdiv(whole, FACTOR_PIXELS.value) * (s.units_padded // 16)

    def with_tile(tile):
        projects = cdiv(whole, tile["BM"]) * cdiv(s.R, tile["BN"])
        launch(
            prepare_backward,
            (projects + grams + paddings + factors,),
            x_ptr=x,
            u_ptr=u,
            reduce_ptr=layer.parameters[0],
            weight_ptr=layer.weight,
            bias_ptr=layer.or_dummy(layer.bias),
            scale_ptr=layer.scale,
            grad_ptr=grad,
            dot_ptr=square if dot is None else dot,
            square_ptr=square,
            gs_ptr=made.gs,
            t_ptr=layer.or_dummy(made.t),
            e_ptr=made.e,
            gram_ptr=layer.or_dummy(made.gram),
            cross_ptr=layer.or_dummy(made.cross),
            padded_ptr=padded,
            z_ptr=made.z,
            starts_ptr=no_starts if made.starts is None else made.starts,
            projects=projects,
            grams=grams,
            paddings=paddings,
            **strides("x", x),
            **strides("u", u),
            **strides("g", grad, "unit"),
            **layer.image_sizes(u),
            total=padded.numel(),
            P=pixels,
            PP=whole,
            **layer.sizes(),
            rank=layer.rank,
            units=s.units,
            units_padded=s.units_padded,
            s_e=made.e.shape[1],
            first_e=ranks,
            full=int(full),
            depth=s.K,
            C=s.channels,
            **layer.window(),
            LAST=layer.last,
            R=s.R,
            HAS_BIAS=s.bias,
            SCALE=layer.norm.scale,
            SLOPE=layer.norm.slope,
            EPS=layer.eps,
            PRECISION=layer.precision,
            **tile.options,
        )

    layer.run(SPEC, with_tile)
    return made


SPEC = projection_spec(
    "prepare_backward",
    sizes=((64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (32, 16, 4, 1)),
    begin={"float32": (64, 64, 4, 2), 100: (128, 64, 8, 3)},
    columns=lambda s: s.R,
    most=lambda s: s.R,
)
