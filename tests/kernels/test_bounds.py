"""The kernels do not read or write outside of allocations, and unwritten memory does not affect results.

Every tensor that the launchers allocate or receive lies between red zones: bytes 0xFF, which are NaN in every
floating dtype and -1 in the table of starts. Results must have the same bits as without red zones, and the
zones must not change. These tests cannot see masked loads, alignment, the width of an index in hardware, or
races.
"""

import functools

import pytest
import torch
from support import random_layer
from support_kernels import DEVICE

from coda_fast._geometry import Geometry
from coda_fast._spec import Gradients, Parameters, Spec
from coda_fast.backends import triton as backend
from coda_fast.functional import dau_conv2d
from coda_kernels import config, layer, parameter_sums
from coda_kernels.compile import recording

ZONE = 1 << 15  # bytes on either side, a multiple of every alignment
KEYS = (
    "channels",
    "units",
    "rank",
    "kernel",
    "size",
    "batch",
    "stride",
    "padding",
    "dilation",
    "bias",
    "dtype",
    "norm",
    "keep",
    "form",
)
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "one of each": (
        1,
        1,
        1,
        (1, 1),
        (1, 1),
        1,
        (1, 1),
        (0, 0),
        (1, 1),
        False,
        f32,
        "squash",
        "products",
        "sliced",
    ),
    "one pixel, all padding": (
        3,
        2,
        5,
        (3, 3),
        (1, 1),
        2,
        (2, 2),
        (1, 1),
        (1, 1),
        True,
        f16,
        "squash",
        "products",
        "contiguous",
    ),
    "odd everything": (
        9,
        5,
        7,
        (3, 2),
        (7, 6),
        2,
        (2, 3),
        (0, 2),
        (2, 1),
        True,
        bf16,
        "squash",
        "products",
        "sliced",
    ),
    "a unit past a block": (
        6,
        17,
        17,
        (3, 1),
        (3, 3),
        1,
        (1, 1),
        (1, 0),
        (1, 1),
        True,
        f16,
        "l2",
        "contraction",
        "last",
    ),
    "the image needs no padding": (
        8,
        16,
        16,
        (1, 1),
        (5, 3),
        3,
        (1, 1),
        (0, 0),
        (1, 1),
        True,
        bf16,
        "squash",
        "products",
        "last",
    ),
    "patch past a block": (
        33,
        3,
        20,
        (2, 1),
        (5, 4),
        1,
        (3, 1),
        (1, 0),
        (1, 2),
        False,
        f32,
        "l2",
        "contraction",
        "sliced last",
    ),
    "generated": (
        7,
        2,
        130,
        (2, 1),
        (3, 2),
        2,
        (2, 1),
        (1, 1),
        (1, 1),
        True,
        f16,
        "squash",
        "products",
        "sliced last",
    ),
    "stride past the image": (
        4,
        3,
        2,
        (1, 2),
        (3, 5),
        2,
        (7, 6),
        (0, 1),
        (1, 1),
        True,
        f32,
        "squash",
        "products",
        "expanded",
    ),
}


class Zones:
    """Allocations between red zones."""

    def __init__(self):
        self.found = []

    def place(self, shape, strides, dtype, fill=0xFF):
        """A tensor of that shape and those strides between red zones, with all bytes ``fill``."""
        size = torch.empty(0, dtype=dtype).element_size()
        extent = (
            size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) if all(shape) else 0
        )
        inside = -(-extent // 16) * 16
        memory = torch.zeros(2 * ZONE + inside, dtype=torch.uint8, device=DEVICE).fill_(0xFF)
        memory[ZONE : ZONE + extent] = fill
        self.found.append((memory, ZONE + extent))
        return memory.view(dtype).as_strided(shape, strides, ZONE // size)

    def copy(self, tensor, strides=None):
        """The same numbers between red zones, with NaN in the gaps that the strides leave."""
        return refilled(
            self.place(tensor.shape, tensor.stride() if strides is None else strides, tensor.dtype), tensor
        )

    def untouched(self):
        return all(
            (memory[:ZONE] == 0xFF).all() and (memory[end:] == 0xFF).all() for memory, end in self.found
        )


def refilled(placed, tensor):
    """``placed`` with the numbers of ``tensor``. Where all images share memory, it gets those of the first
    image.
    """
    (placed if placed.stride(0) else placed[:1]).copy_(tensor if placed.stride(0) else tensor[:1])
    return placed


def plainly(tensor, strides=None):
    """The same numbers in those strides, without red zones, and zeros in the gaps."""
    strides = tensor.stride() if strides is None else strides
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    return refilled(
        torch.zeros(extent, dtype=tensor.dtype, device=DEVICE).as_strided(tensor.shape, strides), tensor
    )


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
        if device is not None or options or shape == (0,):  # an allocation of the interpreter
            return new_empty(tensor, *shape, dtype=dtype, device=device, **options)
        return allocator.empty(*shape, dtype=dtype or tensor.dtype)

    for module in (backend, *config.modules()):
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", allocator)
    monkeypatch.setattr(torch.Tensor, "new_empty", placed)


def image_strides(form, channels, height, width):
    """Strides of a batch of images: common ones, or with gaps that are not multiples of any block size."""
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


EVERYTHING = Gradients(*[True] * 5)


def passes(case, place, applied=False):
    """All results of every pass of a layer, computed from tensors that ``place`` has copied."""
    c = dict(zip(KEYS, case, strict=True))
    torch.manual_seed(3)
    parameters = random_layer(c["channels"], c["units"], c["rank"], c["kernel"], bias=c["bias"])
    parameters = [t if t is None else t.to(DEVICE, c["dtype"]) for t in parameters]
    geometry = Geometry.make(c["kernel"], c["stride"], c["padding"], c["dilation"])
    if "last" in c["form"]:
        parameters = [p if p is None else p.movedim(-3, -1).contiguous().movedim(-1, -3) for p in parameters]
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(DEVICE, c["dtype"])
    shape = (c["batch"], c["channels"], *c["size"])
    strides = image_strides(c["form"], *shape[1:])
    x, u = ((new(*shape) if strides[0] else new(1, *shape[1:]).expand(shape)) for _ in range(2))
    out = geometry.output_size(*c["size"])
    grad, upstream = (new(c["batch"], c["units"], *out) for _ in range(2))
    x, u, grad = (
        place(x, strides),
        place(u, strides) if applied else None,
        place(grad, image_strides("sliced", c["units"], *out)),
    )
    upstream, parameters = place(upstream), [p if p is None else place(p) for p in parameters]
    given = [t for t in (x, u, grad, upstream, *parameters) if t is not None]
    before = [t.clone() for t in given]
    parameters, spec = Parameters(*parameters), Spec(geometry, c["norm"], 1e-2)
    y, kept = backend.align(x, u, parameters, spec, keep=c["keep"])
    backward = functools.partial(backend.align_backward, grad, x, u, parameters)
    found = [y, *kept[:-1]]
    for needs in (EVERYTHING, Gradients(False, True, True, False, True)):
        found += backward(kept, spec, detach=False, needs=needs)
    found += backward(kept._replace(prepared=None), spec, detach=False, needs=EVERYTHING)
    found += backward(kept, spec, detach=True, needs=Gradients(True, True, False, False, False))
    found.append(backend.adjoint(x, upstream, parameters, spec))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an argument was changed"
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
    assert zones.untouched(), "written outside of an allocation"


def only(index, monkeypatch):
    """Give every kernel one tile, the first or the last."""
    candidates = config.candidates
    monkeypatch.setattr(config, "candidates", lambda *args: (candidates(*args)[index],))


def _cases():
    """Each case with the first and the last tile; the long ones are slow."""
    for i, name in enumerate(CASES):
        for tile, which in ((0, "first"), (-1, "last")):
            long = i >= 3 or (name == "generated" and which == "last")
            yield pytest.param(name, tile, id=f"{name}-{which}", marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize(("name", "tile"), _cases())
def test_red_zones(name, tile, monkeypatch):
    only(tile, monkeypatch)
    check(CASES[name], monkeypatch, applied=name in ("odd everything", "patch past a block"))


def test_the_zones_see_a_step_aside(monkeypatch):
    """An allocation that is one row too short is read and written past its end, and the zones show it."""
    case, zones = CASES["odd everything"], Zones()
    place, short = zones.place, []

    def shortened(shape, strides, dtype, fill=0xFF):
        if len(shape) == 4 and shape[-1] == 5 and not short:  # y
            short.append(shape := (shape[0] - 1, *shape[1:]))
            return place(shape, strides, dtype, fill).as_strided((shape[0] + 1, *shape[1:]), strides)
        return place(shape, strides, dtype, fill)

    zones.place = shortened
    with monkeypatch.context() as patch:
        allocate_between(zones, patch)
        passes(case, plainly)
    assert short
    assert not zones.untouched()


def test_the_least_of_least_lengths():
    """For a subnormal eps, 1 / eps is infinity, and infinity times 0 is NaN. In float64 this also holds for
    constants below 2^-126, which Triton takes for float32. It must not matter where w is not 0, nor for
    padded pixels, which have no w.
    """
    x, *parameters = (
        t.to(DEVICE, f32) for t in (torch.randn(1, 3, 3, 3, dtype=torch.float64), *random_layer(3, 2, 4))
    )
    for p in parameters:
        p.requires_grad_()
    y = dau_conv2d(x, *parameters, norm="l2", eps=1e-310, backend="triton")
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), parameters))


# -- grids and sizes, of launches that are only noted
# -----------------------------------------------------------------------------------


def noted(
    channels, units, rank, kernel, size, batch=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), dtype=bf16
):
    """Launches of forward, backward and explanation on an H100."""
    new = functools.partial(torch.empty, device="meta", dtype=dtype)
    parameters = [new(*shape, channels, *kernel) for shape in ((rank,), (units, rank), (units,))]
    geometry = Geometry.make(kernel, stride, padding, dilation)
    parameters, spec = Parameters(*parameters), Spec(geometry, "squash", 1e-6)
    with recording(config.Device(90, 132)) as launches:
        x = new(batch, channels, *size)
        y, kept = backend.align(x, None, parameters, spec, keep="products")
        for detach in (False, True):
            backend.align_backward(y, x, None, parameters, kept, spec, detach=detach, needs=EVERYTHING)
    return launches


@pytest.mark.parametrize(
    "options",
    [
        dict(channels=8, units=4, rank=5, kernel=(1, 1), size=(600, 600), stride=(300, 300)),
        dict(channels=8, units=4, rank=5, kernel=(1, 1), size=(2, 3), stride=(70_000, 70_000)),
        dict(channels=8, units=4, rank=5, kernel=(1, 1), size=(4000, 4000), batch=100),
        dict(channels=3, units=1, rank=1, kernel=(3, 3), size=(1, 1), padding=(1, 1)),
    ],
    ids=str,
)
def test_grids(options):
    """Grids have at most 65,535 programs in y and in z, and 2^31 - 1 in x."""
    for each in noted(**options):
        x, y, z = (*each.grid, 1, 1)[:3]
        assert 0 < x < 1 << 31, each.kernel
        assert 0 < max(y, z) < 1 << 16, each.kernel


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (dict(channels=8, units=4, rank=5, kernel=(1, 1), size=(1, 1 << 28)), "a window"),
        (
            dict(channels=4096, units=4, rank=5, kernel=(3, 3), size=(64, 10_000), dilation=(30, 1)),
            "a window",
        ),
        (dict(channels=1, units=4, rank=5, kernel=(1, 1), size=(1 << 16, 1 << 15)), "an image"),
        (
            dict(channels=8, units=1000, rank=5, kernel=(3, 1), size=(10_000, 10_000), dilation=(300, 1)),
            "the reach of a tile",
        ),
    ],
    ids=str,
)
def test_offsets_past_32_bits_are_refused(options, what):
    with pytest.raises(ValueError, match=rf"{what}.* passes 2\^31"):
        noted(**options)
    height, width = options["size"]
    assert noted(**{**options, "size": (height, width // 8)})


def test_published_sizes_and_far_larger_are_not_refused():
    assert noted(512, 1000, 256, (3, 3), (1024, 1024), batch=64, padding=(1, 1))
    assert noted(64, 64, 64, (7, 7), (8192, 8192), padding=(3, 3), stride=(3, 3))


@pytest.mark.parametrize(
    "case", [(3, 6, 20, 8, 16), (9, 3, 256, 128, 64), (4, 3, 512, 256, 64), (9, 17, 16, 64, 16)], ids=str
)
def test_no_program_is_idle(case, monkeypatch):
    """The last program of each job of `parameter_sums` writes something that no other program writes: host
    and kernel count the programs alike.
    """
    channels, units, rank, columns, ranks = case
    tile = config.Tile.make(4, 1, BO=2, BR=ranks, BN=columns, BP=64)
    made = layer.Layer(
        (1, 1),
        *sums_parameters(channels, units, rank),
        geometry=Geometry((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
        norm="squash",
        eps=1e-6,
    )
    s = made.shape
    z, gs = torch.ones(64, s.R, device=DEVICE), torch.ones(units, 64, device=DEVICE)
    padded = torch.ones(1, 3, 3, s.CP, device=DEVICE)
    starts = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    e = torch.ones(64, s.R + s.units_padded, device=DEVICE)
    sums = lambda: parameter_sums.run(made, padded=padded, starts=starts, z=z, gs=gs, t=gs, e=e)
    monkeypatch.setattr(config, "candidates", lambda *args: (tile,))
    assert all(part.isfinite().all() for part in sums())
    real = parameter_sums.launch
    # None: the sums of t
    for job, count in enumerate(("weights", "moments", "directs", None)):

        def one_less(kernel, grid, *, count=count, **arguments):
            if count:
                arguments[count] -= 1
            real(kernel, (grid[0] - 1, *grid[1:]), **arguments)

        with monkeypatch.context() as patch:
            patch.setattr(parameter_sums, "launch", one_less)
            parts = sums()
        outputs = (parts[3], parts[4]) if job == 3 else (parts[job],)
        assert not all(part.isfinite().all() for part in outputs), f"job {job}"


def sums_parameters(channels, units, rank):
    return [t.to(DEVICE, f32) for t in random_layer(channels, units, rank)]
