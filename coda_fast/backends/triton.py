"""The DAU layer as fused Triton kernels (package ``coda_kernels``): the order of launches.

    align            canvas -> project (z, b.u, |u|^2) -> contracted or generated
    align_backward   canvas -> project -> grad_factors (gs, t) -> grad_z -> fold; outer sums for the parameters
    adjoint          canvas -> project -> norm -> grad_factors -> fold

Half precision multiplies 16-bit operands into float32 accumulators; norms, sums and what backward keeps are float32.
"""

from __future__ import annotations

import torch

from coda_fast._geometry import Geometry
from coda_fast.backends.factored import format_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _layer(input, reduction_weight, weight, bias, geometry: Geometry, norm, eps):
    from coda_kernels.layer import Layer, Window

    if input.dtype not in DTYPES:
        raise TypeError(f'backend="triton": expected float32, bfloat16 or float16, got {input.dtype}')
    window = Window(geometry.kernel, geometry.stride, geometry.dilation, geometry.padding)
    return Layer(tuple(input.shape[2:]), reduction_weight, weight, bias, window, norm, eps)


def align(input, applied, reduction_weight, weight, bias, geometry, norm, eps, keep):
    """(F(x, u), <w, u>, |w|^2, contraction); what ``keep`` does not ask for is None."""
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps)
    return layer.align(layer.canvas(input), None if applied is None else layer.canvas(applied), format_of(input), keep)[:4]


def align_backward(grad, input, applied, reduction_weight, weight, bias, dot, square, contraction, geometry, norm, eps, detach, needs):
    """Gradients (dx, du, dB, dA, db) of F, None where not needed; a pass whose results nobody needs is not launched."""
    need_x, need_u, need_reduce, need_weight, need_bias = needs
    shared = applied is None
    if not square.numel():  # an empty batch
        inputs = (input, input if shared else applied, reduction_weight, weight, bias)
        needs = (need_x, need_u and not shared, need_reduce, need_weight, need_bias)
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True))
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps)
    if detach:
        need_reduce = need_weight = need_bias = False
    need_z = (need_x or need_reduce) and not detach
    need_parameters = need_weight or need_bias
    du = dx = d_reduce = d_weight = d_bias = None
    with layer.on_device():
        canvas = layer.canvas(input)
        canvas_u = canvas if shared else layer.canvas(applied)
        z, _, _, starts = layer.project(canvas, starts=need_parameters or need_reduce)
        ranks = layer.shape.R if need_z else 0
        gs, t, e = layer.grad_factors(grad, dot if need_z or need_parameters else None, square, ranks)
        if need_z:
            layer.grad_z(canvas_u, z, gs, t, e, contraction)
        if shared and need_x:
            rows = layer.rows if need_z else layer.rows[layer.shape.R :]
            dx = layer.fold(input, z, gs, e, rows, format_of(input))
        if not shared and need_u:
            du = layer.fold(applied, z, gs, e[:, ranks:], layer.rows[layer.shape.R :], format_of(applied))
        if not shared and need_x and need_z:
            dx = layer.fold(input, None, None, e[:, :ranks], layer.reduce, format_of(input))
        if need_parameters:
            packed, packed_bias = layer.grad_parameters(canvas_u, starts, z, gs, t, need_weight, need_bias)
            d_weight = layer.unpack(packed, weight.shape[1]) if need_weight else None
            d_bias = layer.unpack(packed_bias.unsqueeze(0), len(weight))[0] if need_bias else None
        if need_reduce:
            d_reduce = layer.unpack(layer.outer_sum(canvas, starts, e[:, :ranks].t()).unsqueeze(0), len(reduction_weight))[0]
    return dx, du, d_reduce, d_weight, d_bias


def adjoint(input, value, reduction_weight, weight, bias, geometry, norm, eps):
    """G(x, v) as [N, C, H, W]."""
    if not value.numel():
        return torch.zeros_like(input)
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps)
    with layer.on_device():
        canvas = layer.canvas(input)
        _, _, square, _, z = layer.align(canvas, None, torch.contiguous_format, "norm", norm_only=True)
        gs, _, e = layer.grad_factors(value, None, square)
        return layer.fold(input, z, gs, e, layer.rows[layer.shape.R :], format_of(input))


def kept_shapes(input_shape, weight_shape, pixels, geometry, keep):
    """Shapes of <w, u>, |w|^2 and the contraction as ``align`` keeps them; [0] for what it does not."""
    from coda_kernels.config import Shape

    units, rank, channels = weight_shape[:3]
    shape = Shape(channels, units, rank, geometry.kernel)
    kept = (units, pixels)
    contraction = (pixels, units * shape.R) if keep == "contraction" and not shape.generated else (0,)
    return kept if keep in ("products", "contraction") else (0,), kept if keep != "nothing" else (0,), contraction
