"""The gradient of z = B x.

    dz_p = sum_o gs_o A_o u_p + t_o A_o w_po         with gs and t of prepare_backward.py

The scaled operand (u gs or z t) is made in registers, from which the tensor cores read it.
"""

import torch
import triton
import triton.language as tl

from coda_kernels._tiles import dot, dot_per_unit, narrow, pixel_tile, widen, window_offsets, window_starts
from coda_kernels.compile import launch
from coda_kernels.config import PIXELS, KernelSpec, depth_limits, rank_limits
from coda_kernels.layer import Layer, cdiv
from coda_kernels.prepare_backward import Factors


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "units"])
def grad_z(
    u_ptr,  # padded image [N, HP, WP, CP]
    a_ptr,  # [n, R, K]
    z_ptr,  # [PP, R]
    gs_ptr,  # [n, PP]
    t_ptr,  # [n, PP]
    gram_ptr,  # [n, R, R]: G_o = A_o A_o^T, scaled down
    cross_ptr,  # [n, R]: A_o b_o, scaled down
    contraction_ptr,  # [P, n R]: A_o u, if the forward pass kept it
    e_ptr,  # out: the first R columns of [PP, s_e] are dz, with zeros past P
    P: tl.int64,
    PP: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    s_e: tl.int32,
    # n, K and R as loop bounds, known only at run time, so that the loops are pipelined and not unrolled
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
    """``dz = sum_o gs_o A_o u + t_o (G_o z + A_o b_o)``, BR ranks per program. t is scaled up by
    ``layer.scale``, G_o and A_o b_o are scaled down by it.
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
            b_acc = dot_per_unit(tl.load(p_u), gs_ptr + o_p, None, p_a, b_acc, PP, units, R * K, PRECISION)
    for k in range(0, ranks, BU):
        o_k = k + tl.arange(0, BU)
        p_z = z_ptr + o_p[:, None] * R + o_k[None, :]
        p_g = gram_ptr + (o_r * R)[None, :] + o_k[:, None]
        b_acc = dot_per_unit(tl.load(p_z), t_ptr + o_p, None, p_g, b_acc, PP, units, R * R, PRECISION)
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


def run(layer: Layer, *, factors: Factors, pixels: int, contraction: torch.Tensor | None) -> None:
    """Fill the first R columns of ``factors.e``. ``contraction``: [P, n R], if the forward pass kept it."""
    s, f = layer.shape, factors

    def with_tile(tile):
        launch(
            grad_z,
            (cdiv(len(f.z), tile["BM"]) * (s.R // tile["BR"]),),
            u_ptr=f.padded,
            a_ptr=layer.weight,
            z_ptr=f.z,
            gs_ptr=f.gs,
            t_ptr=f.t,
            gram_ptr=f.gram,
            cross_ptr=f.cross,
            contraction_ptr=layer.or_dummy(contraction),
            e_ptr=f.e,
            P=pixels,
            PP=len(f.z),
            **layer.sizes(),
            s_e=f.e.shape[1],
            units=s.units,
            depth=s.K,
            ranks=s.R,
            **layer.window(),
            K=s.K,
            R=s.R,
            HAS_BIAS=s.bias,
            KEPT=contraction is not None,
            PRECISION=layer.precision,
            **tile.options,
        )

    layer.run(SPEC, with_tile)


# BU is at most 32: with BK and BU of 64, Triton 3.8 generates wgmma that ptxas serialises
def _blocks(s, pixels, ranks, depth):
    depths = dict(BK=min(depth, s.block_k), BU=min(s.R, depth, 32, s.block_k))
    return dict(BM=pixels, BR=min(s.R, ranks), **depths)


SPEC = KernelSpec(
    name="grad_z",
    # pixels, ranks, largest BK and BU
    sizes=((128, 64, 64, 4, 3), (64, 64, 32, 4, 2), (64, 32, 32, 4, 1), (32, 16, 16, 4, 1)),
    blocks=_blocks,
    limits=lambda s: dict(BM=PIXELS, BR=rank_limits(s), BK=depth_limits(s), BU=rank_limits(s)),
    shared_bytes=lambda s, b, stages: (stages * b["BR"] + b["BM"]) * max(b["BK"], b["BU"]) * s.bits // 8,
    accumulators=lambda s, b: b["BM"] * b["BR"],
    begin={"float32": (64, 64, 32, 4, 2)},
)
