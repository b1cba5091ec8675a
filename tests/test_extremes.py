"""Random layers at the ends of the range of numbers, every number of every result against the definition in
float64.

A result is a sum of products, and what may cancel in it is rounded in proportion to its terms. So each number
has a tolerance of its own: `Sizes` carries the errors of z, w, <w, u>, |w| and so on through the formulas of
the layer, taken without their signs (an error analysis in the usual first order, with what cannot be
exceeded: Cauchy-Schwarz, the largest slope of s). There is no scale that is shared by a whole tensor, behind
which one wrong number could hide: a pixel of 1e-30 beside a pixel of 1 has to be right to its own seven
digits.

    layer         y = F(x, x), and the gradients of x, B, A, b
    explanation   the gradient of x in explanation mode, G(x, v), for two v at once
    adjoint
        G(x, v), and the gradients of <G(x, v), u> in x, v, B, A, b: F(x, u) with
        weights of x applied to another u

Images, parameters, z and |w| up to 1e18 are tried, and down to zero: below 1e-18, |w| has an error of 1e-18
(its square leaves float32), so that it counts as 0; everything else keeps its digits down to the least normal
number. A longer run:

    CODA_FAST_EXTREMES=600 pytest tests/test_extremes.py -s -k test_longer
        new layers for 600 seconds, and a table of what was tried
"""

import dataclasses
import math
import os
import random
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import assert_close

from coda_fast._geometry import Geometry
from coda_fast._spec import Spec
from coda_fast.backends import factored, reference
from coda_fast.backends.factored import layer as factored_layer
from coda_fast.backends.factored import matrices, windows
from coda_fast.backends.factored import norm as factored_norm
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

HALVES = (torch.bfloat16, torch.float16)
NAMES = ("x", "v", "B", "A", "b")

# -- layers
# ------------------------------------------------------------------------------------------------------------

INPUTS = "images from 1e-30 to 1e18"
PIXELS = "pixels of any two sizes, or zero"
CHANNELS = "channels of any two sizes, or zero"
PARAMETERS = "parameters from 1e-16 to 1e16"
ZEROS = "zeros in parameters, units with w = 0"
CANCELS = "w that nearly cancels"
EPS = "|w| around eps"
UPSTREAM = "upstream gradients from 1e-20 to 1e20, or zero"
KINDS = (INPUTS, PIXELS, CHANNELS, PARAMETERS, ZEROS, CANCELS, EPS, UPSTREAM)


@dataclasses.dataclass
class Case:
    kind: str
    seed: int
    x: torch.Tensor  # in the dtype that is tried, like all of them
    u: torch.Tensor  # like x: upstream gradient of the adjoint
    v: torch.Tensor  # like y: upstream gradient of the layer, argument of the adjoint
    parameters: list
    options: dict

    @property
    def geometry(self):
        o = self.options
        return Geometry.make(tuple(self.parameters[0].shape[2:]), o["stride"], o["padding"], o["dilation"])

    def __str__(self):
        _, weight, bias = self.parameters
        shapes = f"x {list(self.x.shape)}, A {list(weight.shape)}, bias {bias is not None}"
        return f"{self.kind}, seed {self.seed}: {shapes}, {self.options}, {self.x.dtype}"


def make(seed, kind, dtype):
    """A layer of that kind. float16 is tried from 1e-1 to 1e1, where what the kernels keep in it (z, gs,
    t) fits.
    """
    draw, generator = random.Random(f"{kind} {seed}"), torch.Generator()
    generator.manual_seed(draw.getrandbits(32))
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    narrow = dtype == torch.float16
    power = lambda low, high: 10.0 ** (draw.uniform(-1, 1) if narrow else draw.uniform(low, high))
    kernel, stride, dilation = ((draw.randint(1, 3), draw.randint(1, 3)) for _ in range(3))
    dilation = tuple(min(2, d) for d in dilation)
    padding = (draw.randint(0, 2), draw.randint(0, 2))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw.choice((0, 0, 1, 3))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    batch, channels, units, rank = (
        draw.randint(1, 2),
        draw.randint(1, 5),
        draw.randint(1, 4),
        draw.randint(1, 5),
    )
    # of more than 64 numbers a patch: the fused kernels compute these in another form
    if draw.random() < 0.4:
        channels = 64 // math.prod(kernel) + draw.randint(1, 3)
    window = (channels, *kernel)
    d = math.prod(window)
    norm, eps = draw.choice(("squash", "l2")), draw.choice((1e-6, 1e-3, 1e-12))
    if narrow:
        # gradients have a factor 1 / |w|^2 within the kernels, which must fit into float16 (see
        # docs/kernels.md)
        eps = 3e-1
    x, u = randn(batch, channels, *size), randn(batch, channels, *size)
    reduce, weight, bias = (
        randn(rank, *window) / d**0.5,
        randn(units, rank, *window) / (rank * d) ** 0.5,
        randn(units, *window) / d**0.5,
    )
    bias = draw.choice((bias, torch.zeros_like(bias), None))
    geometry = Geometry.make(kernel, stride, padding, dilation)
    v = randn(batch, units, *geometry.output_size(*size))
    if kind == INPUTS:
        x, u = x * power(-30, 18), u * power(-30, 18)
    elif kind == PIXELS:
        mask = torch.rand(batch, 1, *size, generator=generator) < 0.5
        x = x * torch.where(mask, power(-30, 18), draw.choice((0, 1, power(-30, 18))))
        u = u * torch.where(mask.roll(1, 3), power(-30, 18), draw.choice((0, 1)))
    elif kind == CHANNELS:
        mask = torch.rand(1, channels, 1, 1, generator=generator) < 0.5
        x = x * torch.where(mask, power(-30, 18), draw.choice((0, 1, power(-30, 18))))
        u = u * torch.where(mask, power(-30, 18), draw.choice((0, 1)))
    elif kind == PARAMETERS:
        reduce, weight, bias = (t if t is None else t * power(-16, 16) for t in (reduce, weight, bias))
        x = x * power(-2, 2)
        if draw.random() < 0.5:  # ranks of their own sizes
            weight = (
                weight
                / weight.abs().max()
                * torch.tensor([power(-16, 16) for _ in range(rank)]).double().view(1, rank, 1, 1, 1)
            )
    elif kind == ZEROS:
        for t in (reduce, weight, bias):
            if t is not None:
                t[torch.rand(t.shape, generator=generator) < draw.choice((0.1, 0.5))] = 0
        what = draw.randint(0, 4)
        if what == 0 and bias is not None:
            bias[0] = 0
        if what in (0, 1):
            weight[0] = 0
        elif what == 2:
            reduce[draw.randrange(rank)] = 0
        elif what == 3:
            reduce.zero_()
        x = x * power(-3, 3)
    elif kind == CANCELS:
        x = x * power(-3, 3)
        column = draw.randrange(math.prod(geometry.output_size(*size)))
        x, reduce, weight = (t.to(dtype).double() for t in (x, reduce, weight))
        z = reference._rows(reference._reduce(x, reduce, geometry))[0, :, column]
        bias = -torch.einsum("ok...,k->o...", weight, z) * draw.choice((1, 1, 0.999, 1 + 1e-6))
    elif kind == EPS:
        norm, x = "l2", x * power(-4, 4)
        x, reduce, weight, bias = (
            t if t is None else t.to(dtype).double() for t in (x, reduce, weight, bias)
        )
        length = reference._length(reference._weight(x, (reduce, weight, bias), Spec(geometry, "l2", 1.0))[0])
        if not narrow and float(length.median()) > 1e-12:
            eps = float(length.median()) * draw.choice((1, 1.001, 0.999, 10, 0.1))
    elif kind == UPSTREAM:
        v = v * torch.where(
            torch.rand(v.shape, generator=generator) < 0.3, draw.choice((0, 1)), power(-20, 20)
        )
    tensors = [x, u, v, reduce, weight, bias]
    # |w| and its terms up to 1e18: one factor for the image
    most = float(
        reference._generate(reference._reduce(x.abs(), reduce.abs(), geometry), weight.abs(), None)
        .square()
        .sum(2)
        .sqrt()
        .max()
    )
    if not narrow and most > 1e18:
        tensors[0] = x * (1e18 / most)
    layout = draw.choice((torch.contiguous_format, torch.channels_last))
    x, u, v, *parameters = (t if t is None else t.to(dtype) for t in tensors)
    x, u, v = (t.contiguous(memory_format=layout) for t in (x, u, v))
    return Case(
        kind,
        seed,
        x,
        u,
        v,
        parameters,
        dict(stride=stride, padding=padding, dilation=dilation, norm=norm, eps=eps),
    )


# -- what rounding may do
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Precision:
    """Of the arithmetic inside of a backend: relative error of a number, and the sizes below which a
    product or |w| may be flushed to 0.
    """

    relative: float
    flush: float
    length: float
    of_largest: float = 0  # 16-bit kernels take |w|^2 of numbers over their largest, in float16

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


ROUNDINGS = 4


class Sizes:
    """How far each result may be from the truth, number by number. All tensors float64; shapes as in
    backends/reference.py: patches [N, d, P], units before them [N, n, d, P].
    """

    def __init__(self, case: Case, x, applied, v, precision: Precision):
        geometry, norm, eps = case.geometry, case.options["norm"], case.options["eps"]
        reduce, weight, bias = (None if t is None else t.double() for t in case.parameters)
        x, applied, v = x.double(), applied.double(), reference._rows(v.double()).abs().unsqueeze(2)
        p, f = precision.relative, precision.flush
        columns, u = (reference._patches(t, geometry).abs() for t in (x, applied))
        u = u.unsqueeze(1)
        norm_u = u.norm(dim=2, keepdim=True)
        size_a, size_b = weight.abs(), reduce.abs()
        size_z = reference._reduce(x.abs(), size_b, geometry)
        spread = reference._generate(size_z, size_a, None if bias is None else bias.abs())  # terms of w
        w = reference._weight(x, (reduce, weight, bias), Spec(geometry, norm, eps))[0]
        flushed = reference._generate(torch.full_like(size_z, f), size_a) + f
        dw = p * spread + flushed
        z = reference._rows(reference._reduce(x, reduce, geometry)).abs()
        self.dz_forward = p * reference._rows(size_z) + f
        keep = dict(dim=2, keepdim=True)
        length = w.norm(**keep)
        d_length = p * spread.norm(**keep) + flushed.norm(**keep) + precision.length
        if precision.of_largest:
            largest_row = weight.flatten(2).norm(dim=2).amax(1).view(1, -1, 1, 1)
            d_length = d_length + precision.of_largest * len(reduce) * largest_row * z.amax(1)[:, None, None]
        low, high = (length - d_length).clamp_min(0), length + d_length
        if norm == "squash":
            s = length / (1 + length.square())
            slope, bend = 1 / (1 + low.square()), 6 / (1 + low.square()) ** 1.5
            on_edge = torch.zeros_like(length, dtype=torch.bool)
            first = (1 - length.square()).abs() / (1 + length.square()).square()
        else:
            s = 1 / length.clamp_min(eps)
            slope = torch.where(high < eps * (1 - p), 0, 1 / low.clamp_min(eps).square())
            bend, on_edge = 2 / low.clamp_min(eps) ** 3, (low <= eps * (1 + p)) & (high >= eps * (1 - p))
            first = torch.where(length > eps, 1 / length.clamp_min(eps).square(), 0)
        ds = p * s + torch.minimum(d_length * slope, s + slope * high)
        dot = (w * reference._patches(applied, geometry).unsqueeze(1)).sum(**keep).abs()
        d_dot = (
            torch.minimum(p * (spread * u).sum(**keep) + (flushed * u).sum(**keep), high * norm_u + dot) + f
        )
        self.y = torch.minimum(ds * (dot + d_dot) + s * d_dot, 4 * norm_u * high * (s + ds)) + f
        # gradients: of w it is v (s u + first ratio w), ratio = <w, u> / |w|
        ratio = dot / length.clamp_min(1e-300)
        d_ratio = torch.minimum((d_dot + ratio * d_length) / low.clamp_min(1e-300), 2 * norm_u)
        d_first = torch.where(on_edge, 2 * slope, p * first + torch.minimum(d_length * bend, 2 * slope))
        gs, dgs = v * s, v * ds + f
        t = v * ratio * first
        dt = v * (ratio * d_first + d_ratio * (first + d_first)) + p * t + f
        dw_all = dgs * u + dt * (w.abs() + dw) + (t + dt) * dw + p * (gs * u + t * spread)
        self.dw_terms = gs * u + t * spread
        rank = len(reduce)
        rows = size_a.transpose(0, 1).reshape(rank, -1)
        flat = lambda a: a.reshape(len(x), rows.shape[1], -1)
        ones = torch.ones_like(z)
        of_dw = flat(dw_all + self.dw_terms * 0)
        gradient_w = flat(self.dw_terms)
        sums = (
            z @ of_dw.mT
            + self.dz_forward @ (gradient_w + of_dw).mT
            + f * (ones @ flat((u + spread).expand_as(w)).mT)
        )
        self.A = (sums.sum(0) + p * (z @ gradient_w.mT).sum(0)).view(
            rank, *weight.shape[:1], *weight.shape[2:]
        ).transpose(0, 1) + f
        self.b = None if bias is None else (dw_all + p * self.dw_terms).sum((0, 3)).view(bias.shape) + f
        d_dz = rows @ (of_dw + p * gradient_w) + f * (rows @ (1 + flat(spread + u.expand_as(w)))) + f
        size_dz = rows @ gradient_w
        self.B = ((d_dz + p * size_dz) @ columns.mT).sum(0).view(reduce.shape) + f
        through_z = reduce.abs().flatten(1).t() @ (d_dz + p * size_dz)
        through_z, direct = (
            through_z + f,
            (dgs * (w.abs() + dw) + gs * dw + p * gs * spread).sum(1)
            + f * (1 + size_a.sum((0, 1)).reshape(-1, 1)),
        )
        self.through_z, self.direct = (
            reference._fold(a.contiguous(), x.shape, geometry)
            for a in (through_z, direct.expand_as(through_z))
        )
        self.y = self.y.squeeze(2).reshape(len(x), len(weight), *geometry.output_size(*x.shape[2:]))


WHATS = ("layer", "explanation", "adjoint")


def results(case, backend, tensors, what):
    """``what`` of the layer with those tensors: a list of named tensors."""
    x, u, v, *parameters = (None if t is None else t.detach().requires_grad_() for t in tensors)
    named = [(n, t) for n, t in zip(NAMES, (x, v, *parameters), strict=True) if t is not None]
    options = dict(case.options, backend=backend)
    if what == "layer":
        named = [pair for pair in named if pair[0] != "v"]
        y = dau_conv2d(x, *parameters, **options)
        return [
            ("y", y),
            *zip(
                [n for n, _ in named], torch.autograd.grad(y, [t for _, t in named], v.detach()), strict=True
            ),
        ]
    if what == "explanation":
        y = dau_conv2d(x, *(p if p is None else p.detach() for p in parameters), **options, detach=True)
        (both,) = torch.autograd.grad(
            y, x, torch.stack((v.detach(), v.detach().flip(1))), is_grads_batched=True
        )
        return [("y", y), ("explanation", both[0]), ("explanation of another", both[1])]
    g = dau_conv2d_transpose(x, v, *parameters, **options)
    return [
        ("G", g),
        *zip([n for n, _ in named], torch.autograd.grad(g, [t for _, t in named], u.detach()), strict=True),
    ]


def tolerances(case, what, precision):
    if what == "layer":
        sizes = Sizes(case, case.x, case.x, case.v, precision)
        return dict(y=sizes.y, x=sizes.through_z + sizes.direct, B=sizes.B, A=sizes.A, b=sizes.b)
    if what == "explanation":
        first, second = (Sizes(case, case.x, case.x, v, precision) for v in (case.v, case.v.flip(1)))
        return {"y": first.y, "explanation": first.direct, "explanation of another": second.direct}
    sizes = Sizes(case, case.x, case.u, case.v, precision)
    return dict(G=sizes.direct, x=sizes.through_z, v=sizes.y, B=sizes.B, A=sizes.A, b=sizes.b)


@dataclasses.dataclass
class Found:
    """What was tried: numbers, and the largest error as a share of what is allowed."""

    layers: int = 0
    numbers: int = 0
    left_out: int = 0  # truth beyond the largest number of the dtype
    worst: float = 0.0

    def add(self, other):
        self.layers, self.numbers, self.left_out = (
            self.layers + other.layers,
            self.numbers + other.numbers,
            self.left_out + other.left_out,
        )
        self.worst = max(self.worst, other.worst)


def check(case, backend, whats=WHATS):
    """Every number of every result within its tolerance; AssertionError names the worst."""
    dtype = case.x.dtype
    precision, info = Precision.of(backend, dtype), torch.finfo(dtype)
    tensors = (case.x, case.u, case.v, *case.parameters)
    exact = tuple(None if t is None else t.double() for t in tensors)
    found = Found(layers=1)
    for what in whats:
        allowed = tolerances(case, what, precision)
        truths = results(case, "reference", exact, what)
        for (name, ours), (_, truth) in zip(results(case, backend, tensors, what), truths, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == truth.shape
            ours, truth, bound = ours.detach().double(), truth.detach(), allowed[name]
            assert bound.shape == truth.shape, (name, bound.shape, truth.shape)
            assert torch.isfinite(bound).all()
            bound = bound + info.eps * (truth.abs() + bound) + info.tiny * info.eps  # the last rounding
            known = truth.abs() + bound < info.max / 1e3
            found.numbers, found.left_out = (
                found.numbers + int(known.sum()),
                found.left_out + int((~known).sum()),
            )
            share = torch.where(known, (ours - truth).abs() / bound, 0).nan_to_num(nan=math.inf)
            if share.numel():
                where = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
                found.worst = max(found.worst, float(share.max()))
                assert found.worst <= 1, (
                    f"{case}; {what}, {name} at {where}: {ours[where]:.9g}, expected {truth[where]:.9g} "
                    f"within {bound[where]:.1e}"
                )
    return found


# -- tests
# ------------------------------------------------------------------------------------------------------------

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factored(dtype, kind):
    for seed in range(10):
        for generates in (True, False):
            with weights_made(generates):
                check(make(seed, kind, dtype), "factored")


def weights_made(generates):
    """Makes the factored backend go forward by w itself or by contraction and norm, whichever of the two
    it would choose.
    """
    return mock.patch.object(factored_layer.Layer, "_worth_generating", return_value=generates)


def as_on_a_gpu(monkeypatch):
    """The factored backend's other norm, by a triangular factor, which it takes where looking at numbers
    would have to wait for them.
    """
    monkeypatch.setattr(
        factored_layer.Layer, "_norm", lambda self, scratch: factored_norm.Triangle(self.generate, self.bias)
    )
    monkeypatch.setattr(factored_layer.Layer, "_worth_generating", lambda self, pixels: False)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_factored_as_on_a_gpu(dtype, kind, monkeypatch):
    as_on_a_gpu(monkeypatch)
    for seed in range(10):
        check(make(seed, kind, dtype), "factored")


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels(dtype, kind):
    """One of the three passes of one layer each: Triton's interpreter is slow."""
    seed = KINDS.index(kind)
    check(make(seed, kind, dtype), "triton", WHATS[seed % 3 :][:1])


@pytest.mark.skipif(
    "CODA_FAST_EXTREMES" not in os.environ,
    reason="a longer run, for as many seconds as CODA_FAST_EXTREMES says",
)
def test_longer():
    """Layers that no other test tries. Prints for every backend, dtype and kind: layers, numbers, worst
    error as a share of the allowed.
    """
    seconds, lost = float(os.environ["CODA_FAST_EXTREMES"]), []
    plan = [("factored", t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    plan += [("triton", t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    totals = {(*which, kind): Found() for which in plan for kind in KINDS}
    start, seed = time.monotonic(), 1000
    while time.monotonic() - start < seconds:
        for (backend, dtype, kind), total in totals.items():
            for i in range(8 if backend == "factored" else 1):
                case = make(seed + i, kind, dtype)
                try:
                    with weights_made(i % 2 == 0):
                        total.add(
                            check(case, backend, WHATS if backend == "factored" else [WHATS[seed // 8 % 3]])
                        )
                except AssertionError as error:
                    lost.append(f"{backend}: {error}")
        seed += 8
    print(f"\n\n| | {' | '.join(f'{b}, {str(d)[6:]}' for b, d in plan)} |\n|---|{'---|' * len(plan)}")
    for kind in KINDS:
        cells = [totals[(*which, kind)] for which in plan]
        print(f"| {kind} | " + " | ".join(f"{c.layers}, {c.numbers}, {c.worst:.2f}" for c in cells) + " |")
    print(
        f"lost: {len(lost)}; truth beyond the dtype, not compared: {sum(t.left_out for t in totals.values())}"
    )
    assert not lost, "\n".join(lost[:20])


# -- NaN and infinity
# ------------------------------------------------------------------------------------------------------------


def spoil(case, seed):
    """The tensors of ``check`` with NaN or infinity in one number of one of them."""
    draw = random.Random(seed)
    tensors = [None if t is None else t.clone() for t in (case.x, case.u, case.v, *case.parameters)]
    name, tensor = draw.choice([(n, t) for n, t in zip("xuvBAb", tensors, strict=True) if t is not None])
    where = tuple(draw.randrange(size) for size in tensor.shape)
    tensor[where] = value = draw.choice((math.nan, math.inf, -math.inf))
    return tensors, f"{value} in {name} at {where}"


def check_not_finite(case, backend, seed, whats):
    """Results are not finite exactly where those of the definition are not; what is finite has the bits
    that it has without the NaN.
    """
    tensors, told = spoil(case, seed)
    exact = [None if t is None else t.double() for t in tensors]
    for what in whats:
        clean = results(case, backend, (case.x, case.u, case.v, *case.parameters), what)
        spoilt, truth = results(case, backend, tensors, what), results(case, "reference", exact, what)
        for (name, ours), (_, expected), (_, before) in zip(spoilt, truth, clean, strict=True):
            finite = expected.isfinite()
            assert torch.equal(ours.isfinite(), finite), (
                f"{case}; {told}: {what}, {name}: {ours}, expected {expected}"
            )
            assert torch.equal(ours[finite], before[finite]), (
                f"{case}; {told}: {what}, {name}: {ours}, without it {before}"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_not_finite(dtype):
    for seed in range(40):
        with weights_made(seed % 2 == 0):
            check_not_finite(make(seed, "ordinary", dtype), "factored", seed, WHATS)


@pytest.mark.parametrize("seed", range(6))
def test_not_finite_in_kernels(seed):
    check_not_finite(
        make(seed, "ordinary", (torch.float32, torch.bfloat16)[seed % 2]),
        "triton",
        seed,
        WHATS[seed % 3 :][:1],
    )


# -- what was found: single faults, and whether they would be found again
# -----------------------------------------------------------------

ALL_BACKENDS = pytest.mark.parametrize("backend", ["reference", "factored", "triton"])


def layer(dtype=torch.float32, batch=2, size=4):
    """[x, B, A, b] of more than 64 numbers a patch, of which the fused kernels contract A with z and need
    a factor for the norm.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = (batch, 8, size, size), (3, 8, 3, 3), (2, 3, 8, 3, 3), (2, 8, 3, 3)
    x, *parameters = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype) for t in (x, *(p / 8 for p in parameters))]


def truth(function, tensors, **options):
    return function(*(t if t is None else t.double() for t in tensors), **options, backend="reference")


@ALL_BACKENDS
@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_images_of_1e_30(norm, backend):
    """<w, u> is bounded by |w| |u|, but |u|^2 is 0 in float32."""
    x, *parameters = layer()
    y = dau_conv2d(x * 1e-30, *parameters, norm=norm, backend=backend)
    assert_close(y, truth(dau_conv2d, [x * 1e-30, *parameters], norm=norm), 2e-6)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-8), (torch.bfloat16, 1e-4)], ids=str)
@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_a_rank_that_the_norm_needs_is_far_shorter_than_the_others(backend, dtype, share):
    """The others have 0 in z. The norm's factor was exact for the longest row alone: |w| came out 12 times
    too long, or as 0.
    """
    x, reduce, weight, bias = layer(dtype)
    reduce[1:], weight[:, 0], bias[:] = 0, weight[:, 0] * share, 0
    y = dau_conv2d(x, reduce, weight, bias, norm="l2", eps=1e-12, backend=backend)
    assert_close(
        y,
        truth(dau_conv2d, [x, reduce, weight, bias], norm="l2", eps=1e-12),
        2e-2 if dtype == torch.bfloat16 else 2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_a_bias_far_longer_than_the_other_rows_on_a_black_image(backend, dtype):
    """b over the longest row of A, times 2^40 for z = 0, and squared: NaN in the fused kernels."""
    x, reduce, weight, bias = layer(dtype)
    bias = weight[:, 0] * 8
    value = torch.ones(2, 2, 2, 2, dtype=dtype)
    tensors = [x * 0, value, reduce, weight * 1e-9, bias]
    assert_close(dau_conv2d_transpose(*tensors, backend=backend), truth(dau_conv2d_transpose, tensors), 1e-2)


@ALL_BACKENDS
def test_huge_images_and_no_weight(backend):
    """w = 0 gives 0 where |x|^2 overflows."""
    x, reduce, weight, bias = layer()
    assert (dau_conv2d(x * 1e25, reduce, weight * 0, bias * 0, backend=backend) == 0).all()


@ALL_BACKENDS
@pytest.mark.parametrize(
    ("dtype", "norm"), [(torch.float32, "squash"), (torch.float32, "l2"), (torch.bfloat16, "l2")], ids=str
)
def test_the_range_that_is_promised(dtype, norm, backend):
    """|w| up to 1e18 is right, whether images or parameters are large; where its square overflows the
    answer is NaN, not 0.
    """
    x, reduce, weight, bias = layer(dtype, batch=1, size=3)
    for tensors in ([x * 1e18, reduce, weight, bias], [x, reduce, weight * 1e18, bias]):
        y = dau_conv2d(*tensors, norm=norm, backend=backend)
        assert_close(y, truth(dau_conv2d, tensors, norm=norm), 1e-5 if dtype.itemsize == 4 else 5e-2)
    for tensors in ([x * 1e22, reduce, weight, bias], [x * 1e-3, reduce, weight * 1e25, bias]):
        assert dau_conv2d(*tensors, norm=norm, backend=backend).isnan().all()
    value = torch.ones(1, 2, 1, 1, dtype=dtype)
    assert (
        dau_conv2d_transpose(x * 1e-3, value, reduce, weight * 1e25, bias, norm=norm, backend=backend)
        .isnan()
        .all()
    )


def check_far_apart():
    """w is 1e-3, z is 1e18 and the squares of A below the least number."""
    x, reduce, weight, _ = layer()
    tensors = [x * 1e18, reduce, weight * 3e-22, None]
    for generates in (True, False):
        with weights_made(generates):
            assert_close(dau_conv2d(*tensors, backend="factored"), truth(dau_conv2d, tensors), 2e-6)


def test_parameters_whose_squares_are_lost(monkeypatch):
    check_far_apart()
    monkeypatch.setattr(factored_norm, "FLUSHED", 0.0)
    with pytest.raises(AssertionError, match="allowed"):
        check_far_apart()


def try_all(generates, dtype=torch.float32):
    for kind in KINDS:
        for seed in range(10):
            with weights_made(generates):
                check(make(seed, kind, dtype), "factored")


def no_norm_term(original):
    def wrong(self, grad, dot, square):
        gs, t = original(self, grad, dot, square)
        return gs, t * 0

    return wrong


def jitter_of_the_longest_row(original):
    def wrong(rows):
        gram = rows.double() @ rows.double().mT
        gram.diagonal(dim1=1, dim2=2).add_(
            1e-14 * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + 1e-300
        )
        return torch.linalg.cholesky_ex(gram, upper=True)[0].float().contiguous()

    return wrong


def one_number(index, share):
    """The last one of one of the gradients (dx, du, dB, dA, db)."""

    def fault(original):
        def wrong(*args, **options):
            gradients = original(*args, **options)
            if gradients[index] is not None:
                gradients[index][(-1,) * gradients[index].dim()].mul_(1 + share)
            return gradients

        return wrong

    return fault


def a_little_more(function):
    return lambda *args: function(*args) * (1 + 1e-4)


def a_little_more_of_w(original):
    def wrong(*args):
        for units, w in original(*args):
            yield units, w.mul_(1 + 1e-4)

    return wrong


def zero(original):
    return 0.0


FAULTS_WHERE_W_IS_MADE = {
    "1e-4 of w": (factored_layer.Layer, "_weights", a_little_more_of_w),
    "1e-4 of z": (matrices, "product", a_little_more),
    "weights of numbers below 1e-25 are 0": (
        windows.Windows,
        "gather",
        lambda f: lambda *a: F.hardshrink(f(*a), 1e-25),
    ),
}


FAULTS = {
    "no term from the norm": (factored_layer.Layer, "_grad_factors", no_norm_term),
    "numbers below 1e-25 are 0": (windows.Windows, "gather", lambda f: lambda *a: F.hardshrink(f(*a), 1e-25)),
    "a norm that cancels": (factored_norm, "CANCELLED", zero),
    "1e-4 of |w|^2": (factored_norm.Gram, "square", a_little_more),
    "1e-4 of every product": (matrices, "product", a_little_more),
    "1e-4 of one number of dx": (factored, "align_backward", one_number(0, 1e-4)),
    "1e-4 of one number of dB": (factored, "align_backward", one_number(2, 1e-4)),
    "1e-4 of one number of dA": (factored, "align_backward", one_number(3, 1e-4)),
    "1e-4 of one number of db": (factored, "align_backward", one_number(4, 1e-4)),
}


FAULTS_ON_A_GPU = {
    "Cauchy-Schwarz with squares that are 0": (factored_norm, "flushed_length", lambda f: lambda *a: 0.0),
    "a jitter of the longest row": (factored_norm, "norm_factor", jitter_of_the_longest_row),
    "1e-4 of |w|^2, on a GPU": (factored_norm.Triangle, "square", a_little_more),
}


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_WHERE_W_IS_MADE, *FAULTS_ON_A_GPU])
def test_faults_are_found(fault, monkeypatch):
    """The tolerances, against faults put in on purpose: the layers of `test_factored` in float32 show each
    of them.
    """
    if fault in FAULTS_ON_A_GPU:
        as_on_a_gpu(monkeypatch)
    owner, name, broken = (FAULTS | FAULTS_WHERE_W_IS_MADE | FAULTS_ON_A_GPU)[fault]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(AssertionError, match="expected"):
        try_all(generates=fault in FAULTS_WHERE_W_IS_MADE)
