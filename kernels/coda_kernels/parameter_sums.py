"""Gradients of the parameters, first part: sums over all pixels of outer products (row of the pixel) (x) (its
window). Pixels are split into parts, each summed in a fixed order; ``finish`` adds the parts up.

    dA_o = sum_p gs_o z u^T + (sum_p t_o z z^T) A_o + (sum_p t_o z) b_o^T
           rows (o, k) are made in registers: the Khatri-Rao product gs (x) z
    db_o = sum_p gs_o u^T + (sum_p t_o z)^T A_o + (sum_p t_o) b_o^T            rows are read from memory
    dB   = sum_p dz x^T              likewise: both are columns of [dz | gs]
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from coda_kernels import config
from coda_kernels._tiles import dot, times, widen, window_offsets
from coda_kernels.compile import launch
from coda_kernels.config import ANY_SIZE, KernelSpec, power_of_two, rank_limits, unit_limits
from coda_kernels.layer import Layer, cdiv


@triton.jit
def _outer_sum(
    i, first, count, image_ptr, starts_ptr, rows_ptr, scale_ptr, out_ptr, totals_ptr, PP, s_rows, rows,
    units, WP, width, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, R: tl.constexpr, SCALED: tl.constexpr, PIXELS_FIRST: tl.constexpr,
    WINDOWS: tl.constexpr, PRECISION: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """``sum_p row_p (x) image_p`` over ``count`` pixels from ``first`` on: tile ``i``, of BO BR rows and BN
    of ``width`` columns.

    With SCALED, row (o, k) is ``scale_o z_k``, for BO units and BR of their R ranks; else BO = 1, with BR
    rows, whose own sums are stored too unless PIXELS_FIRST (pixels are the first dimension of rows). With
    WINDOWS, image_p is the window that begins at starts_p, else R numbers. The loop runs over pixels and must
    not compute their windows each time, hence the table of starts.
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
            b_start = tl.multiple_of(tl.load(p_starts), 8)  # rows of a padded image are whole 16-byte words
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
        # the operand made in registers comes second: as the first one, the tensor cores would read it from
        # registers, which ptxas serialises
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
    if not SCALED and not PIXELS_FIRST:  # in whole blocks of 16, so that all entries are written
        tl.store(totals_ptr + o_r, b_totals, mask=o_r < tl.where(i_n == 0, (rows + 15) // 16 * 16, 0))


@triton.jit(do_not_specialize=["PP", "chunk", "weights", "moments", "directs", "WP", "rows", "units"])
def parameter_sums(
    u_ptr,  # padded image [N, HP, WP, CP]
    starts_ptr,  # [PP]: the offset in u at which a pixel's window starts
    z_ptr,  # [PP, R]
    gs_ptr,  # [n, PP]
    t_ptr,  # [n, PP]
    # [PP, >= rows], stride s_e: columns of dz, gs or both, as rows of the sum; zeros past the last pixel, as
    # in all rows here
    e_ptr,
    weight_ptr,  # out [parts, n, R, K], float32: sum_p gs z u^T
    moments_ptr,  # out [parts, n, R, R], float32: sum_p t z z^T
    direct_ptr,  # out [parts, rows, K], float32: sum_p e u^T
    first_ptr,  # out [parts, n, R], float32: sum_p t z
    zeroth_ptr,  # out [parts, n], float32: sum_p t
    s_part: tl.int64,  # stride between parts of any of these
    weights: tl.int32,  # number of programs for each job, in this order; the others sum t z and t
    moments: tl.int32,
    directs: tl.int32,
    PP: tl.int64,  # pixels, rounded up to whole blocks
    chunk: tl.int32,  # pixels per part, whole blocks
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
    """Compute all sums over one part of the pixels."""
    i, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * chunk
    count = tl.minimum(PP - first, chunk).to(tl.int32)
    shift = part * s_part
    narrowest: tl.constexpr = BN if BN < R else R
    narrower: tl.constexpr = narrowest if narrowest < 64 else 64  # columns of sums that are as wide as z
    lower: tl.constexpr = 64 if BR * BO > 64 else BR * BO  # rows of sums without SCALED
    if i < weights:
        _outer_sum(
            i, first, count, u_ptr, starts_ptr, z_ptr, gs_ptr, weight_ptr + shift, zeroth_ptr, PP, R, 0,
            units, WP, depth, CP, KH, KW, DH, DW, R, True, True, True, PRECISION, BO, BR, BN, BP,
        )  # fmt: skip
    elif i < weights + moments:
        _outer_sum(
            i - weights, first, count, z_ptr, starts_ptr, z_ptr, t_ptr, moments_ptr + shift, zeroth_ptr, PP,
            R, 0, units, WP, R, CP, KH, KW, DH, DW, R, True, True, False, PRECISION, BO, BR, narrower, BP,
        )  # fmt: skip
    elif i < weights + moments + directs:
        _outer_sum(
            i - weights - moments, first, count, u_ptr, starts_ptr, e_ptr, e_ptr, direct_ptr + shift,
            zeroth_ptr, PP, s_e, rows, units, WP, depth, CP, KH, KW, DH, DW, R, False, True, True, PRECISION,
            1, lower, BN if BN < 128 else 128, BP,
        )  # fmt: skip
    else:
        _outer_sum(
            i - weights - moments - directs, first, count, z_ptr, starts_ptr, t_ptr, t_ptr,
            first_ptr + shift, zeroth_ptr + shift, PP, PP, units, units, WP, R, CP, KH, KW, DH, DW, R, False,
            False, False, PRECISION, 1, lower, narrower, BP,
        )  # fmt: skip


class Sums(NamedTuple):
    """Sums over the pixels in parts, float32, as views of one buffer; [0] for those not requested."""

    weight: torch.Tensor  # of gs z u^T, [parts, n, R, K]
    moments: torch.Tensor  # of t z z^T, [parts, n, R, R]
    direct: torch.Tensor  # of e u^T, [parts, E, K]
    first: torch.Tensor  # of t z, [parts, n, R]
    zeroth: torch.Tensor  # of t, [parts, n]


def run(
    layer: Layer,
    *,
    padded: torch.Tensor,
    starts: torch.Tensor,
    z: torch.Tensor,
    gs: torch.Tensor | None,
    t: torch.Tensor | None,
    e: torch.Tensor,
    weight: bool = True,
    totals: bool = True,
) -> Sums:
    """The sums over all pixels, in parts. ``e`` is some columns of a tensor, [PP, E]. ``weight`` requests the
    sums of gs z u^T and t z z^T, ``totals`` those of t z and t.
    """
    s, pixels, rows = layer.shape, len(starts), e.shape[1]
    shapes = Sums(
        weight=(s.units, s.R, s.K) if weight else (0,),
        moments=(s.units, s.R, s.R) if weight else (0,),
        direct=(rows, s.K),
        first=(s.units, s.R) if totals else (0,),
        zeroth=(s.units,) if totals else (0,),
    )
    lengths = [cdiv(math.prod(shape), 16) * 16 for shape in shapes]

    def with_tile(tile):
        columns, groups = cdiv(s.K, tile["BN"]), cdiv(s.units, tile["BO"])
        lower = min(64, tile["BO"] * tile["BR"])
        thin = cdiv(s.R, min(tile["BN"], s.R, 64))
        weights = groups * (s.R // tile["BR"]) * columns if weight else 0
        moments = groups * (s.R // tile["BR"]) * thin if weight else 0
        directs = cdiv(rows, lower) * cdiv(s.K, min(tile["BN"], 128))
        tiles = weights + moments + directs + (cdiv(s.units, lower) * thin if totals else 0)
        # the number of pixels in a part is int32
        parts = max(config.splits(tiles, pixels, tile["BP"], layer.device), cdiv(pixels, 1 << 30))
        chunk = cdiv(cdiv(pixels, parts), tile["BP"]) * tile["BP"]
        parts = cdiv(pixels, chunk)
        partial = torch.empty(parts, sum(lengths), device=layer.torch_device)
        sums = Sums(*(part if part.numel() else partial for part in partial.split(lengths, 1)))
        launch(
            parameter_sums,
            (tiles, parts),
            u_ptr=padded,
            starts_ptr=starts,
            z_ptr=z,
            gs_ptr=layer.or_dummy(gs),
            t_ptr=layer.or_dummy(t),
            e_ptr=e,
            weight_ptr=sums.weight,
            moments_ptr=sums.moments,
            direct_ptr=sums.direct,
            first_ptr=sums.first,
            zeroth_ptr=sums.zeroth,
            s_part=partial.stride(0),
            weights=weights,
            moments=moments,
            directs=directs,
            PP=pixels,
            chunk=chunk,
            s_e=e.stride(0),
            rows=rows,
            units=s.units,
            WP=layer.padded_size[1],
            depth=s.K,
            **layer.window(),
            R=s.R,
            PRECISION=layer.precision,
            **tile.options,
        )
        return partial

    parts = layer.run(SPEC, with_tile).split(lengths, 1)
    return Sums(
        *(
            part[:, : math.prod(shape)].unflatten(1, shape) if shape[0] else part[0]
            for part, shape in zip(parts, shapes, strict=True)
        )
    )


def _columns(s):
    return max(16, power_of_two(s.K))


def _blocks(s, size, most, pixels):
    most = min(most, _columns(s))
    # columns past the window are wasted, but with fewer columns at a time the rows are made more often
    columns = min((n for n in (256, 128, 64, 32, 16) if n <= most), key=lambda n: cdiv(s.K, n) * (n + 64))
    ranks, rows = min(s.R, 64, size), size * (2 if columns < most else 1)
    units = max(1, min(power_of_two(s.units), 16, rows // ranks))
    return dict(BO=units, BR=ranks, BN=columns, BP=pixels)


SPEC = KernelSpec(
    name="parameter_sums",
    # rows BO BR, columns, pixels: 256 x 128 takes fewer registers, but Triton before 3.9 generates wgmma for
    # it that ptxas serialises
    sizes=(
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (256, 64, 64, 8, 2),
        (128, 64, 32, 4, 2),
        (64, 64, 32, 4, 2),
        (64, 32, 32, 4, 1),
        (16, 16, 16, 4, 1),
    ),
    blocks=_blocks,
    limits=lambda s: dict(
        BO=unit_limits(s), BR=rank_limits(s), BN=(16, _columns(s), ANY_SIZE), BP=(16, 64, 64)
    ),
    shared_bytes=lambda s, b, stages: stages * b["BP"] * (b["BN"] + b["BR"] + b["BO"]) * s.bits // 8,
    accumulators=lambda s, b: b["BO"] * b["BR"] * b["BN"],
    begin={
        "float32": (64, 32, 32, 4, 1),
        80: (256, 64, 64, 8, 2),
        100: (256, 64, 64, 8, 2),
        "amd": (128, 64, 32, 4, 2),
    },
)
