"""The memory that a pass allocates: the launchers run on meta tensors and only record their launches, at the
sizes of a training run.
"""

import pytest
import torch
from support_kernels import L_LAYERS, S_LAYERS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from coda_fast._geometry import Geometry
from coda_fast._spec import Gradients, Parameters, Spec
from coda_fast.backends import triton
from coda_kernels import config
from coda_kernels.compile import recording

BATCH, SIZE = 64, 32
H100 = config.Device(90, 132)


class Allocations(TorchDispatchMode):
    """Records the peak of the live bytes of all storages created in this mode, and the largest storage."""

    def __init__(self):
        super().__init__()
        self.peak = self.largest = 0
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # views of existing storages do not count
        before = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and (key := tensor.untyped_storage()._cdata) not in before | self.live.keys()
            ):
                self.live[key] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
                self.largest = max(self.largest, self.live[key][1])
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def meta_layer(shape):
    """(image, parameters, spec) in the form that backends take, as meta tensors."""
    channels, units, rank, kernel, stride = shape
    options = dict(device="meta", dtype=torch.bfloat16)
    image = torch.empty(BATCH, channels, SIZE, SIZE, **options).to(memory_format=torch.channels_last)
    parameters = Parameters(
        *(torch.empty(*s, channels, kernel, kernel, **options) for s in ((rank,), (units, rank), (units,)))
    )
    geometry = Geometry.make((kernel, kernel), stride, (kernel - 1) // 2)
    return image, parameters, Spec(geometry, "squash", 1e-6)


def forward(shape, keep="products"):
    """(bytes allocated by a forward pass including its results, its results)."""
    image, parameters, spec = meta_layer(shape)
    with recording(H100), Allocations() as found:
        results = triton.align(image, None, parameters, spec, keep=keep)
    return found, results


def sizes(shape):
    """The values of the letters in docs/kernels.md, and the bytes of the padded image and the prepared
    parameters.
    """
    channels, units, rank, kernel, stride = shape
    s = config.Shape(channels, units, rank, (kernel, kernel), (stride, stride))
    out = (SIZE + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
    pixels = BATCH * out * out
    size = SIZE + 2 * ((kernel - 1) // 2)
    padded_image = 2 * BATCH * size * size * s.CP if kernel > 1 or s.CP != channels else 0
    prepared = 2 * (s.units_padded * s.R + s.R + s.units_padded) * s.K + 4 * units
    return s, pixels, -(-pixels // 64) * 64, s.units_padded, padded_image, prepared


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_forward(shape):
    """The bytes equal the formula of docs/kernels.md, and no tensor has the size P n r or P n d."""
    s, pixels, whole, padded, padded_image, prepared = sizes(shape)
    found, _ = forward(shape)
    factor = 0 if s.generated else padded * (2 * s.R**2 + 4 * s.R + 8)
    assert (
        found.peak
        == 10 * pixels * s.units + padded_image + whole * (2 * s.R + 4 * padded + 4) + prepared + factor
    )
    assert found.largest < 2 * pixels * s.units * min(s.rank, s.channels * s.taps)


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_backward(shape):
    """The bytes of a whole backward pass, including its results, equal the formula of docs/kernels.md."""
    s, pixels, whole, padded, padded_image, _ = sizes(shape)
    image, parameters, spec = meta_layer(shape)
    output, kept = forward(shape)[1]
    with recording(H100) as launches, Allocations() as found:
        needs = Gradients(*[True] * 5)
        results = triton.align_backward(
            output, image, None, parameters, kept, spec, detach=False, needs=needs
        )
    assert results[0].shape == image.shape
    per_pixel = whole * (2 * s.R + 4 * s.units + 2 * (s.R + padded) + 8)
    (parts,) = (launch.grid[1] for launch in launches if launch.kernel.endswith("parameter_sums"))
    numbers = s.units * s.R * (s.K + s.R + 1) + (s.R + s.units) * s.K + padded
    gradients = 2 * sum(p.numel() for p in parameters)
    gram = 2 * s.units * s.R * (s.R + 1)
    assert found.peak == padded_image + 2 * image.numel() + per_pixel + gram + 4 * parts * numbers + gradients
    assert found.largest == max(
        padded_image,
        2 * whole * (s.R + padded),
        2 * whole * s.R,
        8 * whole,
        2 * whole * s.units,
        4 * parts * numbers,
    )


def test_the_contraction_is_the_only_large_tensor_and_only_on_demand():
    shape = S_LAYERS[5]
    s, pixels, *_ = sizes(shape)
    plain, _ = forward(shape)
    saving, results = forward(shape, "contraction")
    assert results[1].contraction.shape == (pixels, s.units * s.R)
    assert saving.peak - plain.peak == 2 * pixels * s.units * s.R


@pytest.mark.parametrize("shape", [*S_LAYERS, *L_LAYERS], ids=str)
def test_forward_against_the_dynamic_weight(shape):
    """Everything that forward allocates, including its results, is compared with w alone, both in bfloat16:
    at most a tenth for patches of 288 numbers or more.
    """
    s, pixels, *_ = sizes(shape)
    depth = s.channels * s.taps
    assert forward(shape)[0].peak < 2 * pixels * s.units * depth / (
        10 if depth >= 288 else 2 if depth > 64 else 0.5
    )
