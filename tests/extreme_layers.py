"""Random layers whose numbers lie at the limits of floating point, for ``test_extremes.py``."""

import dataclasses
import math
import random
from typing import Any

import torch

from coda_fast._geometry import Geometry
from coda_fast._spec import Spec
from coda_fast.backends import reference

ORDINARY = "ordinary"
INPUTS = "images from 1e-30 to 1e18"
PIXELS = "pixels of any two sizes, or zero"
CHANNELS = "channels of any two sizes, or zero"
PARAMETERS = "parameters from 1e-16 to 1e16"
ZEROS = "zeros in parameters, units with w = 0"
CANCELS = "w that nearly cancels"
EPS = "|w| around eps"
UPSTREAM = "upstream gradients from 1e-20 to 1e20, or zero"
KINDS = (INPUTS, PIXELS, CHANNELS, PARAMETERS, ZEROS, CANCELS, EPS, UPSTREAM)
LARGEST_LENGTH = 1e18  # of w: its square still fits into float32


@dataclasses.dataclass
class Case:
    """A layer to try; all tensors have the dtype under test."""

    kind: str
    seed: int
    x: torch.Tensor
    u: torch.Tensor  # shaped like x: the upstream gradient of the adjoint
    v: torch.Tensor  # shaped like y: the upstream gradient of the layer, the argument of the adjoint
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


@dataclasses.dataclass
class Draft:
    """A layer in float64 before it is cast, and the two generators that its random numbers come from."""

    dtype: torch.dtype
    draw: random.Random
    generator: torch.Generator
    options: dict[str, Any]
    geometry: Geometry
    x: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    reduce: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def narrow(self):
        return self.dtype == torch.float16

    @property
    def parameters(self):
        return self.reduce, self.weight, self.bias

    def power(self, low, high):
        """A random factor from 10^low to 10^high, or from 1e-1 to 1e1 in float16."""
        return 10.0 ** (self.draw.uniform(-1, 1) if self.narrow else self.draw.uniform(low, high))

    def mask(self, *shape, share=0.5):
        return torch.rand(shape, generator=self.generator) < share

    def round(self, tensor):
        """The tensor in float64, rounded to the dtype under test."""
        return None if tensor is None else tensor.to(self.dtype).double()


def make(seed, kind, dtype):
    """A random layer of a kind. In float16 only factors from 1e-1 to 1e1 are tried: the kernels keep z, gs
    and t in float16, where larger ones do not fit.
    """
    draft = draft_layer(seed, kind, dtype)
    if kind != ORDINARY:
        CHANGES[kind](draft)
    limit_weights(draft)
    return cast(draft, kind, seed)


# -- parts of make
# ------------------------------------------------------------------------------------------------------------


def draft_geometry(draw):
    """The geometry of a random layer, and (height, width) of its images."""
    kernel, stride, dilation = ((draw.randint(1, 3), draw.randint(1, 3)) for _ in range(3))
    dilation = tuple(min(2, d) for d in dilation)
    padding = (draw.randint(0, 2), draw.randint(0, 2))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw.choice((0, 0, 1, 3))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return dict(stride=stride, padding=padding, dilation=dilation), kernel, size


def draft_layer(seed, kind, dtype):
    """A layer of random shape and options, with normally distributed images and |w| of order one."""
    draw, generator = random.Random(f"{kind} {seed}"), torch.Generator()
    generator.manual_seed(draw.getrandbits(32))
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    window_options, kernel, size = draft_geometry(draw)
    batch, channels, units, rank = (draw.randint(1, most) for most in (2, 5, 4, 5))
    if draw.random() < 0.4:
        # the fused kernels use another algorithm for patches of more than 64 numbers
        channels = 64 // math.prod(kernel) + draw.randint(1, 3)
    window = (channels, *kernel)
    d = math.prod(window)
    norm, eps = draw.choice(("squash", "l2")), draw.choice((1e-6, 1e-3, 1e-12))
    if dtype == torch.float16:
        # inside the kernels, gradients have a factor 1 / |w|^2, which must fit into float16
        # (docs/kernels.md)
        eps = 3e-1
    x, u = randn(batch, channels, *size), randn(batch, channels, *size)
    reduce = randn(rank, *window) / d**0.5
    weight = randn(units, rank, *window) / (rank * d) ** 0.5
    bias = randn(units, *window) / d**0.5
    bias = draw.choice((bias, torch.zeros_like(bias), None))
    geometry = Geometry.make(kernel, *window_options.values())
    v = randn(batch, units, *geometry.output_size(*size))
    options = window_options | dict(norm=norm, eps=eps)
    return Draft(dtype, draw, generator, options, geometry, x, u, v, reduce, weight, bias)


def change_inputs(draft):
    draft.x, draft.u = draft.x * draft.power(-30, 18), draft.u * draft.power(-30, 18)


def change_pixels(draft):
    power, choice = draft.power, draft.draw.choice
    mask = draft.mask(len(draft.x), 1, *draft.x.shape[2:])
    draft.x = draft.x * torch.where(mask, power(-30, 18), choice((0, 1, power(-30, 18))))
    draft.u = draft.u * torch.where(mask.roll(1, 3), power(-30, 18), choice((0, 1)))


def change_channels(draft):
    power, choice = draft.power, draft.draw.choice
    mask = draft.mask(1, draft.x.shape[1], 1, 1)
    draft.x = draft.x * torch.where(mask, power(-30, 18), choice((0, 1, power(-30, 18))))
    draft.u = draft.u * torch.where(mask, power(-30, 18), choice((0, 1)))


def change_parameters(draft):
    draft.reduce, draft.weight, draft.bias = (
        None if t is None else t * draft.power(-16, 16) for t in draft.parameters
    )
    draft.x = draft.x * draft.power(-2, 2)
    if draft.draw.random() < 0.5:  # each rank has a size of its own
        rank = len(draft.reduce)
        sizes = torch.tensor([draft.power(-16, 16) for _ in range(rank)]).double()
        draft.weight = draft.weight / draft.weight.abs().max() * sizes.view(1, rank, 1, 1, 1)


def change_zeros(draft):
    draw, (reduce, weight, bias) = draft.draw, draft.parameters
    for t in (reduce, weight, bias):
        if t is not None:
            t[draft.mask(*t.shape, share=draw.choice((0.1, 0.5)))] = 0
    what = draw.randint(0, 4)
    if what == 0 and bias is not None:
        bias[0] = 0
    if what in (0, 1):
        weight[0] = 0
    elif what == 2:
        reduce[draw.randrange(len(reduce))] = 0
    elif what == 3:
        reduce.zero_()
    draft.x = draft.x * draft.power(-3, 3)


def change_cancels(draft):
    """The bias is nearly the opposite of A z at one position of the first image."""
    draft.x = draft.x * draft.power(-3, 3)
    column = draft.draw.randrange(math.prod(draft.geometry.output_size(*draft.x.shape[2:])))
    draft.x, draft.reduce, draft.weight = (draft.round(t) for t in (draft.x, draft.reduce, draft.weight))
    z = reference._rows(reference._reduce(draft.x, draft.reduce, draft.geometry))[0, :, column]
    opposite = -torch.einsum("ok...,k->o...", draft.weight, z)
    draft.bias = opposite * draft.draw.choice((1, 1, 0.999, 1 + 1e-6))


def change_eps(draft):
    """The norm is "l2", and eps is near the median of |w|."""
    draft.options["norm"], draft.x = "l2", draft.x * draft.power(-4, 4)
    draft.x, draft.reduce, draft.weight, draft.bias = (draft.round(t) for t in (draft.x, *draft.parameters))
    w = reference._weight(draft.x, draft.parameters, Spec(draft.geometry, "l2", 1.0))[0]
    median = float(reference._length(w).median())
    if not draft.narrow and median > 1e-12:
        draft.options["eps"] = median * draft.draw.choice((1, 1.001, 0.999, 10, 0.1))


def change_upstream(draft):
    mask = draft.mask(*draft.v.shape, share=0.3)
    draft.v = draft.v * torch.where(mask, draft.draw.choice((0, 1)), draft.power(-20, 20))


CHANGES = {
    INPUTS: change_inputs,
    PIXELS: change_pixels,
    CHANNELS: change_channels,
    PARAMETERS: change_parameters,
    ZEROS: change_zeros,
    CANCELS: change_cancels,
    EPS: change_eps,
    UPSTREAM: change_upstream,
}


def limit_weights(draft):
    """Scale the images down until |w|, and the terms that it is a sum of, are at most LARGEST_LENGTH."""
    z = reference._reduce(draft.x.abs(), draft.reduce.abs(), draft.geometry)
    most = float(reference._generate(z, draft.weight.abs(), None).square().sum(2).sqrt().max())
    if not draft.narrow and most > LARGEST_LENGTH:
        draft.x = draft.x * (LARGEST_LENGTH / most)


def cast(draft, kind, seed):
    """The draft in the dtype under test, its images in a random memory format."""
    layout = draft.draw.choice((torch.contiguous_format, torch.channels_last))
    x, u, v = (t.to(draft.dtype).contiguous(memory_format=layout) for t in (draft.x, draft.u, draft.v))
    parameters = [None if t is None else t.to(draft.dtype) for t in draft.parameters]
    return Case(kind, seed, x, u, v, parameters, draft.options)


# -- NaN and infinity
# ------------------------------------------------------------------------------------------------------------


def spoil(case, seed):
    """The tensors of the layer with NaN or infinity in one number of one of them, and what was changed."""
    draw = random.Random(seed)
    tensors = [None if t is None else t.clone() for t in (case.x, case.u, case.v, *case.parameters)]
    name, tensor = draw.choice([(n, t) for n, t in zip("xuvBAb", tensors, strict=True) if t is not None])
    where = tuple(draw.randrange(size) for size in tensor.shape)
    tensor[where] = value = draw.choice((math.nan, math.inf, -math.inf))
    return tensors, f"{value} in {name} at {where}"
