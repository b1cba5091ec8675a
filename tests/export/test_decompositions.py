"""The decompositions of the operators, against the definition of the layer and at the limits of floating
point."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from extreme_layers import KINDS, ORDINARY, make, spoil
from support import assert_close, random_layer
from support_extremes import PASSES, check, check_not_finite

from coda_fast import _decompositions, ops
from coda_fast._geometry import Geometry
from coda_fast._spec import Adjoint, Align, Kept, Parameters, Spec, flatten
from coda_fast.backends import factored, reference

WINDOWS = {
    "plain": ([1, 1], [0, 0, 0, 0], [1, 1]),
    "odd": ([2, 1], [1, 0, 1, 2], [1, 2]),
    "edges that no window reaches": ([3, 2], [2, 2, 1, 1], [2, 1]),
    "even kernel, same": ([1, 1], [0, 1, 1, 2], [1, 1]),
}


decomposed = {op._opname: function for op, function in _decompositions.table().items()}


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("norm", ["squash", "l2"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(
    ("channels", "units", "rank", "kernel", "bias"),
    [
        (5, 4, 3, (3, 2), True),
        (3, 4, 1, (2, 2), False),
        (2, 3, 9, (1, 3), True),
        (4, 3, 9, (1, 1), False),
        (1, 2, 1, (1, 1), True),
    ],
)
def test_decompositions_are_the_definition(channels, units, rank, kernel, bias, window, norm, applied):
    """In float64. The tensors kept for the backward pass equal those of the factored backend, and have their
    dtypes and strides.
    """
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    u = torch.randn_like(x) if applied else None
    layer = random_layer(channels, units, rank, kernel, bias=bias)
    stride, padding, dilation = window
    geometry = Geometry(kernel, tuple(stride), tuple(dilation), tuple(padding))
    spec, rest = Spec(geometry, norm, 1e-6), (*window, norm, 1e-6)
    found = decomposed["align"](x, u, *layer, *rest, False, "products", "factored")
    truth = reference.align(x, x if u is None else u, Parameters(*layer), spec)
    assert_close(found[0], truth, 1e-10)
    for ours, kept in zip(found, ops.align(x, u, *layer, *rest, False, "products", "factored"), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (kept.shape, kept.dtype, kept.stride())
        assert_close(ours, kept, 1e-10)
    value = torch.randn_like(truth)
    transposed = decomposed["adjoint"](x, value, *layer, *rest, "factored")
    assert_close(transposed, reference.adjoint(x, value, Parameters(*layer), spec), 1e-10)
    needs = [not applied, applied, False, False, False]
    backward = decomposed["align_backward"](value, x, u, *layer, *found[1:], *rest, True, needs, "factored")
    assert [t.numel() > 0 for t in backward] == needs
    assert torch.equal(backward[needs.index(True)], transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decompositions_in_lower_precision(dtype):
    """Sums and norms are computed in float32: only inputs and outputs are rounded to the dtype."""
    x = torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    layer = [t.to(dtype) for t in random_layer(5, 4, 3, (3, 2))]
    rest = (*WINDOWS["odd"], "squash", 1e-6)
    output, dot, square, *_ = decomposed["align"](x, None, *layer, *rest, False, "norm", "factored")
    value = torch.randn_like(output)
    transposed = decomposed["adjoint"](x, value, *layer, *rest, "factored")
    assert (output.dtype, transposed.dtype, square.dtype, dot.numel()) == (dtype, dtype, torch.float32, 0)
    assert output.is_contiguous(memory_format=torch.channels_last)
    wide = [t.double() for t in (x, *layer)]
    bound = 2 * torch.finfo(dtype).eps
    kept = decomposed["align"](wide[0], None, *wide[1:], *rest, False, "norm", "factored")
    assert_close(output, kept[0], bound)
    assert_close(square, kept[2], 1e-6)
    assert_close(
        transposed, decomposed["adjoint"](wide[0], value.double(), *wide[1:], *rest, "factored"), bound
    )


@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_weights_that_nearly_cancel(norm):
    """|w| is 1e-4 of |A z| and of |b|. The error of a Gram matrix in float32 would be as large as |w|^2."""
    torch.manual_seed(1)
    reduce, generate, _ = random_layer(4, 6, 3, (3, 3), dtype=torch.float32)
    x = torch.randn(1, 4, 3, 3)
    z = F.conv2d(x.double(), reduce.double()).flatten()
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], norm, 1e-6)
    opposite = -torch.einsum("nrchw,r->nchw", generate.double(), z)
    bias = (opposite + 1e-4 * torch.randn_like(opposite)).float()
    output, _, square, *_ = decomposed["align"](
        x, None, reduce, generate, bias, *rest, False, "norm", "factored"
    )
    wide = [t.double() for t in (x, reduce, generate, bias)]
    geometry = Geometry((3, 3), (1, 1), (1, 1), (0, 0, 0, 0))
    length = torch.linalg.vector_norm(opposite.flatten(1) - wide[3].flatten(1), dim=1)
    assert 1e-6 < float(length.max() / opposite.flatten(1).norm(dim=1).max()) < 1e-3
    assert_close(square.flatten(), length.square(), 1e-2)
    truth = reference.align(wide[0], wide[0], Parameters(*wide[1:]), Spec(geometry, norm, 1e-6))
    assert_close(output, truth, 1e-2)
    value = torch.ones_like(output)
    transposed = decomposed["adjoint"](x, value, reduce, generate, bias, *rest, "factored")
    assert_close((transposed * x).sum(), output.sum(), 1e-2, terms=[output])


@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_weights_that_are_rounding(norm):
    """A z and b cancel to the last digit. The bound |y| <= |x| s(|w|^2) |w| still holds; in half of the units
    only because the Cauchy-Schwarz inequality is enforced.
    """
    torch.manual_seed(1)
    reduce, generate, _ = random_layer(3, 1000, 1, (1, 1), dtype=torch.float32)
    generate = generate * 1e3
    x = torch.randn(1, 3, 1, 1)
    bias = -generate[:, 0] * F.conv2d(x, reduce)[0]
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], norm, 1e-6)
    output, _, square, *_ = decomposed["align"](
        x, None, reduce, generate, bias, *rest, False, "norm", "factored"
    )
    assert (square >= 0).all()
    length = square.view(output.shape).sqrt()
    most = x.norm() * (
        length.square() / (1 + length.square()) if norm == "squash" else length / length.clamp_min(1e-6)
    )
    assert (output.abs() <= most * (1 + 1e-5) + 1e-10).all()


@contextlib.contextmanager
def decompositions_for_factored():
    """A context in which the factored backend computes the forward passes by the decompositions, and
    gradients from the tensors that these kept.
    """

    def align(input, applied, parameters, spec, *, keep):
        call = Align(input, applied, parameters, spec, False, keep, "factored")
        output, dot, square, *_ = decomposed["align"](*flatten(call))
        return output, Kept(*(kept if kept.numel() else None for kept in (dot, square)))

    def adjoint(input, value, parameters, spec):
        return decomposed["adjoint"](*flatten(Adjoint(input, value, parameters, spec, "factored")))

    with mock.patch.multiple(factored, align=align, adjoint=adjoint):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_ends_of_the_range_of_numbers(dtype, kind):
    """Every number of every result is within its own tolerance, as for the backends."""
    with decompositions_for_factored():
        for seed in range(10):
            check(make(seed, kind, dtype), "factored")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_not_finite(dtype):
    """Only for NaN or infinity in images and upstream gradients: a convolution does not multiply infinite
    weights by the zeros of its padding.
    """
    tried = 0
    with decompositions_for_factored():
        for seed in range(80):
            case = make(seed, ORDINARY, dtype)
            if any(f" in {name} " in spoil(case, seed)[1] for name in "xuv"):
                check_not_finite(case, "factored", seed, PASSES)
                tried += 1
    assert tried > 20


def test_fake_kernels_stay_what_they_are():
    """With symbolic sizes, the shapes come from the fake kernels and not from the decompositions, which torch
    would prefer otherwise.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    layer = random_layer(5, 4, 3, (3, 2))
    x, value = torch.randn(2, 5, 9, 8, dtype=torch.float64), torch.randn(2, 4, 4, 7, dtype=torch.float64)
    calls = []
    watched = {op: lambda *args, _op=op, **options: calls.append(_op) for op in _decompositions.table()}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mock.patch.dict(torch._decomp.decomposition_table, watched), mode:
        fake = [mode.from_tensor(t, symbolic_context=None) for t in (x, value, *layer)]
        assert any(isinstance(length, torch.SymInt) for length in fake[0].shape)
        rest = (*WINDOWS["odd"], "squash", 1e-6)
        output, *kept = ops.align(fake[0], None, *fake[2:], *rest, True, "norm", "factored")
        ops.align_backward(
            output, fake[0], None, *fake[2:], *kept, *rest, True, [True, *[False] * 4], "factored"
        )
        ops.adjoint(fake[0], fake[1], *fake[2:], *rest, "factored")
    assert not calls
