"""F(x, u) if r is small compared with d (r <= 64, d > 64): y_po = s(|w_po|^2) <w_po, u_p> with w_po = A_o^T
z_p + b_o, which is not materialised.

    <w, u> = sum_k z_k (A_ok . u) + b_o . u      |w|^2 = |L_o^T z + shift_o|^2 + rest_o
"""

import torch
import triton
import triton.language as tl

from coda_kernels._tiles import (
    dot,
    landed,
    narrow,
    pixel_tile,
    store_forward,
    widen,
    window_offsets,
    window_starts,
)
from coda_kernels.compile import launch
from coda_kernels.config import PIXELS, KernelSpec, depth_limits, power_of_two, rank_limits, unit_limits
from coda_kernels.layer import Layer, cdiv
from coda_kernels.prepare import Prepared


@triton.jit
def _inverse_power_of_two(b_x):
    """1 / 2^floor(log2 x) for x >= 0, a scale without rounding; from 2^-100 to 2^40, so that its square times
    a norm is finite.
    """
    b_x = tl.clamp(b_x, 2.0**-40, 2.0**100)
    return ((254 << 23) - (b_x.to(tl.int32, bitcast=True) & (255 << 23))).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "keep"])
def contracted(
    u_ptr,  # padded image [N, HP, WP, CP]
    # [n', R, K], n' = n rounded up to whole blocks, as for all data of units that are read by blocks
    a_ptr,
    z_ptr,  # [PP, R]
    beta_ptr,  # [PP, NB], float32, NB = n' or 0
    length_ptr,  # [PP]: |u_p|^2
    factor_ptr,  # [n', R, R]: L_o^T over ``scale``
    shift_ptr,  # [n', R], over ``scale`` too
    rest_ptr,  # [n']
    scale_ptr,  # [n']: ``size`` of ``prepare``, the length of the longest row of A_o
    y_ptr,  # out [P, n]
    dot_ptr,  # out [n, P]
    square_ptr,  # out [n, P]
    contraction_ptr,  # out [P, n R]
    P: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    units: tl.int32,
    keep: tl.int32,  # what is stored for the backward pass: 0 nothing, 1 |w|^2, 2 also <w, u>
    NB: tl.int32,  # n', or 0 without a bias
    # K and R as loop bounds, known only at run time, so that the loops are pipelined and not unrolled
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
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    KEEP_CONTRACTION: tl.constexpr,
    NORM_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Implicit GEMM [pixels, d] x [d, n R]; its tile is contracted with z in registers, which the norm then
    reuses.

    NORM_ONLY leaves the product out, because the adjoint needs only |w|^2.
    """
    blocks = (units + BO - 1) // BO
    i_m, i_n = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, o_all, o_p = pixel_tile(i_m, P, BM)
    m_p = o_all < P
    p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
    o_j, o_r = tl.arange(0, BO * R), tl.arange(0, R)
    i_j = tl.cast(i_n, tl.int64) * (BO * R)
    p_a = a_ptr + i_j * K + o_j * K
    b_acc = tl.zeros((BM, BO * R), tl.float32)
    for k in range(0, 0 if NORM_ONLY else depth, BK):
        o_k = k + tl.arange(0, BK)
        b_u = tl.load(p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :])
        b_a = tl.load(p_a[None, :] + o_k[:, None])
        b_acc = dot(b_u, b_a, b_acc, PRECISION)
    o_o = i_n * BO + tl.arange(0, BO)
    if KEEP_CONTRACTION:
        m_c = m_p[:, None] & (i_j + o_j < units * R)[None, :]
        p_c = contraction_ptr + o_p[:, None] * (units * R) + (i_j + o_j)[None, :]
        tl.store(p_c, narrow(b_acc, contraction_ptr.dtype.element_ty), m_c)
    # <w, u> is reduced before the norm begins, so that one accumulator is live at a time (the other order
    # spilled 592 bytes)
    b_z = tl.load(z_ptr + o_p[:, None] * R + o_r[None, :])
    b_wide = widen(b_z)
    b_dot = tl.sum(tl.reshape(b_acc, (BM, BO, R)) * b_wide[:, None, :], 2)
    if HAS_BIAS and not NORM_ONLY:
        b_dot += tl.load(beta_ptr + o_p[:, None] * NB + o_o[None, :])
    # |L^T z + shift|^2 + rest, with z over a power of two near its largest entry, and L over ``scale``: so
    # 16-bit z is exact in float16, and L loses less than z did
    b_inverse = _inverse_power_of_two(tl.max(tl.abs(b_wide), 1))
    o_b = tl.arange(0, BR)
    p_l = factor_ptr + i_j * R + (o_j * R)[None, :] + o_b[:, None]
    p_z = z_ptr + o_p[:, None] * R + o_b[None, :]
    # zeros without a bias; starting from a constant spills
    b_v = b_inverse[:, None] * tl.load(shift_ptr + i_j + o_j)[None, :]
    for k in range(0, ranks, BR):  # z again, in pieces: all of L at once took 40 registers
        b_l = tl.load(p_l + k)
        b_unit = widen(tl.load(p_z + k)) * b_inverse[:, None]
        b_v = landed(dot(narrow(b_unit, b_l.dtype), b_l, b_v, PRECISION))
    b_size = tl.load(scale_ptr + o_o)[None, :] / b_inverse[:, None]
    b_square = tl.sum(tl.reshape(b_v * b_v, (BM, BO, R)), 2) * (b_size * b_size)
    if HAS_BIAS:
        b_square += tl.load(rest_ptr + o_o)[None, :]
    store_forward(
        b_dot, b_square, length_ptr, y_ptr, dot_ptr, square_ptr, o_p, m_p, o_o, P, units, keep, depth, SCALE,
        EPS,
    )  # fmt: skip


def run(
    layer: Layer,
    *,
    padded: torch.Tensor,
    prepared: Prepared,
    output: torch.Tensor,
    dot: torch.Tensor | None,
    square: torch.Tensor | None,
    contraction: torch.Tensor | None,
    norm_only: bool = False,
) -> None:
    """Fill ``output`` [..., n] of P pixels and, if they are given, <w, u> (``dot``) and |w|^2 (``square``),
    [n, P] in float32, and ``contraction`` [P, n R].
    """
    s, pixels = layer.shape, output.shape[:-1].numel()

    def with_tile(tile):
        launch(
            contracted,
            (cdiv(pixels, tile["BM"]) * cdiv(s.units, tile["BO"]),),
            u_ptr=padded,
            a_ptr=layer.weight,
            z_ptr=prepared.z,
            beta_ptr=prepared.beta,
            length_ptr=prepared.length,
            factor_ptr=prepared.factor,
            shift_ptr=prepared.shift,
            rest_ptr=prepared.rest,
            scale_ptr=prepared.size,
            y_ptr=output,
            dot_ptr=layer.or_float(dot),
            square_ptr=layer.or_float(square),
            contraction_ptr=layer.or_dummy(contraction),
            P=pixels,
            **layer.sizes(),
            units=s.units,
            keep=(square is not None) + (dot is not None),
            NB=layer.bias_rows,
            depth=s.K,
            ranks=s.R,
            **layer.window(),
            K=s.K,
            R=s.R,
            HAS_BIAS=s.bias,
            SCALE=layer.norm.scale,
            EPS=layer.eps,
            KEEP_CONTRACTION=contraction is not None,
            NORM_ONLY=norm_only,
            PRECISION=layer.precision,
            **tile.options,
        )

    layer.run(SPEC if contraction is None else SPEC_KEPT, with_tile)


def _blocks(s, pixels, columns):
    depth = s.block_k if s.bits == 16 else min(32, s.block_k)
    units = max(1, min(power_of_two(s.units), columns // s.R))
    return dict(BM=pixels, BO=units, BK=depth, BR=min(s.R, 32))


def _shared_bytes(s, b, stages):
    columns = b["BO"] * s.R
    return stages * max((b["BM"] + columns) * b["BK"], columns * b["BR"]) * s.bits // 8


def _spec(name, sizes, begin):
    return KernelSpec(
        name=name,
        sizes=sizes,
        blocks=_blocks,
        limits=lambda s: dict(BM=PIXELS, BO=unit_limits(s), BK=depth_limits(s), BR=rank_limits(s)),
        shared_bytes=_shared_bytes,
        accumulators=lambda s, b: b["BM"] * b["BO"] * s.R,
        begin=begin,
    )


SMALLER = ((64, 128, 4, 2), (64, 64, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))  # pixels, columns BO R
LARGE = (128, 128, 8, 3)
SPEC = _spec(
    "contracted",
    ((128, 256, 8, 3), LARGE, *SMALLER),
    {"float32": (64, 128, 4, 2), 80: LARGE, 100: LARGE, "amd": LARGE},
)
# for keeping the contraction, whose stores need registers
SPEC_KEPT = _spec("contracted_kept", (LARGE, *SMALLER), {"float32": (64, 64, 4, 2)})
