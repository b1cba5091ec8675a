"""What a forward pass needs before its products, in one launch: norms of the units, packed parameters, the
padded image, and z = B x with <b_o, u> and |u|^2.

Every program does one of these jobs, which do not depend on each other. A launch costs the host and the
device a few microseconds whatever it does, and while some jobs wait for memory or (the norm) for their own
previous step, the others can use the device.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from coda_kernels._norm_factor import lengths, norm_factor
from coda_kernels._projection import pad_image, project
from coda_kernels.compile import launch
from coda_kernels.config import ANY_SIZE, PIXELS, KernelSpec, depth_limits, power_of_two
from coda_kernels.layer import Layer, cdiv, strides, whole_blocks

PACK_ROWS = tl.constexpr(16)  # rows of packed parameters per program; A, B and b are whole blocks of 16 rows


@triton.jit
def _pack(
    i, reduce_ptr, weight_ptr, bias_ptr, packed_ptr, units, rank, C: tl.constexpr, CP: tl.constexpr,
    TAPS: tl.constexpr, LAST: tl.constexpr, NR, R: tl.constexpr, K, BK: tl.constexpr,
):  # fmt: skip
    """Write 16 rows of [A; B; b], [NR + R + n', K], with windows as (kh, kw, CP) and zeros as padding; A has
    NR = n' R rows.
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


@triton.jit(do_not_specialize=[
    "paddings", "packs", "norms", "H", "W", "top", "left", "total", "P", "PP", "rank", "units", "OH", "OW",
    "HP", "WP", "SH", "SW",
])  # fmt: skip
def prepare(
    x_ptr,  # [N, C, H, W]: the image that is projected to z, beta and length
    u_ptr,  # [N, C, H, W]: the image that is padded
    reduce_ptr,  # [rank, C, kh, kw]
    weight_ptr,  # [n, rank, C, kh, kw]
    bias_ptr,  # [n, C, kh, kw]
    packed_ptr,  # out [n' R + R + n', K]: A, B and b with windows as (kh, kw, CP), zeros as padding
    # out [n', R, R]: L_o^T over ``size``, the length of the longest row of A_o, which no entry exceeds, so
    # that it fits in any dtype
    factor_ptr,
    shift_ptr,  # out [n', R], float32: over ``size`` too
    rest_ptr,  # out [n'], float32
    size_ptr,  # out [n'], float32: that length, but at least 1e-12 and 2^-22 |b_o|
    scale_ptr,  # out [n], float32: the backward pass multiplies t and divides Gram matrices by it
    padded_ptr,  # out [N, HP, WP, CP]
    # out [PP, R], PP = P rounded up to whole blocks, as for all data that are read by blocks of pixels
    z_ptr,
    beta_ptr,  # out [PP, n'], float32
    length_ptr,  # out [PP], float32
    norms: tl.int32,  # number of programs for each job, in this order; the others project
    packs: tl.int32,
    paddings: tl.int32,
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
    total: tl.int64,  # entries of the padded image
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
    # K as a loop bound, known only at run time, so that the loop is pipelined and not unrolled
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
    FACTOR: tl.constexpr,  # compute the norm factor, for the contracted form
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute the norms, packed parameters, padded image, z, <b_o, u> and |u|^2 of a forward pass. The
    longest jobs begin first.
    """
    i = tl.program_id(0)
    if i < norms:
        if FACTOR:
            norm_factor(
                i, weight_ptr, bias_ptr, factor_ptr, shift_ptr, rest_ptr, size_ptr, scale_ptr, rank,
                C * KH * KW, R, HAS_BIAS, WIDE, 32 if not WIDE else 16,
            )  # fmt: skip
        else:
            lengths(i, weight_ptr, bias_ptr, scale_ptr, rank, C * KH * KW, R, HAS_BIAS)
    elif i < norms + packs:
        _pack(
            i - norms, reduce_ptr, weight_ptr, bias_ptr, packed_ptr, units, rank, C, CP, KH * KW, LAST,
            units_padded * R, R, depth, BK,
        )  # fmt: skip
    elif i < norms + packs + paddings:
        pad_image(
            i - norms - packs, u_ptr, padded_ptr, total, u_image, u_channel, u_row, u_column, H, W, HP, WP,
            top, left, C, CP,
        )  # fmt: skip
    else:
        project(
            i - norms - packs - paddings, x_ptr, reduce_ptr, bias_ptr, z_ptr, beta_ptr, length_ptr, z_ptr, 0,
            x_image, x_channel, x_row, x_column, H, W, top, left, P, PP, OH, OW, HP, WP, SH, SW, rank, units,
            units_padded, depth, C, CP, KH, KW, DH, DW, LAST, R if Z else 0, BETA, LENGTH, PRECISION, BM, BN,
            BK,
        )  # fmt: skip


class Prepared(NamedTuple):
    """What ``prepare`` makes, None for what was not requested. Pixels are rounded up to whole blocks, PP,
    here and in all that the backward pass makes, so that loops over them need no masks.
    """

    z: torch.Tensor | None = None  # [PP, R]
    beta: torch.Tensor | None = None  # <b_o, x_p>, [PP, n']
    length: torch.Tensor | None = None  # |x_p|^2, [PP]
    factor: torch.Tensor | None = None  # L_o^T over the size, [n', R, R]: see ``_norm_factor``
    shift: torch.Tensor | None = None  # [n', R]
    rest: torch.Tensor | None = None  # [n']
    size: torch.Tensor | None = None  # [n']


def run(
    layer: Layer,
    *,
    x: torch.Tensor,
    u: torch.Tensor,
    padded: torch.Tensor,
    paddings: int,
    reduced: bool = False,
    lengths: bool = False,
    parameters: bool = False,
) -> Prepared:
    """With ``reduced``, z; with ``lengths``, <b_o, x_p> and |x_p|^2; with ``parameters``, packed parameters,
    and the norm factor for the contracted form. ``paddings`` programs fill ``padded`` from u.
    """
    s, pixels, wide = layer.shape, layer.pixels(x), layer.shape.bits == 32
    reduce, weight, bias = layer.parameters
    whole, ranks = whole_blocks(pixels), s.R if reduced else 0
    units = layer.bias_rows if lengths else 0
    new = functools.partial(torch.empty, dtype=torch.float32, device=layer.torch_device)
    z = x.new_empty(whole, ranks) if reduced else None
    made = Prepared(z, *((new(whole, units), new(whole)) if lengths else (None, None)))
    factored = parameters and not s.generated
    if factored:
        # units that only pad to whole blocks are zero
        per_unit = new if s.units == s.units_padded else functools.partial(torch.zeros, **new.keywords)
        made = made._replace(
            factor=per_unit(s.units_padded, s.R, s.R, dtype=torch.float32 if wide else torch.float16),
            shift=per_unit(s.units_padded, s.R),
            rest=per_unit(s.units_padded),
            size=per_unit(s.units_padded),
        )
    packed_rows = s.units_padded * s.R + s.R + layer.bias_rows
    norms, packs = (s.units, packed_rows // PACK_ROWS.value) if parameters else (0, 0)
    columns = max(16, ranks + units) if reduced or lengths else 0

    def with_tile(tile):
        projects = cdiv(whole, tile["BM"]) * cdiv(columns, tile["BN"])
        launch(
            prepare,
            (norms + packs + paddings + projects,),
            x_ptr=x,
            u_ptr=u,
            reduce_ptr=reduce,
            weight_ptr=weight,
            bias_ptr=weight if bias is None else bias,
            packed_ptr=layer.prepared,
            factor_ptr=layer.or_float(made.factor),
            shift_ptr=layer.or_float(made.shift),
            rest_ptr=layer.or_float(made.rest),
            size_ptr=layer.or_float(made.size),
            scale_ptr=layer.scale,
            padded_ptr=padded,
            z_ptr=x if made.z is None else made.z,
            beta_ptr=layer.or_float(made.beta),
            length_ptr=layer.or_float(made.length),
            norms=norms,
            packs=packs,
            paddings=paddings,
            **strides("x", x),
            **strides("u", u),
            **layer.image_sizes(u),
            total=padded.numel(),
            P=pixels,
            PP=whole,
            **layer.sizes(),
            rank=layer.rank,
            units=s.units,
            units_padded=s.units_padded,
            depth=s.K,
            C=s.channels,
            **layer.window(),
            LAST=layer.last,
            R=s.R,
            Z=reduced,
            BETA=units > 0,
            LENGTH=lengths,
            HAS_BIAS=s.bias,
            FACTOR=factored,
            WIDE=wide,
            PRECISION=layer.precision,
            **tile.options,
        )

    layer.run(SPEC, with_tile)
    return made


def projection_spec(name, sizes, begin, columns, most):
    """The spec of a kernel whose tiles are those of ``project``: ``columns`` and ``most`` give, for a shape,
    the number of columns and the largest BN.
    """

    def blocks(s, pixels, size):
        depth = s.block_k if s.bits == 16 else min(32, s.block_k)
        return dict(BM=pixels, BN=min(size, max(16, power_of_two(columns(s)))), BK=depth)

    return KernelSpec(
        name=name,
        sizes=sizes,  # pixels, largest BN
        blocks=blocks,
        limits=lambda s: dict(BM=PIXELS, BN=(16, most(s), ANY_SIZE), BK=depth_limits(s)),
        shared_bytes=lambda s, b, stages: stages * (b["BM"] + b["BN"]) * b["BK"] * s.bits // 8,
        accumulators=lambda s, b: b["BM"] * b["BN"],
        begin=begin,
    )


SPEC = projection_spec(
    "prepare",
    sizes=((128, 128, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (32, 16, 4, 1)),
    begin={"float32": (64, 64, 4, 2), 80: (128, 64, 8, 2)},
    columns=lambda s: s.R + (s.units_padded if s.bias else 0),
    most=lambda s: power_of_two(s.R + s.units_padded),
)
