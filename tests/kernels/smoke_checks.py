"""Tests for the first minutes on a GPU (tools/gpu_smoke.py): every kernel in every dtype once, and the
patterns that other projects found miscompiled.

They are not part of the ordinary tests, which cover all of this and more. Each name states its shape, so that
a failure can be understood without this file. For the three miscompilations see tests/kernels/test_gpu.py.
"""

from unittest import mock

import pytest
import torch
from support_kernels import DEVICE, L_LAYERS, S_LAYERS, compare, grads_of, layer_tensors

from coda_fast.functional import dau_conv2d
from coda_kernels.layer import Layer

# Layers that together launch every kernel (tests/bench/test_gpu_runs.py): stem, strides of 2, the widest
# layer of S-CoDA, head, ranks in several pieces
CASES = {
    **{f"S{i}": (S_LAYERS[j], {}) for i, j in ((1, 0), (3, 2), (7, 5), (9, 6))},
    **{f"L{i}": (L_LAYERS[j], {}) for i, j in ((4, 2), (7, 4))},
    "S7 kept": (S_LAYERS[5], {"save_contraction": True}),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZE, BATCH = ((8, 8), 4) if DEVICE.type == "cuda" else ((3, 4), 1)
NAMES = ("y", "dx", "dB", "dA", "db")


def few_units(case):
    """The case with 4 units under the interpreter, where all units take the same path."""
    channels, units, *rest = case
    return (channels, units if DEVICE.type == "cuda" else min(units, 4), *rest)


def name_of(value):
    return value if isinstance(value, str) else str(value).removeprefix("torch.")


def say(case, dtype, size, batch):
    channels, units, rank, kernel, stride = case
    return (
        f"C {channels}, n {units}, r {rank}, k {kernel}, stride {stride}, {size[0]} x {size[1]}, batch "
        f"{batch}, {name_of(dtype)}"
    )


def checked(case, dtype, size, batch, tensors=None, **options):
    """Compare output, gradients and explanation with float64. A difference is reported with its shape and its
    worst coordinate.
    """
    channels, units, rank, kernel, stride = case
    tensors = tensors or layer_tensors(channels, units, rank, kernel, size, batch=batch, dtype=dtype)
    geometry = dict(stride=stride, padding=(kernel - 1) // 2)
    try:
        compare(tensors, **geometry, **options)
        compare([tensors[0], *(t.detach() for t in tensors[1:])], **geometry, detach=True)
    except AssertionError as error:
        raise AssertionError(
            f"{say(case, dtype, size, batch)}: {error} (results: {', '.join(NAMES)})"
        ) from None


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name, dtype, record_property):
    case, options = CASES[name]
    launched, run = [], Layer.run

    def noted(self, spec, with_tile):
        launched.append(spec.name)
        return run(self, spec, with_tile)

    with mock.patch.object(Layer, "run", noted):
        checked(few_units(case), dtype, SIZE, BATCH, **options)
    record_property("launched", sorted(set(launched)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["S1", "S3", "S7", "L4"])
def test_no_masked_address_is_read(name, dtype):
    """Images that are mostly border lie between images of NaN, so that an unmasked read beyond a border gives
    NaN.
    """
    case = few_units(CASES[name][0])
    channels, units, rank, kernel, _ = case
    tensors = layer_tensors(channels, units, rank, kernel, (3, 3), batch=BATCH, dtype=dtype)
    around = torch.full((BATCH + 2, 3, 3, channels), float("nan"), device=DEVICE, dtype=dtype)
    around[1:-1] = tensors[0].detach().permute(0, 2, 3, 1)
    # channels last, so that the kernels read this memory and no copy of it
    tensors[0] = around[1:-1].permute(0, 3, 1, 2).requires_grad_()
    checked(case, dtype, (3, 3), BATCH, tensors)


@pytest.mark.parametrize("name", ["S7", "L7"])
def test_operands_in_registers_do_not_race(name):
    """Long loops run many times, because a hazard between reading and writing shows only occasionally."""
    case = few_units(CASES[name][0])
    channels, units, rank, kernel, stride = case
    size, batch, times = ((8, 8), 64, 20) if DEVICE.type == "cuda" else (SIZE, BATCH, 2)
    tensors = layer_tensors(channels, units, rank, kernel, size, batch=batch, dtype=torch.bfloat16)
    options = dict(stride=stride, padding=(kernel - 1) // 2, backend="triton")
    grad = torch.randn_like(dau_conv2d(*tensors, **options).detach())
    runs = [grads_of(lambda *t: dau_conv2d(*t, **options), tensors, grad) for _ in range(times)]
    for i, again in enumerate(runs[1:], 2):
        for result, (a, b) in enumerate(zip(runs[0], again, strict=True)):
            different = (a != b).nonzero()
            found = (
                f"run {i} of {say(case, torch.bfloat16, size, batch)}: {len(different)} of {a.numel()} "
                f"numbers of {NAMES[result]}"
            )
            assert not len(different), (
                f"{found} differ from the first run, the first at {tuple(different[0].tolist())}"
            )
    checked(case, torch.bfloat16, size, min(batch, 8))
