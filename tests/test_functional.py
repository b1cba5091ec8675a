"""dau_conv2d and its adjoint: derivatives, geometry, strides, precision, limits, errors."""

import math
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    NORM_NAMES,
    assert_close,
    output_and_grads,
    random_layer,
    relative_error,
    scale_held,
)

from coda_fast.backends import factored
from coda_fast.backends.factored import layer as factored_layer
from coda_fast.backends.factored import matrices, squared_norm, windows
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

NORMS = ("squash", "l2")
FACTORED_AND_REFERENCE = pytest.mark.parametrize("backend", BACKENDS)
BOTH_NORMS = pytest.mark.parametrize("norm", NORMS)


@FACTORED_AND_REFERENCE
@BOTH_NORMS
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, norm, bias):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    tensors = (x, *random_layer(3, 2, 2, (3, 2), bias=bias, grad=True))
    assert torch.autograd.gradcheck(
        lambda *t: dau_conv2d(*t, stride=(1, 2), padding=1, norm=norm, backend=backend), tensors
    )


@FACTORED_AND_REFERENCE
@BOTH_NORMS
def test_gradcheck_adjoint(backend, norm):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    tensors = (x, v, *random_layer(3, 2, 2, grad=True))
    assert torch.autograd.gradcheck(
        lambda *t: dau_conv2d_transpose(*t, padding=1, norm=norm, backend=backend), tensors
    )


@FACTORED_AND_REFERENCE
@BOTH_NORMS
@pytest.mark.parametrize("detach", [True, False])
def test_gradgradcheck(backend, norm, detach):
    """Second derivatives; in explanation mode they are those of the adjoint map, in the input and in the
    parameters.
    """
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    tensors = (x, *random_layer(2, 2, 2, (2, 2), grad=True))
    if not detach:
        assert torch.autograd.gradgradcheck(lambda *t: dau_conv2d(*t, norm=norm, backend=backend), tensors)
        return

    def gradient(x, v, *parameters):
        y = dau_conv2d(x, *parameters, norm=norm, backend=backend, detach=True)
        return torch.autograd.grad(y, x, v, create_graph=True)[0]

    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient, (x, v, *tensors[1:]))


@FACTORED_AND_REFERENCE
@BOTH_NORMS
def test_gradgradcheck_adjoint(backend, norm):
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    tensors = (x, v, *random_layer(2, 2, 2, (2, 2), grad=True))
    assert torch.autograd.gradgradcheck(
        lambda *t: dau_conv2d_transpose(*t, norm=norm, backend=backend), tensors
    )


@FACTORED_AND_REFERENCE
@BOTH_NORMS
def test_explanation_mode_is_the_adjoint(backend, norm):
    """``detach`` does not change the output. The gradient of the input is the adjoint of the upstream
    gradient, and parameters have no gradient.
    """
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    parameters = random_layer(grad=True)
    options = dict(stride=2, padding=1, norm=norm, backend=backend)
    plain, detached = (dau_conv2d(x, *parameters, **options, detach=detach) for detach in (False, True))
    assert torch.equal(plain, detached)
    v = torch.randn_like(plain)
    grads = torch.autograd.grad(detached, [x, *parameters], v, allow_unused=True)
    assert torch.equal(grads[0], dau_conv2d_transpose(x, v, *parameters, **options))
    assert grads[1:] == (None, None, None)
    # <W x, v> = <x, W' v>
    assert torch.allclose((plain * v).sum(), (x * grads[0]).sum(), rtol=1e-12)


@BOTH_NORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel=(3, 3), padding=1),
        dict(kernel=(3, 3), padding=1, stride=2),
        dict(kernel=(7, 7), padding=3, stride=3),
        dict(kernel=(1, 1)),
        dict(kernel=(1, 1), stride=2),
        dict(kernel=(2, 3), padding=(0, 2), stride=(3, 1), dilation=(2, 1)),
        dict(kernel=(4, 2), padding="same"),
        dict(kernel=(3, 4), padding="same", dilation=(1, 2)),
        dict(kernel=(3, 3), padding="valid"),
    ],
    ids=str,
)
def test_geometry(options, bias, norm):
    options = dict(options)
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64, requires_grad=True)
    tensors = [x, *random_layer(5, 4, 3, options.pop("kernel"), bias=bias, grad=True)]
    conv = F.conv2d(x, tensors[1], **options)  # an independent computation of the output size
    results = [
        output_and_grads(lambda *t, b=b: dau_conv2d(*t, **options, norm=norm, backend=b), tensors)
        for b in BACKENDS
    ]
    assert results[0][0].shape == (2, 4, *conv.shape[2:])
    assert_close(results[1][0], results[0][0], 1e-12, "output")
    for name, ours, truth in zip(("input", "B", "A", "b"), results[1][1], results[0][1], strict=False):
        assert_close(ours, truth, 1e-12, name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    """Odd sizes, chunk sizes that divide nothing, ranks above d."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    torch.manual_seed(draw(0, 2**32 - 1))  # drawn with the example, so that its numbers are always the same
    kernel, stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 2)), (draw(1, 2), draw(1, 2))
    padding = (draw(0, 2), draw(0, 2))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 4)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    batch, channels, units, rank = draw(0, 3), draw(1, 4), draw(1, 5), draw(1, 7)
    tensors = [
        torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True),
        *random_layer(channels, units, rank, kernel, bias=data.draw(st.booleans()), grad=True),
    ]
    norm = data.draw(st.sampled_from(NORMS))
    options = dict(stride=stride, padding=padding, dilation=dilation, norm=norm)
    keep, generates = data.draw(st.booleans()), data.draw(st.booleans())
    with (
        mock.patch.dict(matrices.CHUNK_BYTES, cpu=8 * draw(1, 2000)),
        mock.patch.object(windows, "CHUNK_PARAMETERS", 0),
        mock.patch.object(factored_layer.Layer, "_worth_generating", return_value=generates),
    ):
        ours = output_and_grads(
            lambda *t: dau_conv2d(*t, **options, backend="factored", save_contraction=keep), tensors
        )
    truth = output_and_grads(lambda *t: dau_conv2d(*t, **options, backend="reference"), tensors)
    with scale_held():
        _, direct = output_and_grads(lambda *t: dau_conv2d(*t, **options, backend="reference"), tensors)
    assert_close(ours[0], truth[0], 1e-11, "output")
    for a, b, part in zip(ours[1], truth[1], direct, strict=True):
        assert_close(a, b, 1e-9, "gradient", [part, b - part])


def test_an_example_is_the_same_whenever_it_runs(monkeypatch):
    """The numbers of an example do not depend on other tests or examples that ran before it."""
    seen, run = [], output_and_grads
    monkeypatch.setitem(
        globals(),
        "output_and_grads",
        lambda function, tensors: seen.append(tensors) or run(function, tensors),
    )
    for left_by_others in (1, 2):
        torch.manual_seed(left_by_others)
        test_any_shape()
    half = len(seen) // 2
    assert half >= 40
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unbatched():
    x, parameters = torch.randn(5, 6, 7, dtype=torch.float64), random_layer()
    y = dau_conv2d(x, *parameters, padding=1)
    assert torch.equal(y, dau_conv2d(x[None], *parameters, padding=1)[0])
    back = dau_conv2d_transpose(x, y, *parameters, padding=1)
    assert torch.equal(back, dau_conv2d_transpose(x[None], y[None], *parameters, padding=1)[0])


@FACTORED_AND_REFERENCE
def test_empty_batch(backend):
    x = torch.randn(0, 5, 6, 7, requires_grad=True)
    parameters = random_layer(dtype=torch.float32, grad=True)
    y = dau_conv2d(x, *parameters, padding=1, backend=backend)
    assert y.shape == (0, 4, 6, 7)
    grads = torch.autograd.grad(y.sum(), [x, *parameters])
    assert grads[0].shape == x.shape
    assert all((g == 0).all() for g in grads)
    assert dau_conv2d_transpose(x, y, *parameters, padding=1, backend=backend).shape == x.shape


def test_memory_format_and_strides():
    """Sliced, expanded and channels_last inputs, and upstream gradients with any strides, give the bits of
    contiguous ones.
    """
    base = torch.randn(4, 10, 8, 9, dtype=torch.float64)
    parameters = random_layer(grad=True)
    sliced = base[::2, ::2].detach().requires_grad_()
    run = lambda x: dau_conv2d(x, *parameters, padding=1)
    plain = base[::2, ::2].contiguous().requires_grad_()
    last = plain.detach().to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(4, 2, 9, 8, dtype=torch.float64).permute(1, 0, 3, 2)  # [2, 4, 8, 9], transposed
    truth = run(plain)
    truth_grads = torch.autograd.grad(truth, [plain, *parameters], grad.contiguous())
    assert truth.is_contiguous()
    for x in (sliced, last):
        y = run(x)
        assert torch.equal(y, truth)
        for a, b in zip(torch.autograd.grad(y, [x, *parameters], grad), truth_grads, strict=True):
            assert torch.equal(a, b)
    assert run(last).is_contiguous(memory_format=torch.channels_last)
    expanded = torch.randn(2, 1, 8, 1, dtype=torch.float64).expand(2, 4, 8, 9)
    ours = torch.autograd.grad(run(plain), [plain, *parameters], expanded)
    theirs = torch.autograd.grad(run(plain), [plain, *parameters], expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    same = torch.randn(1, 5, 8, 9, dtype=torch.float64).expand(3, -1, -1, -1)
    assert torch.equal(run(same), run(same.contiguous()))


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_tensors(frozen):
    """A tensor that does not require a gradient gets none, and the gradients of the others do not change."""
    tensors = [torch.randn(2, 5, 6, 6, dtype=torch.float64, requires_grad=True), *random_layer(grad=True)]
    names = ["input", "B", "A", "b"]
    _, full = output_and_grads(lambda *t: dau_conv2d(*t, padding=1), tensors)
    expected = {n: g for n, g in zip(names, full, strict=True) if n != names[frozen]}
    tensors[frozen] = tensors[frozen].detach()
    _, part = output_and_grads(lambda *t: dau_conv2d(*t, padding=1), tensors)
    for (name, truth), ours in zip(expected.items(), part, strict=True):
        assert_close(ours, truth, 1e-14, name)


@FACTORED_AND_REFERENCE
@pytest.mark.parametrize("frozen", range(5))
def test_create_graph_with_frozen_tensors(frozen, backend):
    """A gradient penalty works with any frozen tensors; the input of a first layer is always one."""
    tensors = [
        torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True),
        *random_layer(2, 2, 2, (2, 2), grad=True),
    ]
    if frozen < 4:
        tensors[frozen] = tensors[frozen].detach()
    wanted = [t for t in tensors if t.requires_grad]

    def penalty(backend):
        y = dau_conv2d(*tensors, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    for ours, truth in zip(penalty(backend), penalty("reference"), strict=True):
        assert_close(ours, truth, 1e-12)


@FACTORED_AND_REFERENCE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_that_are_not_finite_give_nan(dtype, backend):
    """A diverged run shows as NaN in the loss, and not as an exception of a factorisation."""
    x, (reduction, weight, bias) = torch.randn(1, 5, 6, 6, dtype=dtype), random_layer(dtype=dtype)
    weight[1, 0, 0, 0, 0] = float("nan")
    y = dau_conv2d(x, reduction, weight, bias, backend=backend)
    assert y[:, 1].isnan().all()
    assert y[:, 0].isfinite().all()


def test_same_bits_twice():
    tensors = [torch.randn(3, 5, 16, 16, requires_grad=True), *random_layer(dtype=torch.float32, grad=True)]
    first, second = (output_and_grads(lambda *t: dau_conv2d(*t, padding=1), tensors) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@BOTH_NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, norm):
    """Worst error against float64, over output and gradients, at most twice that of the plain formula in the
    same dtype, plus one rounding of the result."""
    truth_in = [torch.randn(2, 16, 8, 8, dtype=torch.float64), *random_layer(16, 8, 16)]
    low = [t.to(dtype).requires_grad_() for t in truth_in]
    exact = [t.detach().double().requires_grad_() for t in low]

    def results(backend, tensors):
        output, grads = output_and_grads(
            lambda *t: dau_conv2d(*t, padding=1, norm=norm, backend=backend), tensors
        )
        return output, *grads

    truth, eager, ours = results("reference", exact), results("reference", low), results("factored", low)
    assert all(tensor.dtype == dtype for tensor in ours)
    worst_eager, worst = (
        max(relative_error(a, t) for a, t in zip(found, truth, strict=True)) for found in (eager, ours)
    )
    assert worst <= 2 * worst_eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """float32 inputs give outputs in the autocast dtype and float32 gradients, with the same bits as casting
    by hand. float64 is not cast.
    """
    tensors = [torch.randn(2, 5, 6, 6, requires_grad=True), *random_layer(dtype=torch.float32, grad=True)]
    with torch.autocast("cpu", torch.bfloat16):
        y = dau_conv2d(*tensors, padding=1, backend=backend)
        loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        inside = torch.autograd.grad(loss, tensors, retain_graph=True)
    outside = torch.autograd.grad(loss, tensors)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True)), (
        "backward must not depend on the autocast state of its call"
    )
    by_hand = dau_conv2d(*(t.bfloat16() for t in tensors), padding=1, backend=backend)
    assert torch.equal(y, by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        assert dau_conv2d(*(t.double() for t in tensors), padding=1, backend=backend).dtype == torch.float64
        # a bfloat16 activation of an earlier layer with float32 parameters
        assert torch.equal(
            dau_conv2d(tensors[0].bfloat16(), *tensors[1:], padding=1, backend=backend), by_hand
        )


# -- limits
# ------------------------------------------------------------------------------------------------------------


@FACTORED_AND_REFERENCE
@BOTH_NORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", ["input", "weight and bias", "one patch, no bias"])
def test_zeros(zero, dtype, norm, backend):
    """Where w is 0, the output is 0. The gradients are 0 under "squash", and finite under "l2". They are
    never NaN.
    """
    x = torch.randn(2, 5, 6, 6).to(dtype)
    reduction, weight, bias = random_layer(dtype=dtype)
    if zero == "input":
        x.zero_()
    elif zero == "weight and bias":
        weight.zero_()
        bias.zero_()
    else:
        x[0, :, :3, :3] = 0
        bias = None
    tensors = [t if t is None else t.requires_grad_() for t in (x, reduction, weight, bias)]
    y, grads = output_and_grads(lambda *t: dau_conv2d(*t, norm=norm, backend=backend), tensors)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)
    zero_part = y[0, :, 0, 0] if zero.startswith("one") else y
    assert (zero_part == 0).all()
    if norm == "squash" and zero == "weight and bias":
        assert all((g == 0).all() for g in grads)


@BOTH_NORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cancellation(dtype, norm):
    """b = -A z at one pixel, where w nearly vanishes. |y| <= |x| still holds, nothing is NaN, and other
    pixels are not affected.
    """
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    reduction, weight, _ = random_layer(64, 6, 16, scale=3.0)
    patch = F.unfold(x[:1], 3)[0, :, 0]
    z = reduction.flatten(1) @ patch
    bias = -torch.einsum("ok...,k->o...", weight, z)
    tensors = [t.to(dtype).requires_grad_() for t in (x, reduction, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    ours = output_and_grads(lambda *t: dau_conv2d(*t, norm=norm, backend="factored"), tensors)
    truth = output_and_grads(lambda *t: dau_conv2d(*t, norm=norm, backend="reference"), exact)
    assert torch.isfinite(ours[0]).all()
    assert all(torch.isfinite(g).all() for g in ours[1])
    lengths = F.unfold(exact[0], 3).norm(dim=1).view(2, 1, 6, 6)
    assert (ours[0].double().abs() <= lengths * (1 + 1e-5)).all()
    rest = torch.ones(2, 1, 6, 6, dtype=torch.float64)
    rest[0, 0, 0, 0] = 0
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    assert_close(ours[0] * rest, truth[0] * rest, bound, "other pixels")
    # under "squash" the limit at w = 0 exists; under "l2" only the direction of w is left, which is rounding
    if norm == "squash":
        assert (ours[0][0, :, 0, 0].abs() < 1e-10 * lengths[0, 0, 0, 0]).all()
        for name, a, b in zip(("input", "B", "A", "b"), ours[1], truth[1], strict=True):
            assert_close(a, b, bound, name)


def test_norm_factor():
    """|R v| = |A' v| for full, rank-deficient and wide matrices, and never NaN."""
    for n, m, d in [(3, 4, 9), (2, 9, 4), (2, 5, 5)]:
        for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            rows = torch.randn(n, m, d, dtype=dtype)
            rows[0] = 0
            rows[1, 1] = rows[1, 0]  # linearly dependent
            v = torch.randn(m, 20, dtype=dtype)
            ours = (squared_norm.norm_factor(rows) @ v).norm(dim=1)
            assert_close(
                ours, (rows.double().transpose(1, 2) @ v.double()).norm(dim=1), bound, f"{n, m, d}, {dtype}"
            )


@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_with_products_in_bfloat16(bias, monkeypatch):
    """With set_float32_matmul_precision("medium") torch may multiply float32 in bfloat16 on a CPU. The error
    of |w| is then the resolution of bfloat16 relative to the terms of w, also where they nearly cancel, and
    |w|^2 is never negative.
    """
    torch.manual_seed(0)
    generate, z = torch.randn(5, 24, 60), torch.randn(24, 200)
    rows = torch.randn(5, 60) if bias else None
    if bias:
        rows = -torch.einsum("nrd,r->nd", generate, z[:, 0]) * (1 + 1e-3)
    else:
        generate[:, 12:] = generate[:, :12] * (1 + 1e-3)
        z[12:, :100] = -z[:12, :100]
    w = torch.einsum("nrd,rp->ndp", generate.double(), z.double())
    terms = torch.einsum("nrd,rp->np", generate.double().square(), z.double().square())
    if bias:
        w, terms = w + rows.double().unsqueeze(2), terms + rows.double().square().sum(1, keepdim=True)
    length = w.norm(dim=1)
    assert (length < 0.1 * terms.sqrt()).sum() >= 5
    monkeypatch.setattr(matrices, "product", lambda a, b: a.bfloat16().float() @ b.bfloat16().float())
    found = squared_norm.Gram(generate, rows, matrices.Scratch()).square(z, torch.empty(5, 200))
    assert (found >= 0).all()
    assert ((found.double().sqrt() - length).abs() / terms.sqrt()).max() < 4 * 2**-8


def test_gradients_that_cancel():
    """With one number per patch under "l2", y = sign(w) x, so that all gradients except that of the direct
    term cancel, however small w is.
    """
    torch.manual_seed(0)
    x, B, A, b = (
        torch.randn(2, 1, 32, 32),
        torch.randn(8, 1, 1, 1),
        torch.randn(3, 8, 1, 1, 1) / 3,
        torch.randn(3, 1, 1, 1),
    )
    tensors = [t.requires_grad_() for t in (x, B, A, b)]
    upstream = torch.ones(2, 3, 32, 32)
    ours = output_and_grads(lambda *t: dau_conv2d(*t, norm="l2", backend="factored"), tensors, upstream)[1]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = output_and_grads(
        lambda *t: dau_conv2d(*t, norm="l2", backend="reference"), exact, upstream.double()
    )[1]
    with scale_held():
        direct = output_and_grads(
            lambda *t: dau_conv2d(*t, norm="l2", backend="reference"), exact, upstream.double()
        )[1]
    for found, expected, cancelled in zip(ours, truth, direct, strict=True):
        assert (found - expected).abs().max() <= 1e-6 * cancelled.abs().max()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("channels", "units", "rank"), [(2, 64, 256), (40, 64, 8)])
def test_chunks_of_the_adjoint(channels, units, rank, given, monkeypatch):
    """No intermediate is much larger than the budget, in every form, with given norms and without."""
    asked, call = [], matrices.Scratch.__call__
    monkeypatch.setattr(
        matrices.Scratch,
        "__call__",
        lambda self, like, *shape: asked.append(math.prod(shape)) or call(self, like, *shape),
    )
    x = torch.randn(1, channels, 64, 64)
    parameters = random_layer(channels, units, rank, (1, 1), dtype=torch.float32)
    if given:
        output_and_grads(
            lambda x: dau_conv2d(x, *parameters, detach=True, backend="factored"), [x.requires_grad_()]
        )
    else:
        dau_conv2d_transpose(x, torch.randn(1, units, 64, 64), *parameters, backend="factored")
    assert asked
    assert 4 * max(asked) <= 2.5 * matrices.CHUNK_BYTES["cpu"]


@pytest.mark.parametrize("enabled", [False, True])
def test_product(enabled, monkeypatch):
    """With and without oneDNN: products of contiguous matrices and transposed views, of one row or column,
    and of empty matrices.
    """
    monkeypatch.setattr(matrices, "SMALL_PRODUCT", -1)
    generator = torch.Generator().manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=enabled):
        for n, k, p in [(5, 7, 9), (1, 7, 9), (5, 1, 9), (5, 7, 1), (1, 1, 1), (5, 7, 0), (0, 7, 5)]:
            for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
                a = torch.randn(n, k, generator=generator, dtype=torch.float64)
                b = torch.randn(p, k, generator=generator, dtype=torch.float64)
                for right in (b.t(), b.t().contiguous()):
                    found = matrices.product(a.to(dtype), right.to(dtype))
                    assert found.shape == (n, p)
                    assert_close(found, a @ b.t(), bound) if found.numel() else None


def test_what_a_thread_keeps():
    """The buffer for intermediates is reused by the calls of a thread, of any dtype, inside and outside of
    inference mode. No result is a view of it. A buffer larger than the bound is not kept.
    """

    def kept():
        buffer = getattr(matrices.Scratch.kept, "buffer", None)
        return 0 if buffer is None else buffer.nbytes

    def calls():
        assert kept() == 0  # a new thread
        done = []
        for dtype in (torch.float32, torch.float64, torch.float32):
            tensors = [
                torch.randn(2, 4, 9, 9, dtype=dtype),
                *(t.to(dtype) for t in random_layer(4, 5, 6, (3, 3))),
            ]
            with torch.inference_mode():
                inference = dau_conv2d(*tensors, backend="factored")
            assert 0 < kept() <= matrices.SCRATCH_BYTES
            tensors, upstream = [t.requires_grad_() for t in tensors], torch.randn_like(inference)
            results = output_and_grads(lambda *t: dau_conv2d(*t, backend="factored"), tensors, upstream)
            truth = output_and_grads(lambda *t: dau_conv2d(*t, backend="reference"), tensors, upstream)
            flat = [inference, results[0], *results[1]]
            done.append((flat, [t.clone() for t in flat]))
            for ours, expected in zip(flat, [truth[0], truth[0], *truth[1]], strict=True):
                assert_close(ours, expected, 1e-5)
        assert all(torch.equal(a, b) for flat, copies in done for a, b in zip(flat, copies, strict=True))
        first, second = matrices.Scratch(), matrices.Scratch()  # as when one call runs within another
        assert first.buffer is not None
        assert second.buffer is None
        second(torch.empty(0, dtype=torch.uint8), matrices.SCRATCH_BYTES + 1)
        del second
        assert kept() == 0
        del first
        assert kept() > 0

    with ThreadPoolExecutor(1) as pool:
        pool.submit(calls).result()


def test_product_where_torch_has_no_such_operator(monkeypatch):
    """The missing operator is detected once, and torch.mm is used from then on."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: torch.zeros(2, 4), raising=False)
    assert not matrices._has_onednn_linear.__wrapped__()
    monkeypatch.setattr(matrices, "_has_onednn_linear", lambda: False)
    monkeypatch.setattr(matrices, "SMALL_PRODUCT", -1)
    assert torch.equal(matrices.product(torch.eye(3), torch.eye(3)), torch.eye(3))


# -- memory
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "save_contraction", [False, True, "auto", "auto, too large", "auto, too little to compute again"]
)
def test_what_factored_keeps(save_contraction, monkeypatch):
    """The tensors that forward keeps for backward have the size of the activations. There is none of size
    [pixels, n d], and one of size [pixels, n r] only where it was requested or is small.
    """
    contracted = save_contraction in (True, "auto")
    monkeypatch.setattr(
        factored, "KEPT_BYTES", 4 * 2 * 12 * 12 * 6 * 5 - (save_contraction == "auto, too large")
    )
    monkeypatch.setattr(
        factored, "KEPT_DEPTH", 8 * 3 * 3 + (save_contraction == "auto, too little to compute again")
    )
    save_contraction = save_contraction if isinstance(save_contraction, bool) else "auto"
    tensors = [
        torch.randn(2, 8, 12, 12, requires_grad=True),
        *random_layer(8, 6, 5, dtype=torch.float32, grad=True),
    ]
    output = dau_conv2d(*tensors, padding=1, backend="factored", save_contraction=save_contraction)
    kept = [t for t in output.grad_fn.saved_tensors if t is not None]
    held = [value for value in vars(output.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not held, "nothing may be kept besides the saved tensors"
    parameters = {t.data_ptr() for t in tensors[1:]}
    numbers = sum(t.numel() for t in kept if t.data_ptr() not in parameters)
    pixels = 2 * 12 * 12
    assert numbers == pixels * (8 + 2 * 6 + contracted * 6 * 5)  # x, <w, x>, |w|^2, A x


def test_what_factored_keeps_where_somebody_watches():
    """Activation checkpointing and other hooks on saved tensors are meant to save memory, so that "auto"
    keeps no contraction there.
    """
    kept = []
    tensors = [
        torch.randn(2, 32, 12, 12, requires_grad=True),
        *random_layer(32, 6, 5, dtype=torch.float32, grad=True),
    ]
    unwatched = dau_conv2d(*tensors, padding=1, backend="factored")
    assert (
        max(t.numel() for t in unwatched.grad_fn.saved_tensors if t is not None and t.dim() == 2)
        == 2 * 12 * 12 * 6 * 5
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dau_conv2d(*tensors, padding=1, backend="factored")
    assert max(t.numel() for t in kept if t.dim() == 2) == 2 * 12 * 12 * 6


# -- errors
# ------------------------------------------------------------------------------------------------------------

GOOD = dict(input=(2, 5, 6, 7), reduction_weight=(3, 5, 3, 3), weight=(4, 3, 5, 3, 3), bias=(4, 5, 3, 3))


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (dict(input=(2, 4, 6, 7)), {}, ValueError, r"input: expected \[N, 5, H, W\].*\[2, 4, 6, 7\]"),
        (dict(input=(6, 7)), {}, ValueError, r"input: expected"),
        (dict(reduction_weight=(3, 5, 3)), {}, ValueError, r"reduction_weight: expected \[rank"),
        (
            dict(weight=(4, 2, 5, 3, 3)),
            {},
            ValueError,
            r"weight: expected \[units, 3, 5, 3, 3\].*\[4, 2, 5, 3, 3\]",
        ),
        (dict(weight=(0, 3, 5, 3, 3)), {"bias": None}, ValueError, "at least one"),
        (dict(bias=(5, 5, 3, 3)), {}, ValueError, r"bias: expected \[4, 5, 3, 3\]"),
        ({}, dict(norm="l1"), ValueError, f"norm: expected one of {NORM_NAMES}, got 'l1'"),
        ({}, dict(eps=0), ValueError, "eps: expected a positive"),
        ({}, dict(stride=0), ValueError, "stride: expected at least 1, got 0"),
        ({}, dict(stride=1.5), TypeError, "stride: expected an int or a pair"),
        ({}, dict(stride=(1, 2, 3)), TypeError, "stride: expected an int or a pair"),
        ({}, dict(padding=-1), ValueError, "padding: expected at least 0"),
        ({}, dict(padding="full"), ValueError, "padding: expected"),
        ({}, dict(padding="same", stride=2), ValueError, "stride 1"),
        ({}, dict(dilation=4), ValueError, r"kernel does not fit.*\(9, 9\).*\(6, 7\)"),
        ({}, dict(backend="cudnn"), ValueError, "backend: expected one of .* got 'cudnn'"),
    ],
    ids=str,
)
def test_refuses(change, options, error, message):
    tensors = {name: torch.randn(change.get(name, shape)) for name, shape in GOOD.items()}
    with pytest.raises(error, match=message):
        dau_conv2d(**(tensors | options))


def test_refuses_types():
    tensors = {name: torch.randn(shape) for name, shape in GOOD.items()}
    with pytest.raises(TypeError, match="input: expected a tensor, got ndarray"):
        dau_conv2d(**(tensors | {"input": tensors["input"].numpy()}))
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32.*got torch.float64"):
        dau_conv2d(**(tensors | {"weight": tensors["weight"].double()}))
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        dau_conv2d(**{name: t.long() for name, t in tensors.items()})
    with pytest.raises(ValueError, match="weight: expected device cpu.*got meta"):
        dau_conv2d(**(tensors | {"weight": tensors["weight"].to("meta")}))
    with pytest.raises(ValueError, match=r"value: expected shape \[2, 4, 4, 5\], got \[2, 4, 6, 7\]"):
        dau_conv2d_transpose(value=torch.randn(2, 4, 6, 7), **tensors)
    with pytest.raises(TypeError, match="value: expected dtype"):
        dau_conv2d_transpose(value=torch.randn(2, 4, 4, 5).double(), **tensors)
