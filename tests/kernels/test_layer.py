"""The fused kernels against the definition in float64: on a GPU if there is one, otherwise under Triton's
interpreter.
"""

import math

import pytest
import torch
from support import random_layer
from support_kernels import (
    DEVICE,
    L_LAYERS,
    S_LAYERS,
    assert_as_accurate,
    compare,
    errors,
    few_units,
    grads_of,
    layer_tensors,
)

from coda_fast import create_model
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose
from coda_kernels import config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH_NORMS = pytest.mark.parametrize("norm", ["squash", "l2"])
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(layer, dtype, size):
    channels, units, rank, kernel, stride = layer
    compare(
        layer_tensors(channels, units, rank, kernel, size, dtype=dtype),
        stride=stride,
        padding=(kernel - 1) // 2,
    )


@pytest.mark.parametrize("layer", S_LAYERS, ids=str)
def test_layers_of_s_coda(layer):
    run(few_units(layer), torch.bfloat16, (4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [*S_LAYERS[2:6:3], *L_LAYERS[1:4:2]], ids=str)
def test_layers_in_float32(layer):
    run(few_units(layer), torch.float32, (4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("layer", L_LAYERS, ids=str)
def test_layers_of_l_coda(layer):
    run(few_units(layer), torch.bfloat16, (7, 6) if layer[3] == 7 else (3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [*S_LAYERS[:4], S_LAYERS[6], *L_LAYERS[:3]], ids=str)
def test_explanations(layer):
    """In explanation mode the output is that of the layer, its gradient in the image is the adjoint, and
    parameters have no gradient.
    """
    channels, units, rank, kernel, stride = few_units(layer)
    x, *parameters = layer_tensors(channels, units, rank, kernel, (4, 5), dtype=torch.bfloat16)
    compare([x, *(p.detach() for p in parameters)], stride=stride, padding=(kernel - 1) // 2, detach=True)


@pytest.mark.parametrize(
    ("norm", "bias", "dtype"),
    [
        ("squash", True, torch.bfloat16),
        ("squash", False, torch.float32),
        ("l2", True, torch.float16),
        ("l2", False, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel=(3, 3), padding=1),
        dict(kernel=(3, 3), padding=1, stride=2),
        dict(kernel=(1, 1)),
        dict(kernel=(1, 1), stride=2),
        dict(kernel=(2, 3), padding=(0, 2), stride=(3, 1), dilation=(2, 1)),
        dict(kernel=(4, 2), padding="same"),
        dict(kernel=(3, 4), padding="same", dilation=(1, 2)),
        dict(kernel=(5, 5), padding="valid"),
        dict(kernel=(7, 7), padding=3, stride=3),
    ],
    ids=str,
)
def test_geometry(options, bias, norm, dtype):
    options = dict(options)
    compare(
        layer_tensors(9, 5, 7, options.pop("kernel"), (9, 11), batch=2, bias=bias, dtype=dtype),
        norm=norm,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 33, 144, 300])
def test_any_rank(rank, dtype):
    """Ranks below the minimum of a tensor core, ranks that are not powers of two, and ranks beyond the
    largest resident tile.
    """
    compare(layer_tensors(10, 3, rank, 3, (3, 4), dtype=dtype), padding=1)


@pytest.mark.parametrize(("channels", "units"), [(1, 1), (3, 17), (8, 2), (65, 3), (100, 1)])
def test_any_width(channels, units):
    compare(layer_tensors(channels, units, 5, 3, (4, 3), dtype=torch.bfloat16), padding=1)


@BOTH_NORMS
@pytest.mark.parametrize("rank", [5, 130])
def test_adjoint_and_its_gradient(norm, rank):
    """G(x, v) and its derivatives in x, v and the parameters, including F(x, u) with u different from x."""
    x, *parameters = layer_tensors(9, 4, rank, 3, (5, 4), batch=2)
    value = torch.randn(2, 4, 3, 2).to(DEVICE).requires_grad_()
    compare([x, value, *parameters], dau_conv2d_transpose, stride=2, padding=1, norm=norm)


@pytest.mark.parametrize("rank", [6, 140])
def test_explanations_train(rank):
    """A penalty on the explanation needs second derivatives in the input and in the parameters."""
    tensors = layer_tensors(9, 3, rank, 3, (4, 4))
    v, h = torch.randn(1, 3, 4, 4), torch.randn(1, 9, 4, 4)

    def penalty(backend, tensors):
        to = dict(device=DEVICE, dtype=tensors[0].dtype)
        y = dau_conv2d(*tensors, padding=1, detach=True, backend=backend)
        (row,) = torch.autograd.grad(y, tensors[0], v.to(**to), create_graph=True)
        return torch.autograd.grad((row * h.to(**to)).sum(), tensors)

    exact = [t.detach().double().requires_grad_() for t in tensors]
    assert_as_accurate(penalty("triton", tensors), penalty("reference", tensors), penalty("reference", exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [3, 1])
def test_smallest_tiles(kernel, dtype, monkeypatch):
    """The smallest tile of every kernel. A tile of 32 pixels may lie entirely in the padding of the pixels to
    a multiple of 64, and must read nothing else.
    """
    candidates = config.candidates
    monkeypatch.setattr(config, "candidates", lambda *args: candidates(*args)[-1:])
    compare(layer_tensors(9, 5, 20, kernel, (4, 4), batch=2, dtype=dtype), padding=kernel // 2)


@pytest.mark.parametrize("rank", [5, 128])
def test_strides(rank):
    """Sliced, expanded and channels_last inputs, and transposed and expanded upstream gradients, give the
    bits of contiguous ones.
    """
    base = torch.randn(4, 18, 6, 7).to(DEVICE)
    parameters = [t.to(DEVICE).requires_grad_() for t in random_layer(9, 4, rank, dtype=torch.float32)]
    run = lambda x: dau_conv2d(x, *parameters, padding=1, backend="triton")
    plain = base[::2, ::2].contiguous().requires_grad_()
    transposed = torch.randn(4, 2, 7, 6).to(DEVICE).permute(1, 0, 3, 2)
    expanded = torch.randn(2, 1, 6, 1).to(DEVICE).expand(2, 4, 6, 7)
    # how a gradient lies is read by a kernel that does not know the rank: once is enough
    for grad in (transposed, expanded) if rank == 5 else (transposed,):
        truth = grads_of(lambda x, *_: run(x), [plain, *parameters], grad.contiguous())
        for x in (
            base[::2, ::2].detach(),
            plain.detach().to(memory_format=torch.channels_last),
            plain.detach(),
        ):
            results = grads_of(lambda x, *_: run(x), [x.requires_grad_(), *parameters], grad)
            assert all(torch.equal(a, b) for a, b in zip(results, truth, strict=True))
    last = plain.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = run(last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y, last, transposed)[0].is_contiguous(memory_format=torch.channels_last)
    assert run(plain).is_contiguous()
    same = torch.randn(1, 9, 6, 7).to(DEVICE).expand(3, -1, -1, -1)
    assert torch.equal(run(same), run(same.contiguous()))
    # channels_last, 4 bytes off
    unaligned = torch.randn(2 * 9 * 42 + 1).to(DEVICE)[1:].view(2, 6, 7, 9).permute(0, 3, 1, 2)
    assert torch.equal(run(unaligned), run(unaligned.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "kernel"), [(5, 3), (128, 3), (5, 1)])
def test_parameters_channels_last(rank, kernel, dtype):
    """Parameters are read in their own layout and give the bits of contiguous ones. Their gradients have
    their layout. If one has another layout, all are copied.
    """
    tensors = layer_tensors(9, 4, rank, kernel, (5, 4), batch=2, dtype=dtype)
    grad = torch.randn(2, 4, 5, 4).to(DEVICE, dtype)
    run = lambda *t: dau_conv2d(*t, padding=kernel // 2, backend="triton")
    last = [
        tensors[0],
        *(p.detach().movedim(-3, -1).contiguous().movedim(-1, -3).requires_grad_() for p in tensors[1:]),
    ]
    expected = grads_of(run, tensors, grad)
    for mixed in (last, [*last[:2], tensors[2], last[3]]):
        found = grads_of(run, mixed, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert mixed is not last or all(
            g.stride() == p.stride() for g, p in zip(found[2:], last[1:], strict=True)
        )


def test_batches():
    """Images do not affect each other. An empty batch gives empty results and zero gradients."""
    x, *parameters = layer_tensors(9, 4, 5, 3, (5, 4), batch=3)
    run = lambda x: dau_conv2d(x, *parameters, padding=1, backend="triton")
    y = run(x)
    assert all(errors(y[i : i + 1], run(x[i : i + 1]))[0] < 1e-6 for i in range(3))
    none = x[:0].detach().requires_grad_()
    grads = grads_of(lambda x, *_: run(x), [none, *parameters], torch.zeros(0, 4, 5, 4, device=DEVICE))
    assert grads[0].shape == (0, 4, 5, 4)
    assert grads[1].shape == none.shape
    assert all((g == 0).all() for g in grads[2:])
    assert dau_conv2d_transpose(none, grads[0], *parameters, padding=1, backend="triton").shape == none.shape


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_tensors(frozen):
    """A tensor that needs no gradient gets none, and the gradients of the others do not change by a bit."""
    tensors = layer_tensors(9, 4, 5, 3, (5, 4))
    grad = torch.randn(1, 4, 5, 4).to(DEVICE)
    run = lambda *t: dau_conv2d(*t, padding=1, backend="triton")
    full = grads_of(run, tensors, grad)
    if frozen < 4:
        tensors[frozen] = tensors[frozen].detach()
    kept = [g for i, g in enumerate(full) if i != frozen + 1]
    assert all(torch.equal(a, b) for a, b in zip(grads_of(run, tensors, grad), kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_contraction(dtype):
    """The option changes how the backward pass obtains A u, but not the results."""
    compare(layer_tensors(9, 4, 5, 3, (5, 4), batch=2, dtype=dtype), padding=1, save_contraction=True)


def test_saved_contraction_is_kept_where_there_is_one():
    kept, contraction = [], 2 * 20 * 4 * 16  # [P, n R], R = 5 padded to 16
    for kernel in (3, 1):  # the weights of a patch of 9 numbers are generated
        tensors = layer_tensors(9, 4, 5, kernel, (5, 4), batch=2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            dau_conv2d(*tensors, padding=kernel // 2, backend="triton", save_contraction=True)
        assert (contraction in kept) == (kernel == 3)
        kept.clear()


@pytest.mark.parametrize(("reduction", "generation"), [(1e-3, 1e3), (1e3, 1e-3), (1, 300)])
def test_float16_far_from_one(reduction, generation):
    """Weights of any size: t and the Gram matrices are scaled against each other. Otherwise they would exceed
    the range of float16 (NaN, or 10 to 35 times eager's error). The remaining error is four roundings where
    eager torch has one or two.
    """
    tensors = layer_tensors(32, 3, 6, 3, (5, 5), dtype=torch.float16)
    with torch.no_grad():
        tensors[1].mul_(reduction)
        tensors[2].mul_(generation)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(1, 3, 5, 5, dtype=torch.float64).to(DEVICE)
    ours, truth = (
        grads_of(lambda *t, b=backend: dau_conv2d(*t, padding=1, backend=b), t, grad.to(t[0].dtype))
        for backend, t in (("triton", tensors), ("reference", exact))
    )
    assert all(errors(a, t)[0] < 4 * torch.finfo(torch.float16).eps for a, t in zip(ours, truth, strict=True))


def test_huge_pixels_and_no_weight():
    """Where w is 0, the output is 0 although |x|^2 overflows."""
    x, reduction, weight, bias = (t.detach() for t in layer_tensors(9, 4, 5, 3, (4, 4)))
    y = dau_conv2d(x * 1e25, reduction, torch.zeros_like(weight), torch.zeros_like(bias), backend="triton")
    assert (y == 0).all()


def test_same_bits_twice():
    tensors = layer_tensors(9, 4, 20, 3, (9, 9), batch=2)
    grad = torch.randn(2, 4, 9, 9).to(DEVICE)
    run = lambda *t: dau_conv2d(*t, padding=1, backend="triton")
    first, second = grads_of(run, tensors, grad), grads_of(run, tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- limits
# ------------------------------------------------------------------------------------------------------------


@ALL_DTYPES
@BOTH_NORMS
@pytest.mark.parametrize("rank", [5, 128])
@pytest.mark.parametrize("zero", ["input", "weight and bias", "one patch, no bias"])
def test_zeros(zero, rank, norm, dtype):
    """Where w is 0, the output is 0. The gradients are 0 under "squash", and finite under "l2". They are
    never NaN.
    """
    x, reduction, weight, bias = layer_tensors(9, 4, rank, 3, (5, 5), dtype=dtype)
    with torch.no_grad():
        if zero == "input":
            x.zero_()
        elif zero == "weight and bias":
            weight.zero_()
            bias.zero_()
        else:
            x[0, :, :3, :3] = 0
            bias = None
    grad = torch.randn(1, 4, 3, 3).to(DEVICE, dtype)
    # under "l2" gradients at w = 0 have the size 1 / eps, which must fit into the dtype
    eps = 1e-2 if dtype == torch.float16 else 1e-6
    y, *grads = grads_of(
        lambda *t: dau_conv2d(*t, norm=norm, eps=eps, backend="triton"), [x, reduction, weight, bias], grad
    )
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert ((y[0, :, 0, 0] if zero.startswith("one") else y) == 0).all()
    if norm == "squash" and zero == "weight and bias":
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [16, 128])
def test_cancellation(rank, dtype):
    """b = -A z at one pixel, where w nearly vanishes. |y| <= |x| still holds, and no norm is negative or less
    accurate than that of the direct formula.
    """
    x = torch.randn(1, 64, 5, 5, dtype=torch.float64)
    reduction, weight, _ = random_layer(64, 4, rank, scale=3.0)
    patch = x[0, :, :3, :3].flatten()
    bias = -torch.einsum("ok...,k->o...", weight, reduction.flatten(1) @ patch)
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (x, reduction, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(1, 4, 3, 3, dtype=torch.float64).to(DEVICE)
    truth, eager, ours = (
        grads_of(lambda *t, b=backend: dau_conv2d(*t, backend=b), t, grad.to(t[0].dtype))
        for backend, t in (("reference", exact), ("reference", tensors), ("triton", tensors))
    )
    lengths = torch.nn.functional.unfold(exact[0].cpu(), 3).norm(dim=1).view(1, 1, 3, 3).to(DEVICE)
    assert (ours[0].double().abs() <= lengths * (1 + 2 * torch.finfo(dtype).eps)).all()
    assert_as_accurate(ours, eager, truth)


def test_never_longer_than_the_patch():
    """w is parallel to x and nearly cancelled: |y| = |x| under "l2", so that any rounding of <w, x> relative
    to |w| would exceed it.
    """
    x = torch.randn(1, 64, 3, 3, dtype=torch.float64)
    reduction, _, _ = random_layer(64, 1, 16)
    z = reduction.flatten(1) @ x.flatten()
    weight = torch.randn(32, 16, 1, 1, 1, dtype=torch.float64) * x
    bias = -0.9999 * torch.einsum("ok...,k->o...", weight, z)
    tensors = [t.to(DEVICE, torch.float32) for t in (x, reduction, weight, bias)]
    y = dau_conv2d(*tensors, norm="l2", backend="triton")
    assert (y.double().abs() <= tensors[0].double().norm() * (1 + 1e-6)).all()


@ALL_DTYPES
def test_norm_of_the_contracted_form(dtype):
    """|w|^2 against float64 is as accurate as the direct |A z + b|^2 in the same dtype, also where it
    cancels, and never negative.

    Both errors are random: the RMS over a thousand numbers shows a difference of a quarter.
    """
    x = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    reduction, weight, _ = random_layer(64, 16, 64)
    patch = x[0, :, :3, :3].flatten()
    bias = -torch.einsum("ok...,k->o...", weight, reduction.flatten(1) @ patch)
    tensors = [t.to(DEVICE, dtype) for t in (x, reduction, weight, bias)]
    ops = torch.ops.coda_fast
    options = ([1, 1], [0, 0, 0, 0], [1, 1], "squash", 1e-6, False, "norm")
    square = ops.align(tensors[0], None, *tensors[1:], *options, "triton")[2].double().cpu()
    wide = [t.double().cpu() for t in tensors]
    z = torch.nn.functional.unfold(wide[0], 3)[0].T @ wide[1].flatten(1).T  # [P, r]
    direct = (torch.einsum("ok...,pk->po...", wide[2], z) + wide[3]).flatten(2).square().sum(2).T  # [n, P]
    eager_z = torch.nn.functional.conv2d(*(t.cpu() for t in tensors[:2])).flatten(2)[0].T
    rows = torch.cat((tensors[2], tensors[3].unsqueeze(1)), 1).flatten(2).cpu()  # A~
    # w in the dtype, as eager torch computes it
    eager = (torch.cat((eager_z, torch.ones_like(eager_z[:, :1])), 1) @ rows).double().square().sum(2)
    assert (square >= 0).all()
    others = slice(1, None)
    rms = lambda found: float(((found - direct) / direct)[:, others].square().mean().sqrt())
    assert rms(square) <= 1.25 * rms(eager) + torch.finfo(torch.float32).eps
    there = lambda found: float((found - direct)[:, 0].abs().max() / direct[:, 1].mean())  # where w cancels
    assert there(square) <= 2 * there(eager) + 1e-6


@ALL_DTYPES
@pytest.mark.parametrize("rank", [5, 128])
def test_not_finite(rank, dtype):
    """NaN in a weight, and NaN or infinity in a pixel, reach only the results that depend on them."""
    x, reduction, weight, bias = (
        t.detach() for t in layer_tensors(9, 4, rank, 3, (6, 6), batch=2, dtype=dtype)
    )
    broken = weight.clone()
    broken[1, 0, 0, 0, 0] = math.nan
    y = dau_conv2d(x, reduction, broken, bias, backend="triton")
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3]].isfinite().all()
    for value in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[0, 0, 0, 0] = value
        y = dau_conv2d(spoilt, reduction, weight, bias, backend="triton")
        assert not y[0, :, 0, 0].isfinite().any()
        y[0, :, 0, 0] = 0
        assert y.isfinite().all()


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scales(factor):
    """Inputs far from 1 keep their relative accuracy, because z is scaled before it is cast to float16."""
    x, reduction, weight, _ = (t.detach() for t in layer_tensors(9, 4, 5, 3, (4, 4), dtype=torch.bfloat16))
    x, options = x * factor, dict(norm="l2", eps=1e-20)
    y = dau_conv2d(x, reduction, weight, None, **options, backend="triton")
    assert (
        errors(
            y, dau_conv2d(*(t.double() for t in (x, reduction, weight)), None, **options, backend="reference")
        )[0]
        < 1e-2
    )


# -- networks
# ------------------------------------------------------------------------------------------------------------


def test_network():
    """Logits, gradients and contribution maps of a network with the kernels equal those of the definition."""
    net = create_model("coda_xs_digits", backend="triton").to(DEVICE)
    twin = create_model("coda_xs_digits", backend="reference", dtype=torch.float64).to(DEVICE)
    twin.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    images = torch.rand(2, 1, 8, 8).to(DEVICE)
    assert errors(net(images), twin(images.double()))[0] < 1e-6
    ours, truth = (
        net.explain(images, target=[[1, 2], [3, 4]]),
        twin.explain(images.double(), target=[[1, 2], [3, 4]]),
    )
    assert errors(ours.contribution_map, truth.contribution_map)[0] < 1e-5
    assert float(ours.completeness_error.max()) < 1e-6
    loss = lambda m, x: torch.nn.functional.cross_entropy(m(x), torch.tensor([3, 5], device=DEVICE))
    found = torch.autograd.grad(loss(net, images), list(net.parameters()))
    expected = torch.autograd.grad(loss(twin, images.double()), list(twin.parameters()))
    assert all(errors(a, b)[0] < 1e-5 for a, b in zip(found, expected, strict=True))
