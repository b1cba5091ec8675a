"""A bound on the rounding error of every number of every result of a layer, for ``test_extremes.py``.

The errors of z, w, <w, u>, |w| and the rest are carried through the formulas of the layer. It is an error
analysis of first order, in which all terms are taken by magnitude, limited by what can never be exceeded:
Cauchy-Schwarz, and the largest slope of the norm's factor s.
"""

import dataclasses

import torch
from extreme_layers import Case

from coda_fast._spec import Spec
from coda_fast.backends import reference

ROUNDINGS = 4


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of the arithmetic inside a backend: the relative error of a number, the size below which
    a product may be flushed to 0, and the length below which |w| may be flushed to 0.
    """

    relative: float
    flush: float
    length: float
    # 16-bit kernels compute |w|^2 in float16 from numbers relative to the largest one
    of_largest: float = 0

    @classmethod
    def of(cls, backend, dtype):
        if backend != "triton" or dtype == torch.float32:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return cls(
                ROUNDINGS * torch.finfo(wide).eps,
                1e3 * torch.finfo(wide).tiny,
                10 * torch.finfo(wide).tiny ** 0.5,
            )
        flush = 1e-35 if dtype == torch.bfloat16 else 2.0**-22
        return cls(ROUNDINGS / 4 * torch.finfo(dtype).eps, flush, 1e-18, 2.0**-22)


@dataclasses.dataclass(frozen=True)
class Factor:
    """The norm's factor s(|w|) and bounds on its derivatives within the error of |w|."""

    value: torch.Tensor
    first: torch.Tensor  # |s'| at |w|
    slope: torch.Tensor  # the largest |s'|
    bend: torch.Tensor  # the largest |s''|
    on_edge: torch.Tensor  # whether s' may jump, because |w| may be eps

    @classmethod
    def of(cls, norm, eps, length, low, high, relative):
        """``low`` and ``high`` bound the computed |w|."""
        if norm == "squash":
            return cls(
                length / (1 + length.square()),
                (1 - length.square()).abs() / (1 + length.square()).square(),
                1 / (1 + low.square()),
                6 / (1 + low.square()) ** 1.5,
                torch.zeros_like(length, dtype=torch.bool),
            )
        return cls(
            1 / length.clamp_min(eps),
            torch.where(length > eps, 1 / length.clamp_min(eps).square(), 0),
            torch.where(high < eps * (1 - relative), 0, 1 / low.clamp_min(eps).square()),
            2 / low.clamp_min(eps) ** 3,
            (low <= eps * (1 + relative)) & (high >= eps * (1 - relative)),
        )


class ErrorBounds:
    """How far each result may be from the truth, number by number. All tensors are float64, with the shapes
    of backends/reference.py: patches [N, d, P], with units [N, n, d, P].

    The results are ``y``, the gradients ``A``, ``B`` and ``b`` of the parameters, and the two parts of the
    gradient of x: ``through_z``, by way of the weights, and ``direct``, that of u.

    In the names, a leading d marks the error of a quantity: dw that of w, d_dot that of <w, u>.
    """

    def __init__(self, case: Case, x, applied, v, precision: Precision):
        self.geometry, self.norm, self.eps = case.geometry, case.options["norm"], case.options["eps"]
        self.precision = precision
        self.reduce, self.weight, self.bias = (None if t is None else t.double() for t in case.parameters)
        self.x, self.applied = x.double(), applied.double()
        self.v = reference._rows(v.double()).abs().unsqueeze(2)
        self.columns, u = (reference._patches(t, self.geometry).abs() for t in (self.x, self.applied))
        self.u = u.unsqueeze(1)
        self._bound_weights()
        self._bound_length_and_dot()
        self._bound_output()
        self._bound_gradient_of_weights()
        self._bound_gradients_of_generation()
        self._bound_gradients_of_reduction_and_image()

    def _bound_weights(self):
        """Of z and w."""
        p, f = self.precision.relative, self.precision.flush
        size_a = self.weight.abs()
        size_z = reference._reduce(self.x.abs(), self.reduce.abs(), self.geometry)
        # the sum of the magnitudes of the terms of w
        self.spread = reference._generate(size_z, size_a, None if self.bias is None else self.bias.abs())
        self.flushed = reference._generate(torch.full_like(size_z, f), size_a) + f
        parameters = (self.reduce, self.weight, self.bias)
        self.w = reference._weight(self.x, parameters, Spec(self.geometry, self.norm, self.eps))[0]
        self.dw = p * self.spread + self.flushed
        self.z = reference._rows(reference._reduce(self.x, self.reduce, self.geometry)).abs()
        self.dz = p * reference._rows(size_z) + f

    def _bound_length_and_dot(self):
        """Of |w|, s(|w|) and <w, u>."""
        p, f, keep = self.precision.relative, self.precision.flush, dict(dim=2, keepdim=True)
        self.norm_u = self.u.norm(**keep)
        length = self.w.norm(**keep)
        d_length = p * self.spread.norm(**keep) + self.flushed.norm(**keep) + self.precision.length
        if self.precision.of_largest:
            largest_row = self.weight.flatten(2).norm(dim=2).amax(1).view(1, -1, 1, 1)
            largest_z = self.z.amax(1)[:, None, None]
            d_length = d_length + self.precision.of_largest * len(self.reduce) * largest_row * largest_z
        low, high = (length - d_length).clamp_min(0), length + d_length
        self.length, self.d_length, self.low, self.high = length, d_length, low, high
        self.factor = Factor.of(self.norm, self.eps, length, low, high, p)
        s, slope = self.factor.value, self.factor.slope
        self.ds = p * s + torch.minimum(d_length * slope, s + slope * high)
        u = reference._patches(self.applied, self.geometry).unsqueeze(1)
        self.dot = (self.w * u).sum(**keep).abs()
        rounded = p * (self.spread * self.u).sum(**keep) + (self.flushed * self.u).sum(**keep)
        self.d_dot = torch.minimum(rounded, high * self.norm_u + self.dot) + f

    def _bound_output(self):
        s, ds, dot, d_dot = self.factor.value, self.ds, self.dot, self.d_dot
        largest = 4 * self.norm_u * self.high * (s + ds)  # Cauchy-Schwarz
        y = torch.minimum(ds * (dot + d_dot) + s * d_dot, largest) + self.precision.flush
        size = self.geometry.output_size(*self.x.shape[2:])
        self.y = y.squeeze(2).reshape(len(self.x), len(self.weight), *size)

    def _bound_gradient_of_weights(self):
        """The gradient of w is v (s u + s' ratio w), where ratio is <w, u> / |w|."""
        p, f = self.precision.relative, self.precision.flush
        s, first, slope = self.factor.value, self.factor.first, self.factor.slope
        ratio = self.dot / self.length.clamp_min(1e-300)
        d_ratio = torch.minimum(
            (self.d_dot + ratio * self.d_length) / self.low.clamp_min(1e-300), 2 * self.norm_u
        )
        d_first = torch.where(
            self.factor.on_edge,
            2 * slope,
            p * first + torch.minimum(self.d_length * self.factor.bend, 2 * slope),
        )
        self.gs, self.dgs = self.v * s, self.v * self.ds + f
        t = self.v * ratio * first
        dt = self.v * (ratio * d_first + d_ratio * (first + d_first)) + p * t + f
        self.terms_of_grad_w = self.gs * self.u + t * self.spread
        self.d_grad_w = (
            self.dgs * self.u
            + dt * (self.w.abs() + self.dw)
            + (t + dt) * self.dw
            + p * (self.gs * self.u + t * self.spread)
        )

    def _flat(self, tensor):
        """[N, n, d, P] as [N, n * d, P]."""
        return tensor.reshape(len(self.x), self.weight[:, 0].numel(), -1)

    def _bound_gradients_of_generation(self):
        """Of A and b."""
        p, f = self.precision.relative, self.precision.flush
        d_grad_w, terms = self._flat(self.d_grad_w), self._flat(self.terms_of_grad_w)
        flushed = self._flat((self.u + self.spread).expand_as(self.w))
        sums = (
            self.z @ d_grad_w.mT
            + self.dz @ (terms + d_grad_w).mT
            + f * (torch.ones_like(self.z) @ flushed.mT)
        )
        total = sums.sum(0) + p * (self.z @ terms.mT).sum(0)
        units, rank, *window = self.weight.shape
        self.A = total.view(rank, units, *window).transpose(0, 1) + f
        self.b = None
        if self.bias is not None:
            d_sum = (self.d_grad_w + p * self.terms_of_grad_w).sum((0, 3))
            self.b = d_sum.view(self.bias.shape) + f

    def _bound_gradients_of_reduction_and_image(self):
        """Of B and of x."""
        p, f = self.precision.relative, self.precision.flush
        size_a = self.weight.abs()
        rows = size_a.transpose(0, 1).reshape(len(self.reduce), -1)
        d_grad_w, terms = self._flat(self.d_grad_w), self._flat(self.terms_of_grad_w)
        flushed = 1 + self._flat(self.spread + self.u.expand_as(self.w))
        d_grad_z = rows @ (d_grad_w + p * terms) + f * (rows @ flushed) + f
        d_grad_z = d_grad_z + p * (rows @ terms)
        self.B = (d_grad_z @ self.columns.mT).sum(0).view(self.reduce.shape) + f
        through_z = self.reduce.abs().flatten(1).t() @ d_grad_z + f
        errors = self.dgs * (self.w.abs() + self.dw) + self.gs * self.dw + p * self.gs * self.spread
        direct = errors.sum(1) + f * (1 + size_a.sum((0, 1)).reshape(-1, 1))
        self.through_z, self.direct = (
            reference._fold(a.contiguous(), self.x.shape, self.geometry)
            for a in (through_z, direct.expand_as(through_z))
        )
