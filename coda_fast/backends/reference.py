"""The literal definition of a DAU layer, against which every other backend is tested.

The dynamic weight ``w`` is materialised (``n * d`` numbers for every output pixel) and autograd does the
rest, to any order. It is slow and needs much memory by design; use it for tests and for teaching.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from coda_fast import _norms
from coda_fast._spec import Gradients, Parameters, Spec

# x, u, B, A, b and the like; None means no bias, u = x, or a zero tangent
Tensors = Sequence[Any]


def align(input: torch.Tensor, applied: torch.Tensor, parameters: Parameters, spec: Spec) -> torch.Tensor:
    """``F(x, u)[p, o] = s(|w|^2) <w[p, o], u_p>`` with ``w[p, o] = A_o B x_p + b_o``; the layer itself is
    ``F(x, x)``.
    """
    w, scale = _weight(input, parameters, spec)
    dot = (w * _patches(applied, spec.geometry).unsqueeze(1)).sum(2)  # <w, u>, [N, n, P]
    return (scale * dot).reshape(*dot.shape[:2], *spec.geometry.output_size(*input.shape[2:]))


def adjoint(input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec) -> torch.Tensor:
    """``G(x, v) = fold(sum_o v[p, o] s(|w|^2) w[p, o])``, the adjoint of ``u -> F(x, u)``."""
    w, scale = _weight(input, parameters, spec)
    patches = ((scale * _rows(value)).unsqueeze(2) * w).sum(1)
    return _fold(patches, input.shape, spec.geometry)


def _in_float32(function):
    """A decorator that computes derivatives of lower precision in float32, because powers of |w| leave the
    range of float16.
    """

    def run(tensors, tangents, spec):
        dtype = tensors[0].dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return function(tensors, tangents, spec)
        wide = ([None if t is None else t.float() for t in many] for many in (tensors, tangents))
        found = function(*wide, spec)
        if isinstance(found, torch.Tensor):
            return found.to(dtype)
        return type(found)(*(None if t is None else t.to(dtype) for t in found))

    return functools.wraps(function)(run)


@_in_float32
def align_jvp(tensors: Tensors, tangents: Tensors, spec: Spec) -> torch.Tensor:
    """Directional derivative of F at ``tensors`` = (x, u, B, A, b) along ``tangents`` (None: zero):
    ``s <w, u'> + s <w', u> + s' <w, u>``.
    """
    input, applied, *parameters = tensors
    of_input, of_applied, *of_parameters = tangents
    geometry = spec.geometry
    w, scale, of_w, of_scale = _weight_jvp((input, *parameters), (of_input, *of_parameters), spec)
    patches = _patches(applied, geometry).unsqueeze(1)
    found = scale * (of_w * patches).sum(2) + of_scale * (w * patches).sum(2)
    if of_applied is not None:
        found = found + scale * (w * _patches(of_applied, geometry).unsqueeze(1)).sum(2)
    return found.reshape(*found.shape[:2], *geometry.output_size(*input.shape[2:]))


@_in_float32
def adjoint_jvp(tensors: Tensors, tangents: Tensors, spec: Spec) -> torch.Tensor:
    """Directional derivative of G at ``tensors`` = (x, v, B, A, b) along ``tangents`` (None: zero)."""
    input, value, *parameters = tensors
    of_input, of_value, *of_parameters = tangents
    geometry = spec.geometry
    w, scale, of_w, of_scale = _weight_jvp((input, *parameters), (of_input, *of_parameters), spec)
    value = _rows(value)
    factor = of_scale * value if of_value is None else of_scale * value + scale * _rows(of_value)
    patches = (factor.unsqueeze(2) * w + (scale * value).unsqueeze(2) * of_w).sum(1)
    return _fold(patches, input.shape, geometry)


@_in_float32
def gradients_jvp(tensors: Tensors, tangents: Tensors, spec: Spec) -> Gradients:
    """Directional derivative of the gradients (dx, du, dB, dA, db) of ``L = <v, F(x, u)>`` at ``tensors`` =
    (v, x, u, B, A, b) along ``tangents``. With ``u = None`` (u = x), dx is the whole gradient in the image.

    The gradient of L in w is ``v (s u + s1 <w, u> w)``. The others follow from it, because w is linear in z,
    in A and in b, and z is linear in B and in x. ``of_t`` is the tangent of ``t``; s1 is that of ``_slopes``.
    """
    shared = tensors[2] is None
    (v, x, u, reduce, weight, bias), (of_v, of_x, of_u, of_reduce, of_weight, of_bias) = (
        (*many[:2], many[1] if shared else many[2], *many[3:]) for many in (tensors, tangents)
    )
    zeros = lambda tangent, tensor: (
        torch.zeros_like(tensor) if tangent is None and tensor is not None else tangent
    )
    pairs = ((of_v, v), (of_x, x), (of_u, u), (of_reduce, reduce), (of_weight, weight), (of_bias, bias))
    of_v, of_x, of_u, of_reduce, of_weight, of_bias = (zeros(*pair) for pair in pairs)
    geometry = spec.geometry
    of_weights = _weight_jvp((x, reduce, weight, bias), (of_x, of_reduce, of_weight, of_bias), spec)
    w, scale, of_w, of_scale = (t if t.dim() == 4 else t.unsqueeze(2) for t in of_weights)
    first, second = (t.unsqueeze(2) for t in _slopes(w, spec))
    of_first = second * (w * of_w).sum(2, keepdim=True)
    z = _rows(_reduce(x, reduce, geometry))
    of_z = _rows(_reduce(of_x, reduce, geometry) + _reduce(x, of_reduce, geometry))
    v, of_v = (_rows(t).unsqueeze(2) for t in (v, of_v))
    columns, of_columns, patches, of_patches = (_patches(t, geometry) for t in (x, of_x, u, of_u))
    applied, of_applied = patches.unsqueeze(1), of_patches.unsqueeze(1)
    dot = (w * applied).sum(2, keepdim=True)
    of_dot = (of_w * applied + w * of_applied).sum(2, keepdim=True)
    dw = v * (scale * applied + first * dot * w)
    of_dw = of_v * (scale * applied + first * dot * w) + v * (
        of_scale * applied + scale * of_applied + (of_first * dot + first * of_dot) * w + first * dot * of_w
    )
    # as matrices, for products: [r, n d], [N, n d, P], [r, d]
    rows, of_rows = (t.transpose(0, 1).reshape(len(reduce), -1) for t in (weight, of_weight))
    flat, of_flat = (t.reshape(len(x), rows.shape[1], z.shape[2]) for t in (dw, of_dw))
    reduce_rows, of_reduce_rows = (t.reshape(len(reduce), -1) for t in (reduce, of_reduce))
    dz = rows @ flat
    of_dz = of_rows @ flat + rows @ of_flat
    through_w = of_reduce_rows.t() @ dz + reduce_rows.t() @ of_dz
    direct = ((of_v * scale + v * of_scale) * w + v * scale * of_w).sum(1)
    d_reduce = (of_dz @ columns.mT + dz @ of_columns.mT).sum(0)
    d_weight = (
        (of_z @ flat.mT + z @ of_flat.mT)
        .sum(0)
        .view(len(reduce), *weight.shape[:1], *weight.shape[2:])
        .transpose(0, 1)
    )
    return Gradients(
        _fold(through_w + direct if shared else through_w, x.shape, geometry),
        None if shared else _fold(direct, u.shape, geometry),
        d_reduce.view(reduce.shape),
        d_weight,
        None if bias is None else of_dw.sum((0, 3)).view(bias.shape),
    )


def _weight(input, parameters, spec):
    """w, [N, n, d, P], and s(|w|^2), [N, n, P]."""
    reduction_weight, weight, bias = parameters
    w = _generate(_reduce(input, reduction_weight, spec.geometry), weight, bias)
    length = _length(w)
    return w, spec.scale(length, length.square()).to(w.dtype)


def _weight_jvp(tensors, tangents, spec):
    """w and s(|w|^2), and their directional derivatives: ``s' = s1 <w, w'>``."""
    (input, reduce, weight, bias), (of_input, of_reduce, of_weight, of_bias) = tensors, tangents
    geometry = spec.geometry
    w, scale = _weight(input, (reduce, weight, bias), spec)
    of_w = torch.zeros_like(w)
    if of_input is not None:
        of_w = of_w + _generate(_reduce(of_input, reduce, geometry), weight)
    if of_reduce is not None:
        of_w = of_w + _generate(_reduce(input, of_reduce, geometry), weight)
    if of_weight is not None:
        of_w = of_w + _generate(_reduce(input, reduce, geometry), of_weight)
    if of_bias is not None:
        of_w = of_w + of_bias.reshape(len(of_bias), -1, 1)
    return w, scale, of_w, _slopes(w, spec)[0] * (w * of_w).sum(2)


def _slopes(w, spec):
    """s1 and s2 with ``ds = s1 <w, dw>`` and ``ds1 = s2 <w, dw>``. They are 0 where s is constant, and at w =
    0, where their factors vanish faster.
    """
    norm, length = _norms.named(spec.norm), _length(w)
    inside = length > norm.flat_below(spec.eps)
    safe = torch.where(inside, length, 1)
    square = safe.square()
    slopes = norm.slope(1 / safe, safe, square, spec.eps), norm.curvature(safe, square, spec.eps)
    return tuple(torch.where(inside, t, 0).to(w.dtype) for t in slopes)


def _reduce(input, reduction_weight, geometry):
    """z = B x, [N, r, OH, OW]."""
    return F.conv2d(
        F.pad(input, geometry.padding), reduction_weight, stride=geometry.stride, dilation=geometry.dilation
    )


def _generate(z, weight, bias=None):
    """w = A z + b, [N, n, d, P]: a 1x1 convolution."""
    units, rank = weight.shape[:2]
    rows = weight.reshape(units, rank, -1).transpose(1, 2).reshape(-1, rank, 1, 1)
    return F.conv2d(z, rows, None if bias is None else bias.reshape(-1)).reshape(
        len(z), units, math.prod(weight.shape[2:]), z.shape[2] * z.shape[3]
    )


def _rows(tensor):
    """[a, b, ...] as [a, b, product of the rest]. It does not use ``flatten``, which torch.autograd.grad does
    not support with ``is_grads_batched``.
    """
    return tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:]))


def _length(w):
    """|w|, [N, n, P]. At w = 0 all derivatives are 0 (for the first that is the limit; torch's own second one
    is NaN).
    """
    some = (w != 0).any(2)
    length = torch.linalg.vector_norm(
        torch.where(some.unsqueeze(2), w, 1), dim=2, dtype=torch.promote_types(w.dtype, torch.float32)
    )
    return torch.where(some, length, 0)


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
    return padded.narrow(2, top, height).narrow(3, left, width)
