"""Inputs, modes (forward, backward, explanation) and float64 truth of a layer, for any implementation, and
the ceilings that no layer exceeds: a matrix product and a copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from bench.cases import EXPLANATION, FORWARD, PRODUCTS, Layer
from bench.peers import materialising
from coda_fast import DAUConv2d


@functools.lru_cache(maxsize=1)  # the same tensors for all providers of a case, made once
def layer_inputs(case: Layer, dtype: torch.dtype, device: torch.device) -> list[tuple]:
    """Sets of (x, B, A, b, upstream gradient) that share their parameters: at least 2, and as many as it
    takes to exceed the cache. Images are channels last on a GPU, which cuDNN prefers, and contiguous on a
    CPU, where this is faster for every peer.
    """
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    module = DAUConv2d(case.channels, case.units, case.kernel, case.stride, case.padding, rank=case.rank)
    # Parameters and not plain tensors, which would be copied into a CUDA graph at each call, unlike the
    # weights of a network
    parameters = [
        torch.nn.Parameter(p.detach().to(device, dtype))
        for p in (module.reduction_weight, module.weight, module.bias)
    ]
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    side = math.isqrt(case.pixels // case.batch)
    shapes = ((case.batch, case.channels, case.size, case.size), (case.batch, case.units, side, side))
    sets = []
    for _ in range(rotation(math.prod(shapes[0]) * dtype.itemsize, device)):
        made = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
        x, upstream = (t.contiguous(memory_format=layout) for t in made)
        sets.append((x.requires_grad_(), *parameters, upstream))
    return sets


def rotation(nbytes: int, device: torch.device) -> int:
    """How many inputs of this size exceed twice the L2 cache of a GPU, from 2 to 64."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, -(-2 * cache // max(1, nbytes))))


def setup(
    layer: Callable, case: Layer, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[list, Callable]:
    """Inputs and function of a layer that is computed by ``layer(x, B, A, b, stride, padding, detach)``."""
    geometry = (case.stride, case.padding)

    def forward(x, B, A, b, upstream):
        with torch.no_grad():
            return [layer(x, B, A, b, *geometry)]

    def training(x, B, A, b, upstream):
        y = layer(x, B, A, b, *geometry)
        return [y, *torch.autograd.grad(y, [x, B, A, b], upstream)]

    def explanation(x, B, A, b, upstream):
        y = layer(x, B, A, b, *geometry, True)
        return [y, *torch.autograd.grad(y, [x], upstream)]

    inputs = layer_inputs(case, dtype, device)
    # a compiled backward would compute the gradients of the parameters although they are not needed
    if mode == EXPLANATION:
        frozen = [torch.nn.Parameter(p.detach(), requires_grad=False) for p in inputs[0][1:4]]
        inputs = [(x, *frozen, upstream) for x, _, _, _, upstream in inputs]
    return inputs, forward if mode == FORWARD else explanation if mode == EXPLANATION else training


def layer_truth(case: Layer, mode: str, inputs: tuple, limit: int = 1 << 30) -> list[torch.Tensor]:
    """The results of the materialising formula in float64 for these inputs, computed for a few images at a
    time, so that w stays below ``limit`` bytes.
    """
    tensors = [t.detach().double() for t in inputs]
    limit = 4 * limit if tensors[0].is_cuda else limit
    step = max(1, limit // (8 * case.units * case.depth * (case.pixels // case.batch)))
    _, function = setup(materialising, case, mode, torch.float64, tensors[0].device)
    parts = []
    for start in range(0, case.batch, step):
        x, B, A, b, upstream = tensors
        piece = slice(start, start + step)
        leaves = [t.detach().requires_grad_() for t in (x[piece], B, A, b)]
        parts.append([t.detach() for t in function(*leaves, upstream[piece])])
    # y and dx are separate for each image, gradients of parameters are sums over the images
    by_image = len(parts[0]) if len(parts[0]) <= 2 else 2
    return [
        torch.cat(p) if i < by_image else torch.stack(p).sum(0)
        for i, p in enumerate(zip(*parts, strict=True))
    ]


def product(case: Layer, mode: str, dtype: torch.dtype, device: torch.device) -> tuple[list, Callable]:
    """The ceiling: the plain matrix products that the mode needs at least (PRODUCTS): [P, d] x [d, n r]
    forward, [P, n r] x [n r, d] for dx, [n r, P] x [P, d] for dA. The first writes n r numbers per pixel,
    which a fused layer does not.
    """
    generator = torch.Generator(device).manual_seed(0)
    # libraries are far slower where rows are not aligned to 16 bytes, which is no limit of the hardware
    depth = -(-case.depth // 8) * 8 if device.type == "cuda" else case.depth
    wide = case.units * case.rank
    random = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
    inputs = [
        (random(case.pixels, depth),) for _ in range(rotation(case.pixels * depth * dtype.itemsize, device))
    ]
    weights, out, dx, dweights = (
        random(wide, depth),
        random(case.pixels, wide),
        torch.empty_like(inputs[0][0]),
        random(wide, depth),
    )

    def products(x):
        torch.mm(x, weights.t(), out=out)
        if PRODUCTS[mode] > 1:
            torch.mm(out, weights, out=dx)
        if PRODUCTS[mode] > 2:
            torch.mm(out.t(), x, out=dweights)
        return []

    return inputs, products


def copy(nbytes: int, device: torch.device) -> tuple[list, Callable]:
    """The other ceiling: a copy of that many bytes within the device."""
    inputs = [
        tuple(torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(2)
    ]
    return inputs, lambda source, target: [target.copy_(source)][:0]
