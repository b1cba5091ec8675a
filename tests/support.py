"""What several test files need: golden files in our layout, random layers, and one way to compare."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
LAYERS = [f"layer_{i}" for i in range(1, 7)]
B, A, BIAS = "weight_mod.weighting_f.0.weight", "weight_mod.weighting_f.1.weight", "weight_mod.weighting_f.1.bias"
BACKENDS = ("reference", "factored")


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
        """``param`` or ``grad`` of a single layer as (B, A, b) in our shapes; written out here, independently of checkpoints.py."""
        m = self.meta
        units, rank, window = m["n"], m["r"], (m["C"], m["k"], m["k"])
        weight = self[f"{kind}/{A}"][:, :, 0, 0]  # row i * n + o
        ours = torch.stack([weight[o::units].t() for o in range(units)]).reshape(units, rank, *window)
        bias = None
        if m["bias"]:
            flat = self[f"{kind}/{BIAS}"]
            bias = torch.stack([flat[o::units] for o in range(units)]).reshape(units, *window)
        return self[f"{kind}/{B}"], ours, bias


def relative_error(actual, expected):
    """Largest deviation over the largest expected magnitude."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    difference = (actual.double() - expected.double()).abs()
    assert torch.isfinite(difference).all(), "NaN or infinity"
    return float(difference.max() / expected.double().abs().max().clamp_min(1e-300)) if difference.numel() else 0.0


def assert_close(actual, expected, bound, what=""):
    """Both the largest and the RMS deviation, each over the expected one's, within ``bound``; names the worst coordinate."""
    worst = relative_error(actual, expected)
    actual, expected = actual.detach().double(), expected.detach().double()
    rms = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-300)) if actual.numel() else 0.0
    if max(worst, rms) > bound:
        where = np.unravel_index(int((actual - expected).abs().argmax()), actual.shape)
        raise AssertionError(f"{what}: error max {worst:.2e}, rms {rms:.2e}, allowed {bound:.1e}; worst at {tuple(map(int, where))}")


def random_layer(channels=5, units=4, rank=3, kernel=(3, 3), bias=True, dtype=torch.float64, scale=1.0, grad=False):
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
    """Output of ``function(*tensors)`` and the gradients of those tensors that require them, for a random (or given) upstream."""
    output = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(output.dtype)
    return output, torch.autograd.grad(output, wanted, grad)
