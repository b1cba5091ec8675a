"""What the kernel tests share: where they run, layers of the published networks, and one tolerance."""

import math

import torch
from support import random_layer

from coda_fast.functional import dau_conv2d

# The device of every test here: a GPU where there is one, else Triton's interpreter on the CPU (tests/conftest.py asks for it)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Distinct layers of the published networks: C, n, r, k, stride
S_LAYERS = [
    (6, 16, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (16, 32, 64, 3, 2),
    (32, 32, 64, 3, 1),
    (32, 64, 64, 3, 2),
    (64, 64, 64, 3, 1),
    (64, 10, 64, 1, 1),
]
L_LAYERS = [
    (6, 16, 64, 7, 3),
    (16, 32, 64, 3, 1),
    (32, 64, 128, 3, 2),
    (64, 64, 128, 3, 1),
    (64, 64, 256, 3, 2),
    (64, 100, 256, 3, 1),
]


def few_units(layer):
    """Under the interpreter, L-CoDA's layers with at most 20 of their units, which all go the same way; all of them on a GPU."""
    channels, units, *rest = layer
    return (channels, units if DEVICE.type == "cuda" else min(units, 20), *rest)


def errors(actual, truth):
    """Largest and RMS deviation, each over that of the truth."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    difference = actual - truth
    assert torch.isfinite(difference).all(), "NaN or infinity"
    if not difference.numel():
        return 0.0, 0.0
    largest = float(difference.abs().max() / truth.abs().max().clamp_min(1e-300))
    return largest, math.sqrt(float(difference.square().mean() / truth.square().mean().clamp_min(1e-300)))


def assert_as_accurate(actual, eager, truth):
    """The one tolerance: lists of results beside those of eager torch in the same dtype, both against float64. The RMS error of each
    result, and the largest error anywhere in them (one number's error is a draw of luck), is at most twice eager's, plus one rounding.
    """
    rounding = torch.finfo(actual[0].dtype).eps
    ours, theirs = ([errors(a, t) for a, t in zip(found, truth, strict=True)] for found in (actual, eager))
    largest = 2 * max(e[0] for e in theirs) + rounding
    for i, ((top, rms), (_, eager_rms)) in enumerate(zip(ours, theirs, strict=True)):
        if top > largest or rms > 2 * eager_rms + rounding:
            difference = (actual[i].double().cpu() - truth[i].double().cpu()).abs()
            worst = tuple(map(int, torch.unravel_index(difference.argmax(), difference.shape)))
            raise AssertionError(
                f"result {i}: error max {top:.2e}, rms {rms:.2e}; allowed {largest:.2e}, {2 * eager_rms + rounding:.2e}; worst at {worst}"
            )


def layer_tensors(channels, units, rank, kernel, size, batch=1, bias=True, dtype=torch.float32):
    """[x, B, A, b] on the device, |w| of order one; kernel an int or a pair, size a pair."""
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    tensors = [x, *random_layer(channels, units, rank, kernel, bias=bias)]
    return [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def grads_of(function, tensors, grad):
    """[output, gradients of the tensors that require one]."""
    output = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def compare(tensors, function=dau_conv2d, **options):
    """Output and gradients of the fused kernels beside eager torch in the same dtype and the definition in float64."""
    dtype = tensors[0].dtype
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    with torch.no_grad():
        shape = function(*exact, **options, backend="reference").shape
    grad = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    truth = grads_of(lambda *t: function(*t, **options, backend="reference"), exact, grad.double())
    eager = grads_of(lambda *t: function(*t, **options, backend="reference"), tensors, grad)
    ours = grads_of(lambda *t: function(*t, **options, backend="triton"), tensors, grad)
    assert all(result.dtype == dtype for result in ours)
    assert_as_accurate(ours, eager, truth)
