"""The definition of a DAU layer, to the letter: the truth that every other backend is tested against.

The dynamic weight ``w`` is materialised (``n * d`` numbers for every output pixel) and automatic differentiation does the rest,
to any order. Slow and memory-hungry by design; choose it for tests and for teaching.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coda_fast._geometry import Geometry


def align(input, applied, reduction_weight, weight, bias, geometry: Geometry, norm: str, eps: float):
    """``F(x, u)[p, o] = s(|w|^2) <w[p, o], u_p>`` with ``w[p, o] = A_o B x_p + b_o``; the layer itself is ``F(x, x)``."""
    w, scale = _weight(input, reduction_weight, weight, bias, geometry, norm, eps)
    dot = (w * _patches(applied, geometry).unsqueeze(1)).sum(2)  # <w, u>, [N, n, P]
    return (scale * dot).unflatten(2, geometry.output_size(*input.shape[2:]))


def adjoint(input, value, reduction_weight, weight, bias, geometry: Geometry, norm: str, eps: float):
    """``G(x, v) = fold(sum_o v[p, o] s(|w|^2) w[p, o])``, the adjoint of ``u -> F(x, u)``."""
    w, scale = _weight(input, reduction_weight, weight, bias, geometry, norm, eps)
    patches = ((scale * value.flatten(2)).unsqueeze(2) * w).sum(1)
    return _fold(patches, input.shape, geometry)


def _weight(input, reduction_weight, weight, bias, geometry, norm, eps):
    """w, [N, n, d, P], and s(|w|^2), [N, n, P]."""
    units, rank = weight.shape[:2]
    padded = F.pad(input, geometry.padding)
    z = F.conv2d(padded, reduction_weight, stride=geometry.stride, dilation=geometry.dilation)  # z = B x
    generate = weight.reshape(units, rank, -1).transpose(1, 2).reshape(-1, rank, 1, 1)
    w = F.conv2d(z, generate, None if bias is None else bias.flatten())  # w = A z + b, a 1x1 convolution
    w = w.flatten(2).unflatten(1, (units, -1))
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    length = torch.linalg.vector_norm(w, dim=2, dtype=wide)  # its subgradient at w = 0 is 0: the limit
    scale = length / (1 + length.square()) if norm == "squash" else 1 / length.clamp_min(eps)
    return w, scale.to(w.dtype)


def _patches(input, geometry):
    """Every window of the padded image as a column, [N, C * kh * kw, P] in (c, kh, kw) order."""
    if input.shape[0] == 0:  # unfold refuses an empty batch
        rows, columns = geometry.output_size(*input.shape[2:])
        depth = input.shape[1] * geometry.kernel[0] * geometry.kernel[1]
        return input.new_zeros(0, depth, rows * columns) + input.sum()
    padded = F.pad(input, geometry.padding)
    return F.unfold(padded, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)


def _fold(patches, shape, geometry):
    """The transpose of ``_patches``."""
    if shape[0] == 0:
        return patches.new_zeros(shape) + patches.sum()
    left, right, top, bottom = geometry.padding
    height, width = shape[2:]
    padded = F.fold(
        patches,
        (height + top + bottom, width + left + right),
        geometry.kernel,
        dilation=geometry.dilation,
        stride=geometry.stride,
    )
    return padded[:, :, top : top + height, left : left + width]
