"""Helpers for several test files: golden files in the layout of this library, random layers, comparisons,
and the environment of other processes.
"""

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from coda_fast._norms import NORMS
from coda_fast.backends import reference

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
LAYERS = [f"layer_{i}" for i in range(1, 7)]
B, A, BIAS = (
    "weight_mod.weighting_f.0.weight",
    "weight_mod.weighting_f.1.weight",
    "weight_mod.weighting_f.1.bias",
)
BACKENDS = ("reference", "factored")
NORM_NAMES = ", ".join(map(repr, NORMS))  # as errors list them


class Golden:
    """One golden file: ``meta``, and tensors by key."""

    def __init__(self, name, dtype=torch.float64, device="cpu"):
        self._file = np.load(GOLDEN / f"{name}.npz")
        self.meta = json.loads(str(self._file["meta"]))
        self.dtype, self.device = dtype, device

    def __getitem__(self, key):
        tensor = torch.from_numpy(self._file[key])
        return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).to(self.device)

    def keys(self, prefix):
        return [key for key in self._file.files if key.startswith(prefix)]

    def layer(self, kind):
        """``param`` or ``grad`` of a single layer as (B, A, b) in the shapes of this library. It is written
        independently of checkpoints.py.
        """
        m = self.meta
        units, rank, window = m["n"], m["r"], (m["C"], m["k"], m["k"])
        weight = self[f"{kind}/{A}"][:, :, 0, 0]  # row i * n + o
        ours = torch.stack([weight[o::units].t() for o in range(units)]).reshape(units, rank, *window)
        bias = None
        if m["bias"]:
            flat = self[f"{kind}/{BIAS}"]
            bias = torch.stack([flat[o::units] for o in range(units)]).reshape(units, *window)
        return self[f"{kind}/{B}"], ours, bias


def environment(**more):
    """The environment of a process that imports this source tree, on one thread."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | more
    return {**os.environ, **{name: str(value) for name, value in added.items()}}


@contextlib.contextmanager
def scale_held():
    """A context in which the definition treats s(|w|^2) as a constant in derivatives, which leaves the direct
    part of every gradient. The rest of a gradient comes from the norm. Under "l2" the two parts may cancel to
    nothing: a layer of rank 1 without a bias depends on the direction of z alone.
    """
    weight = reference._weight

    def held(*args):
        w, scale = weight(*args)
        return w, scale.detach()

    with mock.patch.object(reference, "_weight", held):
        yield


def errors(actual, truth, terms=()):
    """The largest and the RMS deviation, each relative to that of the truth, or of the largest of ``terms``:
    where a result is a sum that may cancel, its rounding error is proportional to the terms.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth, *terms = (t.detach().double().cpu() for t in (actual, truth, *terms))
    difference = actual - truth
    assert torch.isfinite(difference).all(), "NaN or infinity"
    if not difference.numel():
        return 0.0, 0.0
    largest, rms = lambda t: float(t.abs().max()), lambda t: float(t.square().mean().sqrt())
    return tuple(size(difference) / max(1e-300, *map(size, (truth, *terms))) for size in (largest, rms))


def relative_error(actual, expected):
    """The largest deviation, relative to the largest expected magnitude."""
    return errors(actual, expected)[0]


def assert_close(actual, expected, bound, what="", terms=()):
    """Assert that the largest and the RMS deviation, relative as in ``errors``, are at most ``bound``. The
    message names the worst coordinate.
    """
    worst, rms = errors(actual, expected, terms)
    if max(worst, rms) > bound:
        where = np.unravel_index(
            int((actual.detach().double() - expected.detach().double()).abs().argmax()), actual.shape
        )
        raise AssertionError(
            f"{what}: error max {worst:.2e}, rms {rms:.2e}, allowed {bound:.1e}; worst at "
            f"{tuple(map(int, where))}"
        )


def random_layer(
    channels=5, units=4, rank=3, kernel=(3, 3), bias=True, dtype=torch.float64, scale=1.0, grad=False
):
    """(B, A, b) with |w| of order one."""
    window = (channels, *kernel)
    d = channels * kernel[0] * kernel[1]
    tensors = [
        torch.randn(rank, *window, dtype=dtype) / d**0.5,
        scale * torch.randn(units, rank, *window, dtype=dtype) / (rank * d) ** 0.5,
        scale * torch.randn(units, *window, dtype=dtype) / d**0.5 if bias else None,
    ]
    return [None if t is None else t.requires_grad_(grad) for t in tensors]


def output_and_grads(function, tensors, grad=None):
    """The output of ``function(*tensors)`` and the gradients of those tensors that require them, for a given
    or a random upstream gradient.
    """
    output = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(
            output.dtype
        )
    return output, torch.autograd.grad(output, wanted, grad)
