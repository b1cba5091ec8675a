"""The gradient of the image, by the transpose of taking its windows: G(x, v), plus the gradient through z.

    dx = fold(sum_o gs_o (A_o^T z + b_o) + B^T dz)           gs = g s(q): prepare_backward.py

The scaled operand z gs is made in registers, from which the tensor cores read it.
"""

import math

import torch
import triton
import triton.language as tl

from coda_kernels._tiles import dot, dot_per_unit, narrow
from coda_kernels.compile import launch
from coda_kernels.config import ANY_SIZE, PIXELS, KernelSpec, power_of_two, rank_limits
from coda_kernels.layer import Layer, as_image, cdiv


@triton.jit
def _class_pixels(i_m, o_i, N, class_h, class_w, BM: tl.constexpr):
    """(image, row, column, exists) of the input pixels of tile ``i_m``; rows and columns within the class."""
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
    units: tl.int32,  # n, kh kw and E as loop bounds
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

    It gathers over taps and needs no atomics. Input pixels are grouped into classes by their remainder modulo
    the stride: pixels of a class see the same taps.
    """
    columns: tl.constexpr = (CP + BC - 1) // BC
    i_m, i_c = tl.program_id(0) // columns, tl.program_id(0) % columns
    i_h, i_w = tl.program_id(1), tl.program_id(2)
    class_h, class_w = (H + SH - 1) // SH, (W + SW - 1) // SW
    o_n, o_a, o_b, m_x = _class_pixels(i_m, tl.arange(0, BM), N, class_h, class_w, BM)
    m_x = m_x & (o_a * SH + i_h < H) & (o_b * SW + i_w < W)
    # the output pixel at the same position, to which a tap adds a constant; relative to the tile's first, so
    # that it fits in 32 bits
    n_first, a_first, b_first, exists = _class_pixels(i_m, 0, N, class_h, class_w, BM)
    first_p = tl.minimum((n_first * OH + a_first) * OW + b_first, N * OH * OW - 1)
    o_rel = ((o_n * OH + o_a) * OW + o_b - first_p).to(tl.int32)
    o_c = i_c * BC + tl.arange(0, BC)
    o_known = o_c % CP  # any channel past the last one, which is not stored
    o_r, o_e = tl.arange(0, BR), tl.arange(0, BE)
    b_acc = tl.zeros((BM, BC), tl.float32)
    for tap in range(taps):
        t_h, t_w = i_h + TOP - tap // KW * DH, i_w + LEFT - tap % KW * DW
        # a tap reaches either all pixels of this class or none
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
                    b_acc = dot_per_unit(
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
    # recomputed: carried through the loop in the layout of the store, it took 64 registers (the range looks
    # different, so that the compiler does not merge the two)
    o_n, o_a, o_b, m_x = _class_pixels(i_m, tl.arange(BM, 2 * BM) - BM, N, class_h, class_w, BM)
    o_h, o_w = o_a * SH + i_h, o_b * SW + i_w
    m_x = m_x & (o_h < H) & (o_w < W)
    p_dx = dx_ptr + (((o_n * H + o_h) * W + o_w) * C)[:, None] + o_c[None, :]
    tl.store(p_dx, narrow(b_acc, dx_ptr.dtype.element_ty), m_x[:, None] & (o_c < C)[None, :])


def run(
    layer: Layer,
    *,
    like: torch.Tensor,
    z: torch.Tensor | None,
    gs: torch.Tensor | None,
    e: torch.Tensor,
    rows: torch.Tensor,
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """An image with the shape of ``like``: the transposed convolution of ``e`` [PP, E] with ``rows`` [E, K],
    plus, with gs, that of gs (x) z with A.
    """
    s, (left, _, top, _) = layer.shape, layer.geometry.padding
    batch, _, height, width = like.shape
    dx = torch.empty(batch, height, width, s.channels, dtype=layer.dtype, device=layer.torch_device)
    stride_h, stride_w = s.stride
    pixels = batch * cdiv(height, stride_h) * cdiv(width, stride_w)

    def with_tile(tile):
        tiles = cdiv(pixels, tile["BM"]) * cdiv(s.CP, tile["BC"])
        launch(
            fold,
            (tiles, min(stride_h, height), min(stride_w, width)),
            a_ptr=layer.weight,
            rows_ptr=rows,
            z_ptr=layer.or_dummy(z),
            gs_ptr=layer.or_dummy(gs),
            e_ptr=e,
            dx_ptr=dx,
            N=batch,
            H=height,
            W=width,
            OH=layer.out[0],
            OW=layer.out[1],
            PP=len(e),
            units=s.units,
            taps=s.taps,
            columns_e=len(rows),
            s_e=e.stride(0),
            C=s.channels,
            **layer.window(),
            SH=stride_h,
            SW=stride_w,
            TOP=top,
            LEFT=left,
            K=s.K,
            R=s.R,
            DIRECT=gs is not None,
            PRECISION=layer.precision,
            **tile.options,
        )

    if dx.numel():
        layer.run(SPEC, with_tile)
    return as_image(dx, memory_format)


def _channels(s):
    return max(16, power_of_two(s.CP))


def _limits(s):
    columns = (16, 128, math.gcd(s.R, s.units_padded))
    return dict(BM=PIXELS, BC=(16, _channels(s), ANY_SIZE), BR=rank_limits(s), BE=columns)


def _shared_bytes(s, b, stages):
    depth = max(b["BR"], b["BE"])
    return (stages * depth * b["BC"] + b["BM"] * depth) * s.bits // 8


SPEC = KernelSpec(
    name="fold",
    # pixels, largest BC, largest BR; 64 ranks at once caused up to 57 spills
    sizes=(
        (128, 64, 32, 4, 3),
        (128, 64, 32, 8, 3),
        (64, 64, 32, 8, 2),
        (64, 32, 32, 4, 2),
        (32, 16, 16, 4, 1),
    ),
    blocks=lambda s, pixels, channels, ranks: dict(
        BM=pixels, BC=min(channels, _channels(s)), BR=min(s.R, ranks), BE=16
    ),
    limits=_limits,
    shared_bytes=_shared_bytes,
    accumulators=lambda s, b: b["BM"] * b["BC"],
    begin={"float32": (64, 32, 32, 4, 2), 80: (128, 64, 32, 8, 3), 100: (64, 64, 32, 8, 2)},
)
