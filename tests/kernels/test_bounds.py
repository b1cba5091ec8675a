"""Nothing is read or written beside what is allocated, and nothing that nobody wrote has a part in a result.

Every tensor that the launchers allocate and every tensor that they are given lies between red zones: bytes 0xFF, NaN in every floating
dtype and -1 in the table of starts. Results must have the bits that they have without, and the zones be as they were. A load that a mask
holds back is not seen, here or on a GPU; nor are alignment, the width of an index in hardware, and what runs at once.
"""

import functools

import pytest
import torch
from support import random_layer
from support_kernels import DEVICE

from coda_fast._geometry import Geometry
from coda_fast.backends import triton as backend
from coda_fast.functional import dau_conv2d
from coda_kernels import backward_weight, config, layer
from coda_kernels.compile import recording

ZONE = 1 << 15  # bytes on either side, a multiple of every alignment
KEYS = ("channels", "units", "rank", "kernel", "size", "batch", "stride", "padding", "dilation", "bias", "dtype", "norm", "keep", "form")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "one of each": (1, 1, 1, (1, 1), (1, 1), 1, (1, 1), (0, 0), (1, 1), False, f32, "squash", "products", "sliced"),
    "one pixel, all padding": (3, 2, 5, (3, 3), (1, 1), 2, (2, 2), (1, 1), (1, 1), True, f16, "squash", "products", "contiguous"),
    "odd everything": (9, 5, 7, (3, 2), (7, 6), 2, (2, 3), (0, 2), (2, 1), True, bf16, "squash", "products", "sliced"),
    "a unit past a block": (6, 17, 17, (3, 1), (3, 3), 1, (1, 1), (1, 0), (1, 1), True, f16, "l2", "contraction", "last"),
    "the image is the canvas": (8, 16, 16, (1, 1), (5, 3), 3, (1, 1), (0, 0), (1, 1), True, bf16, "squash", "products", "last"),
    "patch past a block": (33, 3, 20, (2, 1), (5, 4), 1, (3, 1), (1, 0), (1, 2), False, f32, "l2", "contraction", "sliced last"),
    "generated": (7, 2, 130, (2, 1), (3, 2), 2, (2, 1), (1, 1), (1, 1), True, f16, "squash", "products", "sliced last"),
    "rank past 256": (3, 1, 257, (1, 1), (2, 3), 1, (1, 1), (1, 0), (1, 1), False, bf16, "squash", "products", "contiguous"),
    "stride past the image": (4, 3, 2, (1, 2), (3, 5), 2, (7, 6), (0, 1), (1, 1), True, f32, "squash", "products", "expanded"),
}  # fmt: skip


class Zones:
    """Allocations between red zones."""

    def __init__(self):
        self.found = []

    def place(self, shape, strides, dtype, fill=0xFF):
        """A tensor of that shape and those strides, all bytes ``fill``."""
        size = torch.empty(0, dtype=dtype).element_size()
        extent = size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) if all(shape) else 0
        inside = -(-extent // 16) * 16
        memory = torch.zeros(2 * ZONE + inside, dtype=torch.uint8, device=DEVICE).fill_(0xFF)
        memory[ZONE : ZONE + extent] = fill
        self.found.append((memory, ZONE + extent))
        return memory.view(dtype).as_strided(shape, strides, ZONE // size)

    def copy(self, tensor, strides=None):
        """The same numbers between zones, and NaN in the gaps that the strides leave."""
        return refilled(self.place(tensor.shape, tensor.stride() if strides is None else strides, tensor.dtype), tensor)

    def untouched(self):
        return all((memory[:ZONE] == 0xFF).all() and (memory[end:] == 0xFF).all() for memory, end in self.found)


def refilled(placed, tensor):
    """``placed`` with the numbers of ``tensor``; where images are one and the same, that of the first."""
    (placed if placed.stride(0) else placed[:1]).copy_(tensor if placed.stride(0) else tensor[:1])
    return placed


def plainly(tensor, strides=None):
    """The same numbers in those strides, between whatever there is, zeros in the gaps."""
    strides = tensor.stride() if strides is None else strides
    return refilled(torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=DEVICE).nan_to_num_(0), tensor)


class Allocator:
    """``torch`` for the launchers, whose allocations lie between red zones."""

    def __init__(self, zones):
        self.zones = zones

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype=f32, device=None, fill=0xFF):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return self.zones.place(shape, torch.empty(shape, device="meta").stride(), dtype, fill)

    def zeros(self, *shape, dtype=f32, device=None):
        return self.empty(*shape, dtype=dtype, fill=0)

    def empty_like(self, tensor, memory_format=torch.preserve_format):
        like = torch.empty_like(tensor, device="meta", memory_format=memory_format)
        return self.zones.place(like.shape, like.stride(), like.dtype)


def allocate_between(zones, monkeypatch):
    allocator, new_empty = Allocator(zones), torch.Tensor.new_empty

    def placed(tensor, *shape, dtype=None, device=None, **options):
        if device is not None or options or shape == (0,):  # the interpreter's own
            return new_empty(tensor, *shape, dtype=dtype, device=device, **options)
        return allocator.empty(*shape, dtype=dtype or tensor.dtype)

    monkeypatch.setattr(layer, "torch", allocator)
    monkeypatch.setattr(torch.Tensor, "new_empty", placed)


def image_strides(form, channels, height, width):
    """Strides of a batch of images: as they often are, or with gaps, none of which is a multiple of anything."""
    if form == "expanded":
        return (0, height * width, width, 1)
    if form == "last":
        return (channels * height * width, 1, channels * width, channels)
    if form == "sliced last":
        column, row = channels + 3, (channels + 3) * width + 5
        return (row * height + 1, 1, row, column)
    if form == "sliced":
        column, row = 2, 2 * width + 1
        return (3 * channels * row * height, row * height + 3, row, column)
    return (channels * height * width, height * width, width, 1)


def passes(case, place, applied=False):
    """Every pass of a layer, over tensors that ``place`` has copied: all that they give."""
    c = dict(zip(KEYS, case, strict=True))
    torch.manual_seed(3)
    parameters = random_layer(c["channels"], c["units"], c["rank"], c["kernel"], bias=c["bias"])
    parameters = [t if t is None else t.to(DEVICE, c["dtype"]) for t in parameters]
    geometry = Geometry.make(c["kernel"], c["stride"], c["padding"], c["dilation"])
    if "last" in c["form"]:
        parameters = [p if p is None else p.movedim(-3, -1).contiguous().movedim(-1, -3) for p in parameters]
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(DEVICE, c["dtype"])  # noqa: E731
    shape = (c["batch"], c["channels"], *c["size"])
    strides = image_strides(c["form"], *shape[1:])
    x, u = ((new(*shape) if strides[0] else new(1, *shape[1:]).expand(shape)) for _ in range(2))
    out = geometry.output_size(*c["size"])
    grad, upstream = (new(c["batch"], c["units"], *out) for _ in range(2))
    x, u, grad = place(x, strides), place(u, strides) if applied else None, place(grad, image_strides("sliced", c["units"], *out))
    upstream, parameters = place(upstream), [p if p is None else place(p) for p in parameters]
    given = [t for t in (x, u, grad, upstream, *parameters) if t is not None]
    before = [t.clone() for t in given]
    rest = (geometry, c["norm"], 1e-2)
    y, *kept = backend.align(x, u, *parameters, *rest, c["keep"])
    found = [y, *kept[:-1]]
    for needs in ((True,) * 5, (False, True, True, False, True)):
        found += backend.align_backward(grad, x, u, *parameters, *kept, *rest, False, needs)
    found += backend.align_backward(grad, x, u, *parameters, *kept[:-1], None, *rest, False, (True,) * 5)
    found += backend.align_backward(grad, x, u, *parameters, *kept, *rest, True, (True, True, False, False, False))
    found.append(backend.adjoint(x, upstream, *parameters, *rest))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an argument was written to"
    return [t for t in found if t is not None]


def check(case, monkeypatch, applied=False):
    plain = passes(case, plainly, applied)
    zones = Zones()
    with monkeypatch.context() as patch:
        allocate_between(zones, patch)
        found = passes(case, zones.copy, applied)
    assert len(zones.found) > 20
    for i, (a, b) in enumerate(zip(found, plain, strict=True)):
        assert a.isfinite().all(), f"result {i} is not finite"
        assert torch.equal(a, b), f"result {i} differs"
    assert zones.untouched(), "written beside an allocation"


def only(index, monkeypatch):
    """Every kernel has one tile, the first or the last."""
    candidates = config.candidates
    monkeypatch.setattr(config, "candidates", lambda *args: (candidates(*args)[index],))


@pytest.mark.parametrize("tile", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", CASES)
def test_red_zones(name, tile, monkeypatch):
    only(tile, monkeypatch)
    check(CASES[name], monkeypatch, applied=name in ("odd everything", "patch past a block"))
