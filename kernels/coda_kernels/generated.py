"""F(x, u) if r > 64 or d <= 64: y_po = s(|w_po|^2) <w_po, u_p> with w_po = A_o^T z_p + b_o, which is made in
registers, a tile of d at a time.

    <w, u> += w u,   |w|^2 += w w
"""

import torch
import triton
import triton.language as tl

from coda_kernels._tiles import dot, pixel_tile, store_forward, widen, window_offsets, window_starts
from coda_kernels.compile import launch
from coda_kernels.config import PIXELS, KernelSpec, depth_limits, power_of_two, rank_limits, unit_limits
from coda_kernels.layer import Layer, cdiv
from coda_kernels.prepare import Prepared


@triton.jit(do_not_specialize=["P", "OH", "OW", "HP", "WP", "SH", "SW", "keep"])
def generated(
    u_ptr,  # padded image [N, HP, WP, CP]
    a_ptr,  # [n', R, K]
    b_ptr,  # [n', K]
    z_ptr,  # [PP, R]
    length_ptr,  # [PP]: |u_p|^2
    y_ptr,  # out [P, n]
    dot_ptr,  # out [n, P]
    square_ptr,  # out [n, P]
    P: tl.int64,
    OH: tl.int32,
    OW: tl.int32,
    HP: tl.int64,
    WP: tl.int32,
    SH: tl.int32,
    SW: tl.int32,
    units: tl.int32,
    keep: tl.int32,  # what is stored for the backward pass: 0 nothing, 1 |w|^2, 2 also <w, u>
    depth: tl.int32,  # K and R as loop bounds, known only at run time, as in ``contracted``
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """GEMM [pixels, R] x [R, BD of d] for each unit: a tile of w, multiplied by u and by itself in registers.
    z stays in registers if BR = R.
    """
    blocks = (units + BO - 1) // BO
    i_m, i_n = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, o_all, o_p = pixel_tile(i_m, P, BM)
    m_p = o_all < P
    p_row = u_ptr + window_starts(first, o_p, OH, OW, HP, WP, CP, SH, SW)
    o_j = tl.arange(0, BO * BD)
    o_unit, o_r = i_n * BO + o_j // BD, tl.arange(0, BR)
    p_a = a_ptr + o_unit.to(tl.int64) * (R * K) + o_j % BD
    p_z = z_ptr + o_p[:, None] * R + o_r[None, :]
    b_z = tl.load(p_z)
    b_dot = tl.zeros((BM, BO), tl.float32)
    b_square = tl.zeros((BM, BO), tl.float32)
    for k in range(0, depth, BD):
        b_w = tl.zeros((BM, BO * BD), tl.float32)
        if BR == R:
            b_w = dot(b_z, tl.load(p_a[None, :] + (o_r * K)[:, None] + k), b_w, PRECISION)
        else:
            for r in range(0, ranks, BR):
                b_w = dot(
                    tl.load(p_z + r), tl.load(p_a[None, :] + ((r + o_r) * K)[:, None] + k), b_w, PRECISION
                )
        if HAS_BIAS:
            b_w += widen(tl.load(b_ptr + o_unit * K + o_j % BD + k))[None, :]
        o_k = k + tl.arange(0, BD)
        b_u = widen(tl.load(p_row[:, None] + window_offsets(o_k, WP, CP, KH, KW, DH, DW)[None, :]))
        b_w = tl.reshape(b_w, (BM, BO, BD))
        b_dot += tl.sum(b_w * b_u[:, None, :], 2)
        b_square += tl.sum(b_w * b_w, 2)
    o_o = i_n * BO + tl.arange(0, BO)
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
) -> None:
    """Fill ``output`` [..., n] of P pixels and, if given, <w, u> (``dot``) and |w|^2 (``square``), [n, P] in
    float32.
    """
    s, pixels = layer.shape, output.shape[:-1].numel()

    def with_tile(tile):
        launch(
            generated,
            (cdiv(pixels, tile["BM"]) * cdiv(s.units, tile["BO"]),),
            u_ptr=padded,
            a_ptr=layer.weight,
            b_ptr=layer.or_dummy(layer.bias),
            z_ptr=prepared.z,
            length_ptr=prepared.length,
            y_ptr=output,
            dot_ptr=layer.or_float(dot),
            square_ptr=layer.or_float(square),
            P=pixels,
            **layer.sizes(),
            units=s.units,
            keep=(square is not None) + (dot is not None),
            depth=s.K,
            ranks=s.R,
            **layer.window(),
            K=s.K,
            R=s.R,
            HAS_BIAS=s.bias,
            SCALE=layer.norm.scale,
            EPS=layer.eps,
            PRECISION=layer.precision,
            **tile.options,
        )

    layer.run(SPEC, with_tile)


def _blocks(s, pixels, columns, ranks):
    depth = min(64, s.block_k, columns)
    units = max(1, min(power_of_two(s.units), columns // depth))
    return dict(BM=pixels, BO=units, BD=depth, BR=min(s.R, ranks))


def _shared_bytes(s, b, stages):
    z = b["BM"] * b["BR"] * (1 if b["BR"] == s.R else stages)
    return (z + (b["BM"] * b["BD"] + b["BO"] * b["BD"] * b["BR"]) * stages) * s.bits // 8


SPEC = KernelSpec(
    name="generated",
    # pixels, columns BO BD, largest BR
    sizes=(
        (128, 128, 256, 8, 2),
        (128, 64, 256, 8, 1),
        (64, 64, 64, 4, 2),
        (64, 64, 64, 4, 1),
        (32, 16, 16, 4, 1),
    ),
    blocks=_blocks,
    limits=lambda s: dict(BM=PIXELS, BO=unit_limits(s), BD=depth_limits(s), BR=rank_limits(s)),
    shared_bytes=_shared_bytes,
    accumulators=lambda s, b: b["BM"] * b["BO"] * b["BD"],
    begin={"float32": (64, 64, 64, 4, 2)},
)
