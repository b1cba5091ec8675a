"""What a pass allocates, counted: the launchers run on meta tensors with kernels that do nothing, at the sizes of a training run."""

import contextlib

import pytest
import torch
from support_kernels import L_LAYERS, S_LAYERS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from coda_fast._geometry import Geometry
from coda_fast.backends import triton
from coda_kernels import backward_input, backward_weight, config, forward, layer, norm_factor, project

BATCH, SIZE = 64, 32


class Allocations(TorchDispatchMode):
    """Peak of the live bytes of all storages made since the mode was entered, and the largest of them."""

    def __init__(self):
        super().__init__()
        self.peak = self.largest = 0
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}  # views of what was there do not count
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in before | self.live.keys():
                self.live[key] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
                self.largest = max(self.largest, self.live[key][1])
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@contextlib.contextmanager
def silent_kernels():
    """Kernels that do nothing, and an H100 for the launchers to configure for."""

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    modules = {
        project: ["project"],
        norm_factor: ["norm_factor", "gram"],
        forward: ["contracted", "generated"],
        backward_input: ["grad_factors", "grad_z", "fold"],
        backward_weight: ["outer_sum"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, names in modules.items():
            for name in names:
                patch.setattr(module, name, Silent())
        patch.setattr(layer, "device_of", lambda _: config.Device(90, 132))
        yield


def meta_layer(shape):
    """(the class Layer, an image, the arguments to make a layer for it), on meta tensors."""
    channels, units, rank, kernel, stride = shape
    options = dict(device="meta", dtype=torch.bfloat16)
    window = layer.Window((kernel, kernel), (stride, stride), (1, 1), ((kernel - 1) // 2,) * 4)
    image = torch.empty(BATCH, channels, SIZE, SIZE, **options).to(memory_format=torch.channels_last)
    parameters = [torch.empty(*s, channels, kernel, kernel, **options) for s in ((rank,), (units, rank), (units,))]
    return layer.Layer, image, ((SIZE, SIZE), *parameters, window, "squash", 1e-6)


def sizes(shape):
    """The letters of docs/kernels.md, in numbers."""
    channels, units, rank, kernel, stride = shape
    s = config.Shape(channels, units, rank, (kernel, kernel), (stride, stride))
    out = (SIZE + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
    pixels = BATCH * out * out
    padded_units = -(-units // 16) * 16
    size = SIZE + 2 * ((kernel - 1) // 2)
    canvas = 2 * BATCH * size * size * s.CP if kernel > 1 or s.CP != channels else 0
    parameters = 2 * (padded_units * s.R * s.K + (s.R + padded_units) * s.K)
    return s, pixels, layer.whole_blocks(pixels), padded_units, canvas, parameters


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_forward(shape):
    """peak = y + kept + canvas + z + beta + |u|^2 + packed parameters + norm factor, and nothing of the size of pixels x n r or n d."""
    s, pixels, whole, padded, canvas, parameters = sizes(shape)
    with silent_kernels():
        make, image, arguments = meta_layer(shape)
        with Allocations() as found:
            packed = make(*arguments)
            packed.align(packed.canvas(image), None, torch.channels_last, "products")
    factor = 0 if s.generated else padded * (2 * s.R**2 + 4 * s.R + 8)
    expected = 2 * pixels * s.units + 8 * pixels * s.units + canvas + whole * (2 * s.R + 4 * padded + 4) + parameters + factor
    slack = 2 * parameters + 4096  # the parts that the packed rows are put together from
    assert expected <= found.peak <= expected + slack
    assert found.largest < 2 * pixels * s.units * min(s.rank, s.channels * s.taps)


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_backward(shape):
    """The formula of docs/kernels.md for a whole backward pass, results included: never exceeded, and not by far too large."""
    s, pixels, whole, padded, canvas, parameters = sizes(shape)
    channels, units, rank, kernel, stride = shape
    options = dict(device="meta", dtype=torch.bfloat16)
    image = torch.empty(BATCH, channels, SIZE, SIZE, **options).to(memory_format=torch.channels_last)
    shapes = ((rank,), (units, rank), (units,))
    reduce, weight, bias = (torch.empty(*s, channels, kernel, kernel, **options) for s in shapes)
    geometry = Geometry.make((kernel, kernel), stride, (kernel - 1) // 2)
    side = geometry.output_size(SIZE, SIZE)[0]
    grad = torch.empty(BATCH, units, side, side, **options)
    dot, square = (torch.empty(units, pixels, device="meta") for _ in range(2))
    with silent_kernels(), Allocations() as found:
        results = triton.align_backward(
            grad, image, None, reduce, weight, bias, dot, square, None, geometry, "squash", 1e-6, False, (True, False, True, True, True)
        )
    assert results[0].shape == image.shape
    per_pixel = whole * (2 * s.R + 4 * units + 2 * (s.R + padded) + 16)
    one, moments = 4 * units * s.R * s.K, 4 * units * s.R**2
    parts, moment_parts = (_parts(s, depth, whole) for depth in (s.K, s.R))
    sums = one + max((parts + 1) * one + moments, 2 * one + moments, (moment_parts + 1) * moments)
    expected = canvas + 2 * image.numel() + per_pixel + parameters + sums
    assert found.peak <= 1.02 * expected + 2 * parameters + (2 << 20)  # the rest: db, dB and their partial sums, packed rows in parts
    assert found.peak >= 0.75 * expected
    assert found.largest <= max(canvas, per_pixel, parts * one, moment_parts * moments)


def _parts(s, depth, pixels):
    """Parts of the sum over pixels for dA (depth K) or its moments (depth R)."""
    tile = config.candidates("outer_scaled", s, config.Device(90, 132))[0]
    tiles = -(-s.units // tile["BO"]) * (s.R // tile["BR"]) * -(-depth // tile["BN"])
    return config.splits(tiles, pixels, tile["BP"], config.Device(90, 132))


def test_the_contraction_is_the_only_large_tensor_and_only_on_demand():
    shape = S_LAYERS[5]
    s, pixels, *_ = sizes(shape)
    with silent_kernels():
        make, image, arguments = meta_layer(shape)
        packed = make(*arguments)
        canvas = packed.canvas(image)
        with Allocations() as plain:
            packed.align(canvas, None, torch.channels_last, "products")
        with Allocations() as saving:
            contraction = packed.align(canvas, None, torch.channels_last, "contraction")[3]
    assert contraction.shape == (pixels, s.units * s.R)
    assert saving.peak - plain.peak == 2 * pixels * s.units * s.R


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_forward_against_the_dynamic_weight(shape):
    """All that forward allocates, results included, against w alone, all in bfloat16: at most a tenth from 288 numbers a patch on."""
    s, pixels, *_ = sizes(shape)
    with silent_kernels():
        make, image, arguments = meta_layer(shape)
        with Allocations() as found:
            packed = make(*arguments)
            packed.align(packed.canvas(image), None, torch.channels_last, "products")
    depth = s.channels * s.taps
    assert found.peak < 2 * pixels * s.units * depth / (10 if depth >= 288 else 2 if depth > 64 else 0.5)
