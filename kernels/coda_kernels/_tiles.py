"""Device code that the kernels share: where the window of an output pixel starts, where its entries lie,
products in the operands' dtype, and how results are stored.

Images are padded (the glossary of symbols is in ``coda_kernels/__init__.py``), so that no load needs a mask
and a window is one constant pattern of offsets. Pixel numbers are int64, because tensors may have more than
2^31 elements; offsets inside a window are int32.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# NumPy has no bfloat16. Triton's interpreter (3.6 to 3.9) keeps its bits in integers, multiplies those,
# truncates where a GPU rounds, and turns 0 into 1e-38. Under the interpreter, this module therefore converts
# bit by bit and computes in float32, with the results of a GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def pixel_tile(i_p, P, BP: tl.constexpr):
    """The first pixel of tile ``i_p``, all its pixels, and these clamped to the last one that exists, which
    is safe to load from; int64.

    The first one is clamped too: pixels are padded to whole blocks, and a tile may lie in the padding.
    """
    first = tl.cast(i_p, tl.int64) * BP
    o_p = first + tl.arange(0, BP)
    return tl.minimum(first, P - 1), o_p, tl.minimum(o_p, P - 1)


@triton.jit
def window_starts(first, o_p, OH, OW, HP, WP, CP: tl.constexpr, SH, SW):
    """The offset in the padded image [N, HP, WP, CP] of the first entry of every output pixel's window,
    int64.

    ``first`` is a pixel shortly before all of them, so that a tile needs only one 64-bit division.
    """
    image = first // (OH * OW)
    rest = (o_p - image * (OH * OW)).to(tl.int32)
    o_n, rest = rest // (OH * OW), rest % (OH * OW)
    o_h, o_w = rest // OW, rest % OW
    return (image + o_n) * (HP * WP * CP) + (o_h * SH).to(tl.int64) * (WP * CP) + o_w * SW * CP


@triton.jit
def window_offsets(
    o_k, WP, CP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr
):
    """The offset of entry k = (kh, kw, c) of a window from its start; entries past its end, whose weights
    are zero, read its first tap.
    """
    tap, o_c = o_k // CP, o_k % CP
    o_x = (tap // KW) * (DH * WP * CP) + (tap % KW) * (DW * CP) + o_c
    return tl.where(o_k < KH * KW * CP, o_x, o_c)


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        bits = tl.where(b_x == b_x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def widen(b_x):
    """To float32, exactly."""
    if INTERPRETED and b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def times(b_x, b_y):
    """``x * y`` in the dtype of x, rounded once."""
    if INTERPRETED:
        return narrow(widen(b_x) * widen(b_y), b_x.dtype)
    return b_x * b_y


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr):
    """``acc + x y`` with the accumulator's precision; PRECISION says how float32 operands are multiplied."""
    if INTERPRETED:
        b_x, b_y = (b_x, b_y) if b_x.dtype == b_acc.dtype else (widen(b_x), widen(b_y))
    return tl.dot(b_x, b_y, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def landed(b_acc):
    """``acc``, after waiting for the products that it is made of: for loops whose first operand is made in
    registers.

    wgmma reads these registers while the program goes on. Before the next operand overwrites them, Triton 3.6
    waits for all but three products (https://github.com/triton-lang/triton/issues/9433), and 3.8 for all but
    one if the assembler saves registers. Using the result, here without an instruction, makes it wait for all
    of them; loads go on.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
        b_acc = tl.inline_asm_elementwise(
            "// landed", "=f,0", [b_acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_acc


@triton.jit
def store_forward(
    b_dot, b_square, length_ptr, y_ptr, dot_ptr, square_ptr, o_p, m_p, o_o, P, units, keep, depth,
    SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Scale <w, u>, and store y as [P, n] and what the backward pass needs as [n, P]."""
    # Cauchy-Schwarz: only rounding can violate it, and only where w nearly vanishes. A vector may be longer
    # than computed by ``flushed``, because squares below the smallest normal number become 0
    flushed = tl.sqrt(depth * 1.1754944e-38)
    b_bound = (tl.sqrt(b_square) + flushed) * (tl.sqrt(tl.load(length_ptr + o_p)) + flushed)[:, None]
    b_dot = tl.clamp(b_dot, -b_bound, b_bound, propagate_nan=tl.PropagateNan.ALL)
    m_y = m_p[:, None] & (o_o < units)[None, :]
    b_y = SCALE(b_square, EPS) * b_dot
    tl.store(y_ptr + o_p[:, None] * units + o_o[None, :], narrow(b_y, y_ptr.dtype.element_ty), m_y)
    o_kept = o_p[:, None] + (o_o.to(tl.int64) * P)[None, :]
    if keep > 1:
        tl.store(dot_ptr + o_kept, b_dot, m_y)
    if keep > 0:
        tl.store(square_ptr + o_kept, b_square, m_y)


@triton.jit
def dot_per_unit(
    b_image, p_scale, m_scale, p_matrix, b_acc, PP, units, s_unit: tl.constexpr, PRECISION: tl.constexpr
):
    """``acc + sum_o (image * scale_o) matrix_o``: a block of the image stays in registers, and the inner loop
    runs over units.

    In float32 the units are summed separately: one long chain of additions loses twice what eager torch does.
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
