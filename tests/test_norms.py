"""A norm is one entry in each of two tables: a third norm, which only these tests register, is right
everywhere.
"""

import functools
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from support import NORM_NAMES, assert_close, random_layer

from coda_fast import _norms, functional
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose
from coda_fast.nn import DAUConv2d
from coda_kernels import norms as kernel_norms

OPTIONS = dict(stride=(2, 1), padding=1)
EPS = 0.3


class Bounded:
    """``s(q) = eps / (eps + q)``, which differs from both norms of the package."""

    def scale(self, length, square, eps):
        return eps / (eps + square)

    def slope(self, factor, length, square, eps):
        return factor * (-2 * length / (eps + square)) * (eps / (eps + square))

    def curvature(self, length, square, eps):
        return 8 * eps / (eps + square) ** 3

    def flat_below(self, eps):
        return 0.0


@triton.jit
def bounded_scale(b_square, EPS: tl.constexpr):
    return EPS / (EPS + b_square)


@triton.jit
def bounded_slope(b_factor, b_length, b_square, EPS: tl.constexpr):
    return b_factor * (-2 * b_length / (EPS + b_square)) * (EPS / (EPS + b_square))


@pytest.fixture
def bounded(monkeypatch):
    monkeypatch.setitem(_norms.NORMS, "bounded", Bounded())
    monkeypatch.setitem(kernel_norms.NORMS, "bounded", kernel_norms.Norm(bounded_scale, bounded_slope))


def by_hand(norm, x, reduce, weight, bias):
    """The layer from torch's own operators in float64, with the scale of the table: its slope follows by
    automatic differentiation.
    """
    x, reduce, weight, bias = (t.double() for t in (x, reduce, weight, bias))
    units, rank, depth = *weight.shape[:2], weight[0, 0].numel()
    patches = torch.nn.functional.unfold(x, weight.shape[3:], stride=OPTIONS["stride"], padding=1)
    z = reduce.reshape(rank, depth) @ patches
    w = torch.einsum("ord,nrp->nodp", weight.reshape(units, rank, depth), z)
    w = w + bias.reshape(1, units, depth, 1)
    square = w.square().sum(2)
    scale = (
        EPS / (EPS + square) if norm == "bounded" else _norms.named(norm).scale(square.sqrt(), square, EPS)
    )
    y = scale * (w * patches.unsqueeze(1)).sum(2)
    return y.reshape(len(x), units, 4, 8)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("channels", "rank"), [(16, 4), (3, 7)], ids=["contracted", "generated"])
@pytest.mark.parametrize("backend", ["reference", "factored", "triton"])
@pytest.mark.parametrize("norm", [*_norms.NORMS, "bounded"])
def test_every_norm_and_a_third_one(norm, backend, channels, rank):
    """Values and all gradients of a layer with every backend."""
    torch.manual_seed(0)
    parameters = random_layer(channels, 5, rank, (3, 3))
    x, *parameters = (t.float().requires_grad_() for t in (torch.randn(2, channels, 8, 8), *parameters))
    given = torch.randn(2, 5, 4, 8)
    layer = functools.partial(dau_conv2d, norm=norm, eps=EPS, backend=backend, **OPTIONS)
    y = layer(x, *parameters)
    expected = by_hand(norm, x, *parameters)
    assert_close(y.double(), expected, 1e-5)
    found = torch.autograd.grad(y, [x, *parameters], given)
    for gradient, truth in zip(
        found, torch.autograd.grad(expected, [x, *parameters], given.double()), strict=True
    ):
        assert_close(gradient.double(), truth.double(), 1e-5)
    # explanation mode: s(|w|^2) w is a constant
    direct = torch.autograd.grad(layer(x, *parameters, detach=True), x, given)[0]
    adjoint = dau_conv2d_transpose(x, given, *parameters, norm=norm, eps=EPS, backend=backend, **OPTIONS)
    assert_close(direct.double(), adjoint.double(), 1e-5)
    assert_close((direct * x).sum().double(), (given.double() * expected).sum(), 1e-5)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("backend", ["reference", "factored"])
@pytest.mark.parametrize("norm", [*_norms.NORMS, "bounded"])
def test_second_derivatives(norm, backend):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 3, 3), *random_layer(2, 2, 3, (2, 2))]
    tensors = [t.double().requires_grad_() for t in tensors]
    layer = functools.partial(dau_conv2d, norm=norm, eps=EPS, backend=backend)
    assert torch.autograd.gradgradcheck(layer, tensors, check_batched_grad=False)
    assert torch.autograd.gradcheck(layer, tensors, check_forward_ad=True)


def test_both_tables_name_the_same_and_so_do_the_pages():
    assert list(_norms.NORMS) == list(kernel_norms.NORMS) == list(functional.NORMS)
    page = (Path(__file__).resolve().parents[1] / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    for name in _norms.NORMS:
        assert f'norm="{name}"' in functional.dau_conv2d.__doc__
        assert f"`{name}`" in page or f'"{name}"' in page


@pytest.mark.parametrize("backend", ["reference", "factored", "triton"])
def test_an_unknown_norm_is_refused_everywhere(backend):
    x, parameters = torch.randn(1, 2, 3, 3), [t.float() for t in random_layer(2, 2, 3, (2, 2))]
    message = rf"norm: expected one of {NORM_NAMES}( \(coda_kernels.norms.NORMS\))?, got 'max'"
    with pytest.raises(ValueError, match=message):
        dau_conv2d(x, *parameters, norm="max", backend=backend)
    with pytest.raises(ValueError, match=message):
        DAUConv2d(2, 2, 2, norm="max", backend=backend)
    if backend != "reference":
        with pytest.raises(ValueError, match=message):
            torch.ops.coda_fast.align(
                x, None, *parameters, [1, 1], [0, 0, 0, 0], [1, 1], "max", 1e-6, False, "nothing", backend
            )


def test_a_norm_of_torch_alone_is_refused_by_the_kernels(monkeypatch):
    """A norm that is in only one of the tables is refused, and never computed as another norm."""
    monkeypatch.setitem(_norms.NORMS, "bounded", Bounded())
    x, parameters = torch.randn(1, 2, 3, 3), [t.float() for t in random_layer(2, 2, 3, (2, 2))]
    dau_conv2d(x, *parameters, norm="bounded", backend="factored")
    with pytest.raises(
        ValueError, match=rf"norm: .* {NORM_NAMES} \(coda_kernels.norms.NORMS\), got 'bounded'"
    ):
        dau_conv2d(x, *parameters, norm="bounded", backend="triton")
