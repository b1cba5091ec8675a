"""Gradients of the parameters, second part: adds up the partial sums of ``parameter_sums`` and the terms from
the norm, and writes them in the layout and dtype of the parameters.
"""

import torch
import triton
import triton.language as tl

from coda_kernels import interpreted
from coda_kernels._tiles import dot, narrow, widen
from coda_kernels.compile import launch
from coda_kernels.layer import Layer, cdiv
from coda_kernels.parameter_sums import Sums


@triton.jit(do_not_specialize=["weights", "parts", "reduce_parts", "rank", "C", "CP", "TAPS"])
def finish(
    # [parts, n, R, K], float32: the sums of `parameter_sums`; those of t are times ``scale``, as t is
    weight_sum_ptr,
    moments_ptr,  # [parts, n, R, R]
    direct_ptr,  # [parts, n, K]
    first_ptr,  # [parts, n, R]
    zeroth_ptr,  # [parts, n]
    reduce_sum_ptr,  # [reduce_parts, R, K]
    weight_ptr,  # packed [n', R, K]
    bias_ptr,  # packed [n', K]
    scale_ptr,  # [n]
    d_reduce_ptr,  # out [rank, C, kh, kw]
    d_weight_ptr,  # out [n, rank, C, kh, kw]
    d_bias_ptr,  # out [n, C, kh, kw]
    weights: tl.int32,  # programs for dA and db; the others compute dB
    parts: tl.int32,
    s_part: tl.int64,
    reduce_parts: tl.int32,
    s_reduce: tl.int64,
    rank: tl.int32,
    C: tl.int32,
    TAPS: tl.int32,
    K: tl.int32,
    CP: tl.int32,
    R: tl.constexpr,
    LAST: tl.constexpr,  # parameters are channels last
    HAS_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """Add up the parts and the terms from the norm, in the layout and dtype of the parameters."""
    BR: tl.constexpr = R if R < 64 else 64
    blocks = (K + BK - 1) // BK
    i = tl.program_id(0)
    o_r = tl.arange(0, BR)
    if i < weights:
        i_o, o_k = tl.cast(i // blocks, tl.int64), i % blocks * BK + tl.arange(0, BK)
        m_k = o_k < K
        i_a = i_o * (R * K)
        inverse = 1 / tl.load(scale_ptr + i_o)
        tap, o_c = o_k // CP, o_k % CP
        m_out, o_out = (o_c < C) & (tap < TAPS), tap * C + o_c if LAST else o_c * TAPS + tap
        if HAS_BIAS:
            b_b = widen(tl.load(bias_ptr + i_o * K + o_k, mask=m_k, other=0))
        if WEIGHT:
            for r in range(0, R, BR):
                b_acc = tl.zeros((BR, BK), tl.float32)
                for j in range(0, R, BR):
                    b_h = tl.zeros((BR, BR), tl.float32)
                    o_h = (r + o_r)[:, None] * R + (j + o_r)[None, :]
                    for part in range(parts):
                        b_h += tl.load(moments_ptr + (part * s_part + i_o * (R * R)) + o_h)
                    b_a = widen(
                        tl.load(
                            weight_ptr + i_a + (j + o_r)[:, None] * K + o_k[None, :],
                            mask=m_k[None, :],
                            other=0,
                        )
                    )
                    b_acc = dot(b_h, b_a, b_acc, PRECISION)
                if HAS_BIAS:
                    b_first = tl.zeros((BR,), tl.float32)
                    for part in range(parts):
                        b_first += tl.load(first_ptr + (part * s_part + i_o * R + r) + o_r)
                    b_acc += b_first[:, None] * b_b[None, :]
                b_acc *= inverse
                o_sum = (r + o_r)[:, None] * K + o_k[None, :]
                for part in range(parts):
                    b_acc += tl.load(
                        weight_sum_ptr + (part * s_part + i_a) + o_sum, mask=m_k[None, :], other=0
                    )
                p_out = (
                    d_weight_ptr + (i_o * rank + r) * (C * TAPS) + o_r[:, None] * (C * TAPS) + o_out[None, :]
                )
                tl.store(
                    p_out,
                    narrow(b_acc, d_weight_ptr.dtype.element_ty),
                    m_out[None, :] & (r + o_r < rank)[:, None],
                )
        if BIAS:
            zeroth = 0.0
            for part in range(parts):
                zeroth += tl.load(zeroth_ptr + part * s_part + i_o)
            b_sum = zeroth * b_b
            for r in range(0, R, BR):
                b_first = tl.zeros((BR,), tl.float32)
                for part in range(parts):
                    b_first += tl.load(first_ptr + (part * s_part + i_o * R + r) + o_r)
                b_a = widen(
                    tl.load(
                        weight_ptr + i_a + (r + o_r)[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0
                    )
                )
                b_sum += tl.sum(b_first[:, None] * b_a, 0)
            b_sum *= inverse
            for part in range(parts):
                b_sum += tl.load(direct_ptr + (part * s_part + i_o * K) + o_k, mask=m_k, other=0)
            tl.store(d_bias_ptr + i_o * (C * TAPS) + o_out, narrow(b_sum, d_bias_ptr.dtype.element_ty), m_out)
    else:
        i_r, o_k = (i - weights) // blocks, (i - weights) % blocks * BK + tl.arange(0, BK)
        o_row = i_r * BR + o_r
        tap, o_c = o_k // CP, o_k % CP
        b_reduce = tl.zeros((BR, BK), tl.float32)
        for part in range(reduce_parts):
            b_reduce += tl.load(
                reduce_sum_ptr + part * s_reduce + o_row[:, None] * K + o_k[None, :],
                mask=(o_k < K)[None, :],
                other=0,
            )
        m_rows = (o_row < rank)[:, None] & ((o_c < C) & (tap < TAPS))[None, :]
        p_reduce = (
            d_reduce_ptr
            + o_row[:, None] * (C * TAPS)
            + (tap * C + o_c if LAST else o_c * TAPS + tap)[None, :]
        )
        tl.store(p_reduce, narrow(b_reduce, d_reduce_ptr.dtype.element_ty), m_rows)


def run(
    layer: Layer,
    *,
    sums: Sums | None,
    reduce: torch.Tensor | None,
    d_reduce: torch.Tensor | None,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Fill the gradients that are given: dB from ``reduce``, [parts, R, K], dA and db from ``sums``."""
    s = layer.shape
    block = 64 if s.R <= 64 else 32  # limited by registers
    blocks = cdiv(s.K, block)
    weights = 0 if sums is None else s.units * blocks
    asked = [] if sums is None else [a for a in sums if a.dim() > 1]
    parts, s_part = (len(asked[0]), asked[0].stride(0)) if asked else (0, 0)
    reduces, s_reduce = (0, 0) if reduce is None else (len(reduce), reduce.stride(0))
    programs = weights + (0 if d_reduce is None else cdiv(s.R, 64) * blocks)
    # TF32 suffices, because these products are added to products of 16-bit numbers
    rounded = s.bits == 16 and not layer.device.amd and not interpreted()
    sums = Sums(*[layer.scale] * len(Sums._fields)) if sums is None else sums
    launch(
        finish,
        (programs,),
        weight_sum_ptr=sums.weight,
        moments_ptr=sums.moments,
        direct_ptr=sums.direct,
        first_ptr=sums.first,
        zeroth_ptr=sums.zeroth,
        reduce_sum_ptr=layer.or_float(reduce),
        weight_ptr=layer.weight,
        bias_ptr=layer.or_dummy(layer.bias),
        scale_ptr=layer.scale,
        d_reduce_ptr=layer.or_dummy(d_reduce),
        d_weight_ptr=layer.or_dummy(d_weight),
        d_bias_ptr=layer.or_dummy(d_bias),
        weights=weights,
        parts=parts,
        s_part=s_part,
        reduce_parts=reduces,
        s_reduce=s_reduce,
        rank=layer.rank,
        C=s.channels,
        TAPS=s.taps,
        K=s.K,
        CP=s.CP,
        R=s.R,
        LAST=layer.last,
        HAS_BIAS=s.bias,
        WEIGHT=d_weight is not None,
        BIAS=d_bias is not None,
        PRECISION="tf32" if rounded else layer.precision,
        BK=block,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
