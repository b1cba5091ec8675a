"""The DAU layer as fused Triton kernels (package ``coda_kernels``): the order of launches.

    align            prepare (packed parameters, norms, canvas, z) -> contracted or generated
    align_backward
        prepare_backward (z, canvas, gs, t, Gram matrices) -> grad_z -> fold; parameter_sums -> finish
    adjoint          prepare -> norm -> prepare_backward -> fold

Half precision multiplies 16-bit operands into float32 accumulators; norms, sums and what backward keeps are
float32.
"""

from __future__ import annotations

import torch

from coda_fast._geometry import Geometry
from coda_fast.backends.factored import format_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _layer(input, reduction_weight, weight, bias, geometry: Geometry, norm, eps, prepared=None):
    from coda_kernels.layer import Layer, Window

    if input.dtype not in DTYPES:
        raise TypeError(f'backend="triton": expected float32, bfloat16 or float16, got {input.dtype}')
    window = Window(geometry.kernel, geometry.stride, geometry.dilation, geometry.padding)
    return Layer(tuple(input.shape[2:]), reduction_weight, weight, bias, window, norm, eps, prepared)


def align(input, applied, reduction_weight, weight, bias, geometry, norm, eps, keep):
    """(F(x, u), <w, u>, |w|^2, contraction, packed parameters); what ``keep`` does not ask for is None."""
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps)
    results = layer.align(input, applied, format_of(input), keep)
    return *results, layer.prepared if keep != "nothing" else None


def align_backward(
    grad,
    input,
    applied,
    reduction_weight,
    weight,
    bias,
    dot,
    square,
    contraction,
    prepared,
    geometry,
    norm,
    eps,
    detach,
    needs,
):
    """Gradients (dx, du, dB, dA, db) of F, None where not needed; a pass whose results nobody needs is not
    launched.
    """
    need_x, need_u, *need_parameters = needs
    shared = applied is None
    if not square.numel():  # an empty batch
        inputs = (input, input if shared else applied, reduction_weight, weight, bias)
        needs = (need_x, need_u and not shared, *need_parameters)
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True))
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps, prepared)
    if detach:
        need_parameters = [False] * 3
    need_z = (need_x or need_parameters[0]) and not detach
    ranks, du, dx, gradients = layer.shape.R if need_z else 0, None, None, (None,) * 3
    with layer.on_device():
        if prepared is None:
            layer.pack(input)
        full = need_z or any(need_parameters)
        canvas, z, starts, gs, t, gram, cross, e = layer.prepare_backward(
            input, applied, grad, dot if full else None, square, ranks, full
        )
        if need_z:
            layer.grad_z(canvas, z, gs, t, gram, cross, e, contraction)
        if shared and need_x:
            rows = layer.rows if need_z else layer.rows[layer.shape.R :]
            dx = layer.fold(input, z, gs, e, rows, format_of(input))
        if not shared and need_u:
            du = layer.fold(applied, z, gs, e[:, ranks:], layer.rows[layer.shape.R :], format_of(applied))
        if not shared and need_x and need_z:
            dx = layer.fold(input, None, None, e[:, :ranks], layer.reduce, format_of(input))
        if any(need_parameters):
            canvas_x = canvas if shared or not need_parameters[0] else layer.canvas(input)
            gradients = layer.grad_parameters(canvas_x, canvas, starts, z, gs, t, e, ranks, need_parameters)
    return dx, du, *gradients


def adjoint(input, value, reduction_weight, weight, bias, geometry, norm, eps):
    """G(x, v) as [N, C, H, W]."""
    if not value.numel():
        return torch.zeros_like(input)
    layer = _layer(input, reduction_weight, weight, bias, geometry, norm, eps)
    with layer.on_device():
        square = layer.align(input, None, torch.contiguous_format, "norm", norm_only=True)[2]
        _, z, _, gs, _, _, _, e = layer.prepare_backward(input, None, value, None, square)
        return layer.fold(input, z, gs, e, layer.rows[layer.shape.R :], format_of(input))


def kept_shapes(input, weight, bias, pixels, geometry, keep):
    """Shapes of <w, u>, |w|^2, the contraction and the packed parameters as ``align`` keeps them; [0] for
    what it does not.
    """
    from coda_kernels.config import Shape

    units, rank, channels = weight.shape[:3]
    shape = Shape(
        channels, units, rank, geometry.kernel, bias=bias is not None, bits=8 * weight.element_size()
    )
    kept = (units, pixels)
    contraction = (pixels, units * shape.R) if keep == "contraction" and not shape.generated else (0,)
    prepared = (shape.prepared,) if keep != "nothing" else (0,)
    return (
        kept if keep in ("products", "contraction") else (0,),
        kept if keep != "nothing" else (0,),
        contraction,
        prepared,
    )


def gradients_like(*parameters):
    """Tensors such as ``align_backward`` makes for the parameters."""
    from coda_kernels import layer

    return layer.gradients_like(*parameters)
