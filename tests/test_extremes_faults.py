"""Single layers that a backend once computed wrongly, and faults put into the factored backend on purpose,
which the tolerances of ``test_extremes.py`` must find.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from extreme_layers import KINDS, make
from support import assert_close
from support_extremes import check, generating, norm_as_on_a_gpu

from coda_fast.backends import factored
from coda_fast.backends.factored import layer as factored_layer
from coda_fast.backends.factored import matrices, squared_norm, windows
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

ALL_BACKENDS = pytest.mark.parametrize("backend", ["reference", "factored", "triton"])


def layer(dtype=torch.float32, batch=2, size=4):
    """[x, B, A, b] whose patches have more than 64 numbers. For those the fused kernels contract A with z
    and compute |w| from a factor of the Gram matrix.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = (batch, 8, size, size), (3, 8, 3, 3), (2, 3, 8, 3, 3), (2, 8, 3, 3)
    x, *parameters = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype) for t in (x, *(p / 8 for p in parameters))]


def truth(function, tensors, **options):
    """The definition in float64."""
    return function(*(t if t is None else t.double() for t in tensors), **options, backend="reference")


@ALL_BACKENDS
@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_images_of_1e_30(norm, backend):
    """<w, u> is bounded by |w| |u|, but |u|^2 is 0 in float32."""
    x, *parameters = layer()
    y = dau_conv2d(x * 1e-30, *parameters, norm=norm, backend=backend)
    assert_close(y, truth(dau_conv2d, [x * 1e-30, *parameters], norm=norm), 2e-6)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-8), (torch.bfloat16, 1e-4)], ids=str)
@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_a_rank_that_the_norm_needs_is_far_shorter_than_the_others(backend, dtype, share):
    """z is 0 for the other ranks. The factor of the norm was once exact for the longest row alone: |w| came
    out 12 times too long, or as 0.
    """
    x, reduce, weight, bias = layer(dtype)
    reduce[1:], weight[:, 0], bias[:] = 0, weight[:, 0] * share, 0
    y = dau_conv2d(x, reduce, weight, bias, norm="l2", eps=1e-12, backend=backend)
    assert_close(
        y,
        truth(dau_conv2d, [x, reduce, weight, bias], norm="l2", eps=1e-12),
        2e-2 if dtype == torch.bfloat16 else 2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["factored", "triton"])
def test_a_bias_far_longer_than_the_other_rows_on_a_black_image(backend, dtype):
    """b was divided by the longest row of A, multiplied by 2^40 because z is 0, and squared, which gave NaN
    in the fused kernels.
    """
    x, reduce, weight, bias = layer(dtype)
    bias = weight[:, 0] * 8
    value = torch.ones(2, 2, 2, 2, dtype=dtype)
    tensors = [x * 0, value, reduce, weight * 1e-9, bias]
    assert_close(dau_conv2d_transpose(*tensors, backend=backend), truth(dau_conv2d_transpose, tensors), 1e-2)


@ALL_BACKENDS
def test_huge_images_and_no_weight(backend):
    """Where w is 0, the output is 0 although |x|^2 overflows."""
    x, reduce, weight, bias = layer()
    assert (dau_conv2d(x * 1e25, reduce, weight * 0, bias * 0, backend=backend) == 0).all()


@ALL_BACKENDS
@pytest.mark.parametrize(
    ("dtype", "norm"), [(torch.float32, "squash"), (torch.float32, "l2"), (torch.bfloat16, "l2")], ids=str
)
def test_the_range_that_is_promised(dtype, norm, backend):
    """|w| is right up to 1e18, whether images or parameters are large; where its square overflows, the
    result is NaN and not 0.
    """
    x, reduce, weight, bias = layer(dtype, batch=1, size=3)
    for tensors in ([x * 1e18, reduce, weight, bias], [x, reduce, weight * 1e18, bias]):
        y = dau_conv2d(*tensors, norm=norm, backend=backend)
        assert_close(y, truth(dau_conv2d, tensors, norm=norm), 1e-5 if dtype.itemsize == 4 else 5e-2)
    for tensors in ([x * 1e22, reduce, weight, bias], [x * 1e-3, reduce, weight * 1e25, bias]):
        assert dau_conv2d(*tensors, norm=norm, backend=backend).isnan().all()
    value = torch.ones(1, 2, 1, 1, dtype=dtype)
    assert (
        dau_conv2d_transpose(x * 1e-3, value, reduce, weight * 1e25, bias, norm=norm, backend=backend)
        .isnan()
        .all()
    )


def check_squares_that_underflow():
    """w is about 1e-3 and z about 1e18, while the squares of A are below the smallest number of float32."""
    x, reduce, weight, _ = layer()
    tensors = [x * 1e18, reduce, weight * 3e-22, None]
    for generates in (True, False):
        with generating(generates):
            assert_close(dau_conv2d(*tensors, backend="factored"), truth(dau_conv2d, tensors), 2e-6)


def test_parameters_whose_squares_are_lost(monkeypatch):
    check_squares_that_underflow()
    monkeypatch.setattr(squared_norm, "FLUSHED", 0.0)
    with pytest.raises(AssertionError, match="allowed"):
        check_squares_that_underflow()


def check_all_kinds(generates):
    """The layers of ``test_factored`` in float32."""
    for kind in KINDS:
        for seed in range(10):
            with generating(generates):
                check(make(seed, kind, torch.float32), "factored")


# -- faults: each of these functions takes a function of the backend, and returns a wrong one
# ------------------------------------------------------------------------------------------------------------


def no_norm_term(original):
    def wrong(self, grad, dot, square):
        gs, t = original(self, grad, dot, square)
        return gs, t * 0

    return wrong


def jitter_of_the_longest_row(original):
    def wrong(rows):
        gram = rows.double() @ rows.double().mT
        gram.diagonal(dim1=1, dim2=2).add_(
            1e-14 * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + 1e-300
        )
        return torch.linalg.cholesky_ex(gram, upper=True)[0].float().contiguous()

    return wrong


def one_number(index, share):
    """A fault that changes the last number of one of the gradients (dx, du, dB, dA, db) by a share."""

    def fault(original):
        def wrong(*args, **options):
            gradients = original(*args, **options)
            if gradients[index] is not None:
                gradients[index][(-1,) * gradients[index].dim()].mul_(1 + share)
            return gradients

        return wrong

    return fault


def a_little_more(function):
    return lambda *args: function(*args) * (1 + 1e-4)


def a_little_more_of_w(original):
    def wrong(*args):
        for units, w in original(*args):
            yield units, w.mul_(1 + 1e-4)

    return wrong


def flush_to_zero(function):
    return lambda *args: F.hardshrink(function(*args), 1e-25)


def no_length(function):
    return lambda *args: 0.0


def no_threshold(original):
    return 0.0


FAULTS_WHERE_W_IS_MADE = {
    "1e-4 of w": (factored_layer.Layer, "_weights", a_little_more_of_w),
    "1e-4 of z": (matrices, "product", a_little_more),
    "weights of numbers below 1e-25 are 0": (windows.Windows, "gather", flush_to_zero),
}


FAULTS = {
    "no term from the norm": (factored_layer.Layer, "_grad_factors", no_norm_term),
    "numbers below 1e-25 are 0": (windows.Windows, "gather", flush_to_zero),
    "a norm that cancels": (squared_norm, "CANCELLED", no_threshold),
    "1e-4 of |w|^2": (squared_norm.Gram, "square", a_little_more),
    "1e-4 of every product": (matrices, "product", a_little_more),
    "1e-4 of one number of dx": (factored, "align_backward", one_number(0, 1e-4)),
    "1e-4 of one number of dB": (factored, "align_backward", one_number(2, 1e-4)),
    "1e-4 of one number of dA": (factored, "align_backward", one_number(3, 1e-4)),
    "1e-4 of one number of db": (factored, "align_backward", one_number(4, 1e-4)),
}


FAULTS_ON_A_GPU = {
    "Cauchy-Schwarz with squares that are 0": (squared_norm, "flushed_length", no_length),
    "a jitter of the longest row": (squared_norm, "norm_factor", jitter_of_the_longest_row),
    "1e-4 of |w|^2, on a GPU": (squared_norm.Triangle, "square", a_little_more),
}


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_WHERE_W_IS_MADE, *FAULTS_ON_A_GPU])
def test_faults_are_found(fault, monkeypatch):
    """The tolerances are tight enough: with each fault, one of the layers of ``test_factored`` fails."""
    owner, name, broken = (FAULTS | FAULTS_WHERE_W_IS_MADE | FAULTS_ON_A_GPU)[fault]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    norm = norm_as_on_a_gpu() if fault in FAULTS_ON_A_GPU else contextlib.nullcontext()
    with norm, pytest.raises(AssertionError, match="expected"):
        check_all_kinds(generates=fault in FAULTS_WHERE_W_IS_MADE)
