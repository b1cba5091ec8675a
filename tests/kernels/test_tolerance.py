"""The tolerance of the kernel tests finds faults put in on purpose, also where a gradient cancels to nothing.
No kernel runs.
"""

import pytest
import support_kernels
import torch
from support import errors, scale_held
from support_kernels import DEVICE, compare, layer_tensors

from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

# The error of a wrong gradient as a share of the terms: some tens of roundings, which are 1e-7, 1e-3 and 8e-3
SHARES = [(torch.float32, 1e-5), (torch.float32, 1e-2), (torch.float16, 3e-2), (torch.bfloat16, 2e-1)]
# In the first layer the gradient of B is zero: it depends on the direction of z alone, which is a sign
CASES = pytest.mark.parametrize(
    ("rank", "norm", "bias"), [(1, "l2", False), (4, "l2", True), (4, "squash", False)]
)
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


def layer(rank, bias, dtype):
    return layer_tensors(9, 4, rank, 3, (5, 4), batch=2, bias=bias, dtype=dtype)


def in_place_of_the_kernels(stand_in, function=dau_conv2d):
    """Replace the backend "triton" in ``compare`` by ``stand_in``, and return ``function`` for it."""

    def chosen(*tensors, backend, **options):
        return (stand_in if backend == "triton" else function)(*tensors, backend="reference", **options)

    return chosen


def held(*tensors, **options):
    with scale_held():
        return dau_conv2d(*tensors, **options)


def exchanged(tensor):
    """The tensor itself; in the backward pass its gradient is that of the unit before."""
    return tensor.detach() + (tensor - tensor.detach()).roll(1, 0)


@CASES
@pytest.mark.parametrize("dtype", WIDER, ids=str)
def test_what_is_right_passes(dtype, rank, norm, bias):
    """Correct results pass: those of a wider dtype rounded once, and those of the backend that sums in
    another order.
    """
    wide = lambda *t, **o: dau_conv2d(*(None if a is None else a.to(WIDER[dtype]) for a in t), **o).to(dtype)
    factored = lambda *t, backend, **o: dau_conv2d(*t, backend="factored", **o)
    for stand_in in (wide, factored):
        compare(layer(rank, bias, dtype), in_place_of_the_kernels(stand_in), norm=norm, padding=1)


@CASES
@pytest.mark.parametrize(("dtype", "share"), SHARES, ids=str)
def test_part_of_the_terms_of_one_gradient_too_much(dtype, share, rank, norm, bias):
    def wrong(x, reduction, *parameters, **options):
        direct = held(
            x.detach(), reduction, *(None if p is None else p.detach() for p in parameters), **options
        )
        return dau_conv2d(x, reduction, *parameters, **options) + share * (direct - direct.detach())

    with pytest.raises(AssertionError, match="result 2: error"):
        compare(layer(rank, bias, dtype), in_place_of_the_kernels(wrong), norm=norm, padding=1)


@CASES
@pytest.mark.parametrize("dtype", WIDER, ids=str)
def test_other_faults(dtype, rank, norm, bias):
    """The term from the norm is missing, or units are exchanged in the output or in the gradient of A."""

    def unit_of_weight(x, reduction, weight, b, **options):
        return dau_conv2d(x, reduction, exchanged(weight), b, **options)

    faults = [held, lambda *t, **o: dau_conv2d(*t, **o).roll(1, 1), unit_of_weight]
    for fault in faults:
        with pytest.raises(AssertionError, match="result .: error"):
            compare(layer(rank, bias, dtype), in_place_of_the_kernels(fault), norm=norm, padding=1)


def test_a_fault_in_the_derivative_of_the_adjoint():
    """The same for rank 1 and "l2", where x affects the weights by the direction of z alone."""
    x, *parameters = layer(1, False, torch.float32)
    value = torch.randn(2, 4, 5, 4).to(DEVICE).requires_grad_()

    def wrong(*tensors, **options):
        with scale_held():
            return dau_conv2d_transpose(*tensors, **options)

    options = dict(padding=1, norm="l2")
    compare(
        [x, value, *parameters],
        in_place_of_the_kernels(dau_conv2d_transpose, dau_conv2d_transpose),
        **options,
    )
    with pytest.raises(AssertionError, match="result [12]: error"):
        compare([x, value, *parameters], in_place_of_the_kernels(wrong, dau_conv2d_transpose), **options)


@pytest.mark.parametrize(("rank", "norm", "bias"), [(8, "squash", True), (8, "l2", True), (8, "l2", False)])
def test_the_scale_is_that_of_the_truth_unless_it_cancels(rank, norm, bias, monkeypatch):
    """The terms that ``compare`` uses do not widen the tolerance of an ordinary layer."""
    seen = []
    monkeypatch.setattr(
        support_kernels,
        "assert_as_accurate",
        lambda ours, eager, truth, terms, more: seen.extend([truth, terms]),
    )
    compare(layer(rank, bias, torch.float32), in_place_of_the_kernels(dau_conv2d), norm=norm, padding=1)
    for truth, terms in zip(*seen, strict=True):
        wrong = truth + 0.01 * torch.randn_like(truth)
        largest, rms = (
            plain / scaled
            for plain, scaled in zip(errors(wrong, truth), errors(wrong, truth, terms), strict=True)
        )
        assert 1 <= largest < 2
        assert 1 <= rms < 1.3
